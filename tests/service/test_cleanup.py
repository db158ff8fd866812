"""Deletion, retention and what a sweep finds: afterwards nothing is left, in the tables or on the disk."""

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from serving import ROOT, Tenant, clip, new_database, new_tenant
from sqlalchemy import Connection, event, insert, select, update
from workshop import Workshop, application, runner

from service.adapters import activate
from service.jobs import task_rows
from service.storage import collection_rows, facts, generation_rows
from service.storage.blobs import frames_key, video_key
from service.storage.storage import Storage
from service.storage.tables import adapters, generations, metadata, segments
from service.upkeep import check_rows, delete, erase_rows
from service.videos import video_rows


@pytest.fixture(scope="module")
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An application of this file's own: the files of one that other tests use too hold their words and their open purges."""
    url = new_database(request.getfixturevalue("postgres")) if request.param == "postgresql" else None
    with application(tmp_path_factory.mktemp("erased") / "data", database_url=url) as running:
        yield running


def words(what: str) -> list[str]:
    return [f"{what} waits for the evening train number {n}" for n in range(30)]


def tables_naming(storage: Storage, *names: str) -> set[str]:
    """Tables with a row in which one of these names stands anywhere."""
    with storage.database.read() as connection:
        every = [(table.name, str(row)) for table in metadata.sorted_tables for row in connection.execute(select(table))]
    return {table for table, row in every if any(name in row for name in names)}


def files_naming(storage: Storage, *names: str) -> list[str]:
    """Files and folders of the data folder whose path or content has one of these names; the job engine's own apart."""
    found = []
    for path in storage.settings.data.rglob("*"):
        inside = path.read_bytes() if path.is_file() and not path.name.startswith("jobs.sqlite") else b""
        if any(name in str(path) or name.encode() in inside for name in names):
            found.append(str(path))
    return found


@contextmanager
def writes(storage: Storage, allowed: int) -> Iterator[list[int]]:
    """The process dies at the transaction after so many; yields their count."""
    write, count = storage.database.write, [0]

    @contextmanager
    def counted() -> Iterator[Any]:
        if count[0] == allowed:
            raise KeyboardInterrupt
        count[0] += 1
        with write() as connection:
            yield connection

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.database, "write", counted)
        yield count


def purge_with_crashes(workshop: Workshop) -> int:
    """Runs the open purge again and again, each time one transaction further; returns how often it died."""
    (task,) = workshop.open_tasks()
    for allowed in range(100):
        try:
            with writes(workshop.storage, allowed):
                delete.purge(workshop.storage, task)
        except KeyboardInterrupt:
            continue
        workshop.work()
        return allowed
    raise AssertionError("it never ends")


def test_a_deleted_video_leaves_no_row_no_file_and_no_word(workshop: Workshop) -> None:
    collection, (gone, stays) = workshop.filled([1, 2], words("a tern"))
    text = "only this video has a zeppelin"
    path = f"/collections/{collection}/videos/{gone}"
    workshop.guest.call("PUT", f"{path}/captions", json={"captions": [{"text": text}]})
    workshop.guest.upload(collection, b"\0\0\0\x18ftypmp42" + bytes(2000), headers={"Idempotency-Key": "again"})
    assert workshop.guest.call("DELETE", path).status_code == 204
    assert workshop.guest.call("DELETE", path).status_code == 404
    workshop.work()
    assert tables_naming(workshop.storage, gone) == {"segments", "tasks"}, "its tombstone and its purge"
    delete.sweep(workshop.storage)
    assert files_naming(workshop.storage, text, f"/{gone}") == []
    assert workshop.guest.found(collection) == [stays]


def test_a_purge_that_dies_at_any_transaction_goes_on(workshop: Workshop) -> None:
    collection, videos = workshop.filled(range(3), words("a heron"))
    adapter = workshop.adapter(collection, 1)
    workshop.activate(collection, adapter)
    workshop.video(collection, 4, words("a heron"))
    answer = workshop.guest.post("/collections", {"name": "keyed"}, headers={"Idempotency-Key": "made"}).json()
    workshop.guest.call("DELETE", "/collections/keyed")
    workshop.work()
    key = workshop.id(collection)
    assert workshop.guest.call("DELETE", f"/collections/{collection}").status_code == 204
    assert workshop.guest.call("DELETE", f"/collections/{collection}").status_code == 404
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delete, "VIDEOS", 1)
        patch.setattr(delete, "VECTORS", 2)
        assert purge_with_crashes(workshop) > 5
    names = (key, *videos, adapter, answer["id"])
    assert tables_naming(workshop.storage, *names) == {"tasks"}, "the purges"
    assert files_naming(workshop.storage, f"/{key}", "a heron") == []


def test_an_adapter_that_searches_use_is_not_deleted(workshop: Workshop) -> None:
    collection, _ = workshop.filled([1])
    adapter = workshop.adapter(collection, 1)
    workshop.activate(collection, adapter)
    path = f"/collections/{collection}/adapters/{adapter}"
    refused = workshop.guest.call("DELETE", path)
    assert (refused.status_code, refused.json()["code"]) == (409, "adapter_in_use")
    workshop.activate(collection, None)
    assert workshop.guest.call("DELETE", path, role="write").status_code == 403
    assert workshop.guest.call("DELETE", path).status_code == 204
    assert workshop.guest.call("DELETE", path).status_code == 404
    assert workshop.guest.get(f"/collections/{collection}/adapters").json()["data"] == []
    digest = adapter_digest(workshop, adapter)
    assert purge_with_crashes(workshop) > 1
    assert files_naming(workshop.storage, digest) == []
    assert workshop.states(collection) == {None: "active"}
    with workshop.storage.database.read() as connection:
        assert not erase_rows.orphaned_vector_sets(connection)


def adapter_digest(workshop: Workshop, adapter: str) -> str:
    with workshop.storage.database.read() as connection:
        return str(connection.scalar(select(adapters.c.digest).where(adapters.c.id == adapter)))


def test_the_same_adapter_published_again_before_its_purge_stands(workshop: Workshop) -> None:
    collection, _ = workshop.filled([1])
    adapter = workshop.adapter(collection, 1)
    workshop.guest.call("DELETE", f"/collections/{collection}/adapters/{adapter}")
    assert workshop.adapter(collection, 1) == adapter
    workshop.work()
    assert workshop.activate(collection, adapter)["activated"]
    assert workshop.guest.get(f"/collections/{collection}/adapters/{adapter}/weights").status_code == 200
    workshop.activate(collection, None)
    workshop.guest.call("DELETE", f"/collections/{collection}/adapters/{adapter}")
    workshop.work()
    assert workshop.activate(collection, workshop.adapter(collection, 1))["activated"], "and after it, anew"


def test_a_deleted_tenant_is_gone_at_once_and_altogether(workshop: Workshop, guest: Tenant) -> None:
    other = Workshop(new_tenant(guest.client))
    kept, (video,) = other.filled([1], ["the neighbour's caption"])
    _, videos = workshop.filled(range(2), words("a crane"))
    waiting = workshop.guest.upload(workshop.guest.collection(), b"\0\0\0\x18ftypmp42" + bytes(2000)).json()["video_id"]
    path = f"/admin/tenants/{guest.name}"
    assert guest.call("DELETE", path).status_code == 403
    assert guest.client.delete(path, headers=ROOT).status_code == 204
    refused = guest.get("/collections")
    assert (refused.status_code, refused.json()["code"]) == (401, "invalid_key")
    assert guest.client.delete(path, headers=ROOT).status_code == 404
    again = guest.client.post("/admin/tenants", json={"name": guest.name}, headers=ROOT)
    assert again.status_code == 201, "the name is free"
    assert [task.kind for task in workshop.open_tasks()] == ["purge"], "what waited is cancelled"
    assert purge_with_crashes(workshop) > 3
    assert tables_naming(workshop.storage, workshop.tenant, *videos, waiting) == set()
    assert files_naming(workshop.storage, *videos, waiting, "a crane") == []
    assert other.guest.found(kept) == [video] and tables_naming(workshop.storage, "the neighbour's caption")


def test_deleting_a_collection_cancels_what_runs_on_it(workshop: Workshop) -> None:
    collection, _ = workshop.filled([1])
    tenant = workshop.tenant
    with workshop.storage.database.write() as connection:
        request = {"recipe": {}, "activate": "never"}
        task = task_rows.add_task(connection, tenant, workshop.id(collection), "train_adapter", request)
        task_rows.start_task(connection, tenant, task.id)
    scratch = workshop.storage.settings.scratch / f"train-{task.id}"
    scratch.mkdir()
    (scratch / "dataset.jsonl").write_text("a caption")
    delete.sweep_orphans(workshop.storage)
    assert scratch.exists(), "its training runs, or will go on"
    workshop.guest.call("DELETE", f"/collections/{collection}")
    with workshop.storage.database.read() as connection:
        assert task_rows.task(connection, tenant, task.id).cancel_requested
    workshop.work()
    delete.sweep_orphans(workshop.storage)
    assert not scratch.exists()


def test_retention_keeps_the_last_ones_the_frozen_one_and_what_is_shared(workshop: Workshop) -> None:
    collection, _ = workshop.filled([1], keep_generations=2)
    text = workshop.adapter(collection, 9, "text")
    adapters = [text, *(workshop.adapter(collection, seed) for seed in range(4))]
    for adapter in adapters:
        workshop.activate(collection, adapter)
    before = workshop.generations(collection)
    delete.retain(workshop.storage)
    assert workshop.generations(collection) == before, "searches may still be under way on those that were left just now"
    delete.retain(workshop.storage, settled=0)
    assert workshop.states(collection) == {None: "retired", **dict.fromkeys(adapters[2:4], "retired"), adapters[4]: "active"}  # type: ignore[misc]
    gone = {g.vector_set for g in before} - {g.vector_set for g in workshop.generations(collection)}
    assert len(gone) == 1, "the text one searched the frozen one's"
    assert tables_naming(workshop.storage, *gone) == {"tasks"}, "its vectors went along"
    assert workshop.activate(collection, None)["embedded"] == 0
    assert workshop.activate(collection, text)["embedded"] == 0
    assert workshop.activate(collection, adapters[1])["embedded"] == 1, "built anew"


def test_retention_by_age(workshop: Workshop) -> None:
    collection, _ = workshop.filled([1])
    adapter = workshop.adapter(collection, 1)
    workshop.activate(collection, adapter)
    workshop.activate(collection, None)
    delete.retain(workshop.storage, settled=0)
    assert workshop.states(collection) == {None: "active", adapter: "retired"}
    with workshop.storage.database.write() as connection:
        long_ago = update(generations).values(retired_at="2020-01-01T00:00:00.000000Z")
        connection.execute(long_ago.where(generations.c.adapter_id == adapter))
    delete.retain(workshop.storage)
    assert workshop.states(collection) == {None: "active"}


def test_a_generation_that_is_removed_under_the_hands_of_its_builder_is_made_anew(workshop: Workshop) -> None:
    """Nothing is written for a generation that has no row any more."""
    collection, videos = workshop.filled([1])
    adapter = workshop.adapter(collection, 1)
    generation, _ = activate._round(workshop.storage, workshop.tenant, workshop.id(collection), adapter, None)
    with workshop.storage.database.write() as connection:
        generation_rows.set_generation_state(connection, workshop.tenant, generation.id, "retired")
        assert generation_rows.remove_generation(connection, workshop.tenant, generation.id)
    assert (
        activate.fill_chunk(workshop.storage, workshop.encoder, workshop.decoders, workshop.tenant, generation.id, videos) == []
    )
    assert tables_naming(workshop.storage, generation.id) == set()


def test_the_sweep_finds_files_without_a_row_but_touches_no_young_one(workshop: Workshop) -> None:
    collection, (video,) = workshop.filled([1])
    adapter = workshop.adapter(collection, 1)
    key = workshop.id(collection)
    folder = Path(workshop.storage.settings.blob_root.removeprefix("file://"))
    lost = [
        video_key(key, "vid_lost"), frames_key(key, "vid_lost"), f"thumbnails/{key}/vid_lost/0000.jpg",
        f"adapters/{key}/{'0' * 64}.safetensors", "frames/col_gone/vid_gone.zip",
    ]  # fmt: skip
    for blob in lost:
        workshop.storage.blobs.put(blob, b"lost")
    before = {p: p.stat().st_mtime for p in folder.rglob("*") if p.is_file()}
    assert delete.sweep_orphans(workshop.storage)["files"] == 0, "a file comes before its row"
    long_ago = time.time() - 2 * delete.GRACE
    for path in before:
        os.utime(path, (long_ago, long_ago))
    workshop.storage.blobs.put(young := video_key(key, "vid_young"), b"young")
    assert delete.sweep_orphans(workshop.storage)["files"] == len(lost)
    left = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert left == {str(p.relative_to(folder)) for p in before} - set(lost) | {young}
    assert video_key(key, video) in left and adapter_digest(workshop, adapter) in " ".join(left)
    assert not (folder / "frames" / "col_gone").exists()
    workshop.storage.blobs.delete(young)


def test_the_sweep_purges_what_was_marked_and_forgotten(workshop: Workshop) -> None:
    """A purge that failed, or whose task is lost: the mark alone is enough."""
    collection, (video,) = workshop.filled([1], words("a stork"))
    key = workshop.id(collection)
    with workshop.storage.database.write() as connection:
        video_rows.mark_video_deleted(connection, workshop.tenant, video)
    delete.sweep(workshop.storage)
    assert "videos" in tables_naming(workshop.storage, video), "its own purge may be on its way"
    delete.sweep(workshop.storage, grace=0)
    assert tables_naming(workshop.storage, video) == {"segments"}
    with workshop.storage.database.write() as connection:
        collection_rows.mark_collection_deleted(connection, workshop.tenant, key)
    delete.sweep(workshop.storage, grace=0)
    assert tables_naming(workshop.storage, key) == set()


def test_the_sweep_drops_vectors_whose_generation_is_gone(workshop: Workshop) -> None:
    collection, _ = workshop.filled(range(3))
    adapter = workshop.adapter(collection, 1)
    workshop.activate(collection, adapter)
    workshop.activate(collection, None)
    frozen, generation = workshop.generations(collection)
    with workshop.storage.database.write() as connection:
        assert generation_rows.remove_generation(connection, workshop.tenant, generation.id)  # and here the process dies
        assert not generation_rows.remove_generation(connection, workshop.tenant, frozen.id), "in use"
    assert tables_naming(workshop.storage, generation.id) == {"tasks", "segments"}
    assert delete.sweep_orphans(workshop.storage)["vector_sets"] == 1
    assert tables_naming(workshop.storage, generation.id) == {"tasks"}
    assert len(workshop.held(collection, None)) == 3


def test_other_writers_get_their_turn_while_much_is_deleted(workshop: Workshop) -> None:
    collection, _ = workshop.filled([1])
    tenant = workshop.tenant
    (generation,) = workshop.generations(collection)
    with workshop.storage.database.write() as connection:
        row = {"ordinal": 0, "start": 0.0, "end": 1.0, "pooled": bytes(1024), "frames": bytes(12_288)}
        rows = [{"vector_set": generation.id, "video_id": f"vid_{at}", **row} for at in range(6000)]
        connection.execute(insert(segments), rows)
    key = workshop.id(collection)
    workshop.guest.call("DELETE", f"/collections/{collection}")
    purge = threading.Thread(target=delete.purge_collection, args=[workshop.storage, tenant, key])
    purge.start()
    slowest, turns = 0.0, 0
    while purge.is_alive():
        started = time.monotonic()
        with workshop.storage.database.write() as connection:
            facts.set_fact(connection, "turn", turns)
        slowest, turns = max(slowest, time.monotonic() - started), turns + 1
        time.sleep(0.01)
    purge.join()
    print(f"slowest write {slowest:.3f} s of {turns}")  # noqa: T201
    assert turns > 5 and slowest < 5


def test_tasks_of_what_was_deleted_end_quietly(workshop: Workshop) -> None:
    collection, _ = workshop.filled([1])
    adapter = workshop.adapter(collection, 1)
    answers = [workshop.ask(collection, adapter), workshop.guest.post(f"/admin/collections/{collection}/evaluate")]
    tasks = [workshop.task(answer) for answer in answers]
    workshop.guest.call("DELETE", f"/collections/{collection}")
    assert {workshop.task(answer).status for answer in answers} == {"cancelled"}
    workshop.work()
    for task in tasks:
        runner(workshop).run(workshop.tenant, task.id)  # the engine may still hand them out
    assert workshop.open_tasks() == []


LOCKED_IN_ORDER = ("tenants", "collections", "videos", "tasks")
LOCKS = re.compile(r"UPDATE (\w+)|DELETE FROM (\w+)|SELECT\b.*?\bFROM (\w+).*\bFOR UPDATE", re.DOTALL)


@contextmanager
def locks(storage: Storage) -> Iterator[list[list[str]]]:
    """The tables whose rows each transaction locks, in order. A tenant's name goes last."""
    found: list[list[str]] = []

    def begin(connection: Connection) -> None:
        connection.info["locks"] = []
        found.append(connection.info["locks"])

    def note(connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        match, mine = LOCKS.match(statement), connection.info.get("locks", [])
        if match and (table := match[match.lastindex or 0]) in LOCKED_IN_ORDER and table not in mine:
            mine.append(table)

    engine = storage.database.engine
    event.listen(engine, "begin", begin)
    event.listen(engine, "before_cursor_execute", note)
    yield found
    event.remove(engine, "begin", begin)
    event.remove(engine, "before_cursor_execute", note)


@pytest.mark.postgres  # SQLite locks no rows
def test_every_transaction_locks_rows_in_one_order(workshop: Workshop) -> None:
    """Tenant, collection, video, task: two that take the same locks in another order would wait for each other."""
    guest = workshop.guest
    with locks(workshop.storage) as found:
        collection, (video, _) = workshop.filled([1, 2], ["a word"])
        guest.upload(collection, clip(1), captions=["another word"], headers={"Idempotency-Key": "k"})
        cancelled = guest.upload(collection, clip(3)).json()
        guest.call("POST", f"/tasks/{cancelled['task_id']}/cancel")
        guest.upload(collection, b"\0\0\0\x18ftypmp42" + bytes(2000))
        running = guest.upload(collection, clip(4)).json()
        workshop.work()
        asked = guest.upload(collection, clip(5)).json()
        with workshop.storage.database.write() as connection:
            task_rows.start_task(connection, workshop.tenant, asked["task_id"])
        guest.call("POST", f"/tasks/{asked['task_id']}/cancel")
        workshop.work()
        adapter = workshop.adapter(collection, 1)
        workshop.activate(collection, adapter)
        with workshop.storage.database.write() as connection:
            check_rows.queue_again(connection, workshop.tenant, running["video_id"])
        guest.call("DELETE", f"/collections/{collection}/videos/{video}")
        guest.upload(collection, clip(6))
        workshop.work()
        workshop.activate(collection, None)
        guest.call("DELETE", f"/collections/{collection}/adapters/{adapter}")
        guest.upload(guest.collection("left"), clip(1))
        guest.call("DELETE", f"/collections/{collection}")
        workshop.work()
        guest.client.delete(f"/admin/tenants/{guest.name}", headers=ROOT)
        workshop.work()
        delete.sweep(workshop.storage)
    wrong = [tables for tables in found if tables != sorted(tables, key=LOCKED_IN_ORDER.index)]
    assert wrong == []
    assert ["videos", "tasks"] in found and any("collections" in tables and "tasks" in tables for tables in found)
