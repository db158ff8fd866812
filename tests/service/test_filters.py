"""Filters: what equals what, what is greater, what is refused, and what is read of the metadata."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from house import House
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import new_tenant
from sqlalchemy import update
from sqlalchemy.exc import DBAPIError
from workshop import Workshop

from backbone.batcher import DeadlinePassed
from service.search import filter_sql, filters
from service.search.allowed import Allowed
from service.search.filters import MOST_OPERANDS, InvalidFilter
from service.storage.tables import new_id, videos
from service.videos import video_rows

ODD = 'a "quoted" \\ name'
METADATA: dict[str, Any] = {
    "one": 1, "truth": True, "nothing": None, "tags": ["a", "b", 1], "at": "2026-03-01T12:00:00+02:00",
    "deep": {"er": {"x": "y"}},
    ODD: "odd", "number 7": 7.5, "Zoë": "ü",
}  # fmt: skip


def holds(where: dict[str, Any]) -> bool:
    return filters.parse(where).matches({"duration": 5.0, "created_at": "2026-03-01T10:00:00+00:00", "metadata": METADATA})


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"metadata.one": 1}, True),
        ({"metadata.one": 1.0}, True),
        ({"metadata.one": True}, False),
        ({"metadata.truth": 1}, False),
        ({"metadata.truth": {"in": [1, "true"]}}, False),
        ({"metadata.truth": {"eq": True}}, True),
        ({"metadata.tags": {"in": [True]}}, False),
        ({"metadata.tags": "a"}, True),
        ({"metadata.tags": {"eq": "a"}}, True),
        ({"metadata.tags": {"ne": "a"}}, False),
        ({"metadata.nothing": None}, True),
        ({"metadata.nothing": {"eq": None}}, True),
        ({"metadata.absent": {"eq": None}}, True),
        ({"metadata.absent": None}, True),
        ({"metadata.one": {"eq": None}}, False),
        ({"metadata.one": {"ne": None}}, True),
        ({"metadata.absent": {"in": ["a", None]}}, True),
        ({"metadata.absent": {"ne": 3}}, True),
        ({"metadata.absent": {"lt": 3}}, False),
        ({"metadata.one": {"lt": "3"}}, False),
        ({"metadata.truth": {"lte": 1}}, False),
        ({"metadata.at": {"gte": "2026-03-01T10:00:00Z", "lte": "2026-03-01T11:00:00+01:00"}}, True),
        ({"metadata.at": "2026-03-01T10:00:00"}, True),
        ({"metadata.at": {"gt": "2026-03-01T11:00:00Z"}}, False),
        ({"metadata.at": {"gt": "2026-02"}}, True),
        ({"created_at": {"lt": "2026-03-01T09:30:00-01:00"}}, True),
        ({"metadata.deep.er.x": "y"}, True),
        ({"metadata.deep.er": {"exists": True}}, True),
        ({"metadata.deep.er.x.z": {"exists": True}}, False),
        ({"duration": {"gt": 4, "lt": 6}}, True),
    ],
)
def test_values_compare_as_json_has_them(where: dict[str, Any], expected: bool) -> None:
    assert holds(where) is expected


@pytest.mark.parametrize(
    "where",
    [
        {"metadata.tag": {"in": [0] * (MOST_OPERANDS + 1)}},
        {"metadata.tag": {"in": [["a"]]}},
        {"metadata.tag": {"eq": {"a": 1}}},
        {"metadata.tag": "x" * 1001},
        {"metadata." + "a." * 9 + "b": 1},
        {"metadata." + "a" * 2000: 1},
        {f"metadata.{n}": 1 for n in range(33)},
        {"metadata": 1},
        {"duration": {"gt": True}},
        {"duration": {"gt": None}},
    ],
)
def test_what_is_beyond_a_limit_or_cannot_be_compared_is_refused(where: dict[str, Any]) -> None:
    with pytest.raises(InvalidFilter):
        filters.parse(where)


def test_of_the_metadata_only_the_names_asked_for_are_read(tmp_path: Path) -> None:
    with House(tmp_path / "data") as house:
        collection = house.add_collection("films")
        video = house.add_video(collection, 1)
        with house.storage.database.write() as connection:
            connection.execute(update(videos).where(videos.c.id == video.id).values(metadata=METADATA))
        with house.storage.database.read() as connection:

            def read(*names: str) -> dict[str, Any]:
                [(found, values)] = video_rows.filterable(connection, house.tenant.id, collection.id, names, [video.id])
                assert found == video.id and values["duration"] and values["filename"] == "clip-1.mp4"
                return values["metadata"]  # type: ignore[no-any-return]

            assert read("tags", "truth", "nothing", "absent", "deep", "number 7") == {
                name: METADATA.get(name) for name in ("tags", "truth", "nothing", "absent", "deep", "number 7")
            }
            assert read() == {}
            assert read(ODD)[ODD] == "odd" and read("Zoë")["Zoë"] == "ü"


def test_a_filter_whose_caller_is_gone_or_whose_time_is_up_ends(tmp_path: Path) -> None:
    where = filters.parse({"metadata.number": 1})
    with House(tmp_path / "data") as house:
        collection, gone = house.add_collection("films"), threading.Event()
        house.add_video(collection, 1)
        mine = (house.storage.database, house.tenant.id, collection.id, where, gone)
        with pytest.raises(DeadlinePassed):
            Allowed(*mine, seconds=-1).all()
        assert len(Allowed(*mine, seconds=60).all()) == 1
        gone.set()
        with pytest.raises(DeadlinePassed):
            Allowed(*mine, seconds=60).all()


def test_a_statement_that_takes_too_long_is_broken_off(client: Any) -> None:
    database = client.app.state.services.storage.database
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    ends = time.monotonic() + 0.2
    with pytest.raises(DBAPIError), database.read_until(lambda: time.monotonic() > ends, 0.2) as connection:
        connection.exec_driver_sql(endless)
    with database.read() as connection:  # the next one that has this connection is not
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1


TIMES = [
    "2026-03-01T12:00:00Z", "2026-03-02T11:59:00+23:59", "2026-03-01T12:00:00+02:00", "2026-03-01 10:00:00",
    "2026-03-01T23:59:59.999999-23:59", "2026-02-28T10:00:00", "2026-13-01T10:00", "2026-03-01T10:00 about",
    "0001-01-01T00:00+14:00", "9999-12-31T23:59:59",
]  # fmt: skip
SCALARS: list[Any] = [
    None, True, False, 0, 1, -1, 7, 1.0, 0.1, 0.3, 0.1 + 0.2, 7.5, -0.0, 5e-324, 2**53, 2**53 + 1, 2**63, 10**30, 1e300, -1e300,
    "", "a", "A", "b", "é", "z", "😀", "1", "true", "null", "2026-03", "it's", 'a "q" \\', *TIMES,
]  # fmt: skip
NAMES = ["a", "b", "c.d", "c.d.e", "it's", "a b", "0", 'q"x', "Zoë", "tags"]


def a_value(rng: random.Random) -> Any:
    if rng.random() < 0.25:
        return [a_value(rng) for _ in range(rng.randrange(4))]
    return {"x": rng.choice(SCALARS)} if rng.random() < 0.05 else rng.choice(SCALARS)


def some_metadata(rng: random.Random) -> dict[str, Any]:
    found = {name: a_value(rng) for name in NAMES if "." not in name and rng.random() < 0.7}
    return found | ({"c": {"d": rng.choice([a_value(rng), {"e": a_value(rng)}])}} if rng.random() < 0.6 else {})


@pytest.fixture(scope="module")
def shelf(client: Any) -> tuple[Any, str, str, dict[str, Any]]:
    """A collection of videos with all kinds of metadata: database, tenant, collection, and what filters match by id."""
    workshop, rng = Workshop(new_tenant(client)), random.Random(0)
    collection = workshop.id(workshop.guest.collection())
    values: dict[str, Any] = {}
    with workshop.storage.database.write() as connection:
        for i in range(150):
            video, metadata, size = new_id("vid"), some_metadata(rng), rng.choice([1, 1000, 10**12])
            if i < 2 * len(SCALARS):  # each once alone and once in a list
                metadata["a"] = SCALARS[i // 2] if i % 2 else ["-", SCALARS[i // 2]]
            media = {"duration": rng.choice([0.1 + 0.2, 5.0, 7.5]), "width": 320, "codec": rng.choice(["h264", "vp9"])}
            name = f"{rng.choice('aAé')}{i}.mp4"
            video_rows.add_video(connection, workshop.tenant, collection, video, name, str(i), size, metadata, [])
            video_rows.set_video(connection, workshop.tenant, video, status="ready", media=media)
            row = video_rows.video(connection, workshop.tenant, video)
            values[video] = {**media, "filename": name, "size": size, "created_at": row.created_at, "metadata": metadata}
    return workshop.storage.database, workshop.tenant, collection, values


scalars = st.sampled_from(SCALARS)
bounds = st.sampled_from([each for each in SCALARS if each is not None and not isinstance(each, bool)])
conditions = st.one_of(
    scalars,
    st.dictionaries(st.sampled_from(["eq", "ne"]), scalars, min_size=1),
    st.dictionaries(st.sampled_from(["gt", "gte", "lt", "lte"]), bounds, min_size=1),
    st.fixed_dictionaries({"in": st.lists(scalars, max_size=5)}),
    st.fixed_dictionaries({"exists": st.booleans()}),
)
fields = st.sampled_from([*filters.FIELDS, *(f"metadata.{name}" for name in NAMES), "metadata.absent", "metadata..x"])


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(where=st.dictionaries(fields, conditions, min_size=1, max_size=2))
def test_the_database_lets_through_what_the_filter_does(shelf: Any, where: dict[str, Any]) -> None:
    compare(shelf, where)


def test_each_operator_with_each_value_is_the_same_in_the_database(shelf: Any) -> None:
    for operator in ("eq", "ne", "gt", "gte", "lt", "lte"):
        for operand in SCALARS:
            if operator in ("eq", "ne") or not (operand is None or isinstance(operand, bool)):
                compare(shelf, {"metadata.a": {operator: operand}})


def compare(shelf: Any, where: dict[str, Any]) -> None:
    database, tenant, collection, values = shelf
    parsed = filters.parse(where)
    expected = {video for video, each in values.items() if parsed.matches(each)}
    assert Allowed(database, tenant, collection, parsed, threading.Event(), 60).all() == expected, where
    few = list(values)[::3]
    assert Allowed(database, tenant, collection, parsed, threading.Event(), 60).among(few) == expected.intersection(few)
    clauses = filter_sql.compiled(parsed, database.engine.dialect.name)
    with database.read() as connection:
        sure = video_rows.filtered(connection, tenant, collection, clauses.sure, None)
        may = video_rows.filtered(connection, tenant, collection, clauses.may, None)
    assert {video for video, _ in sure} <= expected <= {video for video, _ in may}


def test_the_database_decides_plain_filters_alone() -> None:
    plain = {
        "metadata.camera": "north", "metadata.tags": {"in": ["a", 1, None]}, "metadata.n": {"ne": 3},
        "metadata.x": {"exists": True}, "filename": {"gte": "b"}, "size": {"lt": 10},
    }  # fmt: skip
    assert all(filter_sql.compiled(filters.parse(plain), dialect).exact for dialect in ("sqlite", "postgresql"))
