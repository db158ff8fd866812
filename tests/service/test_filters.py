"""Filters: what equals what, what is greater, what is refused, and what is read of the metadata."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from house import House
from sqlalchemy import update

from backbone.batcher import DeadlinePassed
from service.search import filters
from service.search.filters import MOST_OPERANDS, InvalidFilter
from service.search.query import Searcher
from service.storage.tables import videos
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
                [(found, values)] = video_rows.filterable(connection, house.tenant.id, collection.id, names)
                assert found == video.id and values["duration"] and values["filename"] == "clip-1.mp4"
                return values["metadata"]  # type: ignore[no-any-return]

            assert read("tags", "truth", "nothing", "absent", "deep", "number 7") == {
                name: METADATA.get(name) for name in ("tags", "truth", "nothing", "absent", "deep", "number 7")
            }
            assert read() == {}
            assert read(ODD)[ODD] == "odd" and read("Zoë")["Zoë"] == "ü"


def test_a_filter_whose_caller_is_gone_or_whose_time_is_up_ends(tmp_path: Path) -> None:
    where = filters.parse({"metadata.number": 1})
    with House(tmp_path / "data", search_seconds=1e-9) as house:
        collection, gone = house.add_collection("films"), threading.Event()
        house.add_video(collection, 1)
        searcher = Searcher(house.storage, house.encoder)
        with pytest.raises(DeadlinePassed):
            searcher._allowed(house.tenant.id, collection, where, gone)
        gone.set()
        with pytest.raises(DeadlinePassed):
            searcher._allowed(house.tenant.id, collection, where, gone)
        searcher.close()
