"""The rows on a real SQLite and, where there is one, a real PostgreSQL."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, event, func, select
from sqlalchemy.exc import TimeoutError as NoConnectionFree

from service.adapters import adapter_rows
from service.errors import fault_of
from service.jobs import task_rows
from service.settings import Settings
from service.storage import collection_rows, facts, generation_rows, idempotency, segment_rows, tenant_rows
from service.storage.database import Database, InvalidText
from service.storage.keys import hash_key
from service.storage.rows import AlreadyExists, NotFound
from service.storage.storage import Storage
from service.storage.tables import metadata, now
from service.storage.tenant_rows import Tenant
from service.upkeep import delete, erase_rows
from service.videos import video_rows


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    url = f"sqlite:///{tmp_path / 'test.sqlite'}" if request.param == "sqlite" else request.getfixturevalue("postgres")
    opened = Database(url)
    opened.migrate(tmp_path / "lock")
    yield opened
    with opened.write() as connection:
        for table in reversed(metadata.sorted_tables):
            connection.execute(table.delete())
    opened.close()


def row(ordinal: int = 0) -> dict[str, object]:
    return {"ordinal": ordinal, "start": 0.0, "end": 1.0, "pooled": b"\0\0", "frames": b"\0\0"}


def tenant_and_video(database: Database, name: str = "acme") -> tuple[Tenant, collection_rows.Collection, str]:
    video = f"vid_{name}"
    with database.write() as connection:
        tenant = tenant_rows.create_tenant(connection, name, {})
        collection = collection_rows.create_collection(connection, tenant, "films", {}, "f" * 64)
        video_rows.add_video(connection, tenant.id, collection.id, video, "a.mp4", "0", 10, {"k": [1, "ü"]}, [])
    return tenant, collection, video


def test_the_migrations_make_exactly_the_tables(database: Database) -> None:
    with database.read() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), metadata)
    assert not [d for d in differences if "alembic_version" not in str(d)]


def test_collection_and_generation_are_read_together(database: Database) -> None:
    tenant, collection, _ = tenant_and_video(database)
    with database.read() as connection:
        found, generation = collection_rows.active_generation(connection, tenant.id, "films")
    assert found == collection
    assert (generation.id, generation.state, generation.digest) == (collection.active_generation_id, "active", None)
    assert generation.vector_set == generation.id


def test_a_switch_leaves_exactly_one_active_generation(database: Database) -> None:
    tenant, collection, _ = tenant_and_video(database)
    manifest = {"digest": "d" * 64, "scope": "both"}
    with database.write() as connection:
        version = adapter_rows.add_adapter(connection, tenant.id, collection.id, manifest)
        assert adapter_rows.add_adapter(connection, tenant.id, collection.id, manifest) == version, (
            "the same bytes are one version"
        )
        made = generation_rows.add_generation(connection, tenant.id, collection.id, version.id, "f" * 64, None, "building")
    with database.write() as connection:
        collection_rows.switch(connection, tenant.id, collection.id, made["id"])
    with database.read() as connection:
        states = sorted(g.state for g in generation_rows.generations_of(connection, tenant.id, collection.id))
        _, active = collection_rows.active_generation(connection, tenant.id, "films")
    assert states == ["active", "retired"]
    assert (active.id, active.digest) == (made["id"], "d" * 64)


def test_a_switch_that_fails_half_way_changes_nothing(database: Database) -> None:
    tenant, collection, _ = tenant_and_video(database)
    with pytest.raises(RuntimeError), database.write() as connection:
        made = generation_rows.add_generation(connection, tenant.id, collection.id, None, "f" * 64, None, "building")
        collection_rows.switch(connection, tenant.id, collection.id, made["id"])
        raise RuntimeError("a crash before the commit")
    with database.read() as connection:
        _, active = collection_rows.active_generation(connection, tenant.id, "films")
    assert active.id == collection.active_generation_id


def test_vectors_are_stored_once_and_a_deletion_is_a_tombstone_with_a_later_number(database: Database) -> None:
    tenant, collection, video = tenant_and_video(database)
    vectors = collection.active_generation_id
    with database.write() as connection:
        video_rows.set_video(connection, tenant.id, video, status="ready")
        assert segment_rows.missing_vectors(connection, tenant.id, collection.id, vectors) == [video]
        for _ in range(2):
            segment_rows.add_segments(connection, tenant.id, video, vectors, [row(0), row(1)])
        assert segment_rows.missing_vectors(connection, tenant.id, collection.id, vectors) == []
        before = segment_rows.segments_after(connection, tenant.id, vectors, 0, 100)
        video_rows.mark_video_deleted(connection, tenant.id, video)
        after = segment_rows.segments_after(connection, tenant.id, vectors, before[-1]["seq"], 100)
    assert [r["ordinal"] for r in before] == [0, 1]
    assert [r["ordinal"] for r in after] == [-1]


@pytest.mark.parametrize("later", ["added", "deleted"])
def test_the_rows_of_a_set_become_visible_in_the_order_of_their_numbers(database: Database, later: str) -> None:
    """A reader that has seen a number need never look for a smaller one: whoever writes next waits for the commit."""
    tenant, collection, first = tenant_and_video(database)
    vectors, second, ended = collection.active_generation_id, "vid_second", threading.Event()
    with database.write() as connection:
        video_rows.add_video(connection, tenant.id, collection.id, second, "b.mp4", "1", 10, {}, [])

    def write() -> None:
        with database.write() as connection:
            if later == "added":
                segment_rows.add_segments(connection, tenant.id, second, vectors, [row()])
            else:
                video_rows.mark_video_deleted(connection, tenant.id, second)
        ended.set()

    thread = threading.Thread(target=write)
    with database.write() as connection:
        segment_rows.add_segments(connection, tenant.id, first, vectors, [row()])
        thread.start()
        assert not ended.wait(0.5)
        with database.read() as reader:
            assert segment_rows.segments_after(reader, tenant.id, vectors, 0, 10) == []
    thread.join(timeout=30)
    with database.read() as connection:
        rows = segment_rows.segments_after(connection, tenant.id, vectors, 0, 10)
        held = segment_rows.tally(connection, tenant.id, vectors)
    assert [(r["video_id"], r["ordinal"]) for r in rows] == [(first, 0), (second, 0 if later == "added" else -1)]
    seqs = [r["seq"] for r in rows]
    assert held == (max(seqs), 2, sum(seqs), max(first, second))


def test_no_function_finds_another_tenants_rows(database: Database) -> None:
    tenant, collection, video = tenant_and_video(database)
    other, _, _ = tenant_and_video(database, "borealis")
    with database.write() as connection:
        segment_rows.add_segments(connection, tenant.id, video, collection.active_generation_id, [row()])
        with pytest.raises(NotFound):
            video_rows.video(connection, other.id, video)
        with pytest.raises(NotFound):
            generation_rows.generation(connection, other.id, collection.active_generation_id)
        assert segment_rows.segments_after(connection, other.id, collection.active_generation_id, 0, 10) == []
        assert video_rows.videos_by_id(connection, other.id, [video]) == {}
        assert collection_rows.lock_collection(connection, other.id, collection.id) is None
        assert segment_rows.tally(connection, other.id, collection.active_generation_id) == (0, 0, 0, "")
        assert segment_rows.searched_sets(connection, tenant.id) == {collection.active_generation_id}
        assert collection.active_generation_id not in segment_rows.searched_sets(connection, other.id)
        with pytest.raises(NotFound):
            segment_rows.add_segments(connection, other.id, video, collection.active_generation_id, [row()])
        assert not video_rows.set_video(connection, other.id, video, status="failed")
        segment_rows.drop_vectors(connection, other.id, collection.active_generation_id)
        assert segment_rows.has_vectors(connection, tenant.id, video, collection.active_generation_id)


def test_a_name_is_taken_once_and_free_after_deletion(database: Database) -> None:
    tenant, collection, _ = tenant_and_video(database)
    with database.write() as connection:
        with pytest.raises(AlreadyExists):
            collection_rows.create_collection(connection, tenant, "films", {}, "f" * 64)
        collection_rows.mark_collection_deleted(connection, tenant.id, collection.id)
        assert collection_rows.create_collection(connection, tenant, "films", {}, "f" * 64).id != collection.id


def test_what_is_erased_is_gone_and_what_is_not_marked_stays(database: Database) -> None:
    """The statements of a purge, on each kind of database."""
    tenant, collection, video = tenant_and_video(database)
    other, kept, film = tenant_and_video(database, "borealis")
    with database.write() as connection:
        video_rows.set_captions(connection, tenant.id, video, [video_rows.Caption("a red ball")])
        version = adapter_rows.add_adapter(connection, tenant.id, collection.id, {"digest": "d" * 64, "scope": "both"})
        made = generation_rows.add_generation(connection, tenant.id, collection.id, version.id, "f" * 64, None, "retired")["id"]
        task = task_rows.add_task(connection, tenant.id, collection.id, "activate", {"adapter_id": version.id})
        for key, answer in (("a", {"video_id": video}), ("b", {"task_id": task.id}), ("c", {"id": collection.id})):
            idempotency.remember(connection, tenant.id, key, "0", answer)
        task_rows.end_task(connection, tenant.id, task.id, "succeeded")
        for vectors in (made, collection.active_generation_id):
            segment_rows.add_segments(connection, tenant.id, video, vectors, [row(0), row(1), row(2)])
        assert erase_rows.erase_videos(connection, tenant.id, [video]) == 0, "not marked"
        assert erase_rows.erase_adapter(connection, tenant.id, collection.id, version.id) is None
        erase_rows.erase_collection(connection, tenant.id, collection.id)
        erase_rows.erase_tenant(connection, tenant.id)
        video_rows.mark_video_deleted(connection, tenant.id, video)
        assert not generation_rows.remove_generation(connection, tenant.id, collection.active_generation_id), "in use"
    with database.write() as connection:
        adapter_rows.mark_adapter_deleted(connection, tenant.id, collection.id, version.id)
        later = now()
        marked = {("video", tenant.id, collection.id, video), ("adapter", tenant.id, collection.id, version.id)}
        assert set(erase_rows.forgotten(connection, later)) == marked
        assert erase_rows.erase_adapter(connection, tenant.id, collection.id, version.id) == ("d" * 64, [made])
        assert erase_rows.orphaned_vector_sets(connection) == [made]
        assert segment_rows.drop_vectors(connection, other.id, collection.active_generation_id) == 0, "another tenant's"
        assert segment_rows.drop_vectors(connection, None, made) == 1, "a tombstone"
        assert erase_rows.erase_videos(connection, tenant.id, [video, film]) == 1
        collection_rows.mark_collection_deleted(connection, tenant.id, collection.id)
        erase_rows.erase_collection(connection, tenant.id, collection.id)
        segment_rows.drop_vectors(connection, None, collection.active_generation_id)
        tenant_rows.mark_tenant_deleted(connection, tenant.id)
        erase_rows.erase_tenant(connection, tenant.id)
    with database.read() as connection:
        left = {table.name: connection.scalar(select(func.count()).select_from(table)) for table in metadata.sorted_tables}
        assert erase_rows.known_videos(connection, [video, film]) == {film}
        assert erase_rows.known_collections(connection, [collection.id, kept.id]) == {kept.id}
    names = ("tenants", "collections", "generations", "videos", "tasks")  # the neighbour's
    assert left == {name: 1 if name in names else 0 for name in left}


def beside(database: Database, first: Callable[[Connection], Any], second: Callable[[Connection], Any]) -> Any:
    """What `second` returns, begun in another transaction while that of `first` is still open."""
    begun, result = threading.Event(), []

    def other() -> None:
        begun.set()
        with database.write() as connection:
            result.append(second(connection))

    thread = threading.Thread(target=other)
    with database.write() as connection:
        first(connection)
        thread.start()
        begun.wait()
        thread.join(0.3)  # on SQLite it cannot begin
    thread.join(30)
    return result[0]


def test_a_fact_and_a_sign_of_life_are_written_by_two_at_once(database: Database) -> None:
    for act in (partial(facts.set_fact, key="k", value=[1]), partial(facts.worker_seen, worker="w")):
        beside(database, act, act)
    assert beside(database, partial(facts.keep_fact, key="s", value=1), partial(facts.keep_fact, key="s", value=2)) == 1
    with database.read() as connection:
        assert facts.fact(connection, "k") == [1] and facts.living_workers(connection, 60) == {"w"}


def test_a_name_is_given_once_when_two_ask_for_it(database: Database) -> None:
    make = partial(tenant_rows.create_tenant, name="acme", quotas={})

    def late(connection: Connection) -> str:
        with pytest.raises(AlreadyExists):
            make(connection)
        return "refused"

    assert beside(database, make, late) == "refused"


def test_a_retry_beside_the_first_request_is_given_its_answer(database: Database) -> None:
    tenant, _, _ = tenant_and_video(database)

    def ask(connection: Connection, answer: str) -> Any:
        return idempotency.once(connection, tenant.id, "key", "hash", lambda: {"task_id": answer})

    assert beside(database, partial(ask, answer="first"), partial(ask, answer="second")) == {"task_id": "first"}
    with database.write() as connection:
        idempotency.forget(connection, now(-60))
        assert ask(connection, "later") == {"task_id": "first"}
        idempotency.forget(connection, now(1))
        assert ask(connection, "later") == {"task_id": "later"}


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
def test_a_text_that_one_database_cannot_store_is_refused_on_both(database: Database, text: str) -> None:
    attempts: list[Callable[[Connection], Any]] = [
        lambda connection: tenant_rows.tenant_named(connection, text),
        lambda connection: facts.set_fact(connection, "k", {"deep": [text]}),
        lambda connection: facts.set_fact(connection, "k", {text: 1}),
        lambda connection: video_rows.videos_by_id(connection, "t", [text]),
    ]
    for attempt in attempts:
        with pytest.raises(InvalidText), database.write() as connection:
            attempt(connection)


def test_more_values_than_a_statement_takes_parameters(database: Database) -> None:
    tenant, collection, video = tenant_and_video(database)
    many = [*map(str, range(70_000)), video]
    with database.write() as connection:
        video_rows.set_captions(connection, tenant.id, video, [video_rows.Caption("a"), video_rows.Caption("b")])
        vectors = collection.active_generation_id
        segment_rows.add_segments(connection, tenant.id, video, vectors, [row()])
        (seq,) = [found["seq"] for found in segment_rows.segments_after(connection, tenant.id, vectors, 0, 10)]
    with database.read() as connection:
        assert list(video_rows.videos_by_id(connection, tenant.id, many)) == [video]
        assert [c.text for c in video_rows.captions_of(connection, tenant.id, many)[video]] == ["a", "b"]
        assert list(segment_rows.video_vectors(connection, tenant.id, vectors, many)) == [video]
        assert list(segment_rows.frame_vectors(connection, tenant.id, vectors, [*range(100, 70_100), seq])) == [seq]
        assert erase_rows.known_videos(connection, many) == {video}
        assert erase_rows.known_collections(connection, [*many, collection.id]) == {collection.id}
        assert erase_rows.known_adapters(connection, [(name, name) for name in many]) == set()


def test_a_connection_is_waited_for_and_then_refused(database: Database) -> None:
    small = Database(database.url, connections=2, wait=0.05)
    with small.read(), small.read():
        with pytest.raises(NoConnectionFree) as refused, small.read():
            pass
        assert fault_of(refused.value) == "crowded"
    with small.read():
        pass
    small.close()


@pytest.mark.postgres
def test_the_first_start_of_two_replicas_makes_one_installation(empty_postgres: str, tmp_path: Path) -> None:
    """Each with a data folder of its own: no lock file can help."""
    replicas = [Storage(Settings(data=tmp_path / name, database_url=empty_postgres)) for name in ("a", "b")]
    with ThreadPoolExecutor(2) as pool:
        keys = [key for key in pool.map(lambda replica: replica.prepare(), replicas) if key is not None]
    with replicas[0].database.read() as connection:
        assert [hash_key(key) for key in keys] == [facts.fact(connection, "root_key_hash")]
    for replica in replicas:
        replica.close()


def test_deleting_a_video_looks_at_no_task_but_its_own(tmp_path: Path) -> None:
    """By the primary key: the tasks of others may be millions, and the write lock is held."""
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    database.migrate(tmp_path / "lock")
    tenant, collection, video = tenant_and_video(database)
    asked: list[tuple[str, Any]] = []
    with database.write() as connection:
        note = lambda *of: asked.append((of[2], of[3]))  # noqa: E731
        event.listen(database.engine, "before_cursor_execute", note)
        delete.delete_video(connection, tenant.id, collection.id, video)
        event.remove(database.engine, "before_cursor_execute", note)
        plans = [
            str(step[3])
            for statement, parameters in asked
            if "tasks" in statement and not statement.startswith("INSERT")
            for step in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
        ]
    assert plans and all("sqlite_autoindex_tasks_1 (id=?)" in plan for plan in plans), plans
    with database.read() as connection:
        states = {task.kind: task.status for task in task_rows.list_tasks(connection, tenant.id, None, None, 10, None).rows}
    assert states == {"index_video": "cancelled", "purge": "queued"}
    database.close()


def test_a_commit_is_synced_and_the_journal_is_a_wal(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    with database.read() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
        assert connection.exec_driver_sql("PRAGMA secure_delete").scalar() == 1
    database.close()
