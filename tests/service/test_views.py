"""Index views over a real database: whatever happens to snapshots and processes, a search finds what the rows say."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from indexer import index, snapshot
from indexer.index import IndexView, faiss
from service.cli.parts import Parts
from service.search import views
from service.search.views import Views
from service.settings import Settings
from service.storage import collection_rows, generation_rows, segment_rows, tenant_rows
from service.storage.generation_rows import Generation
from service.storage.tables import new_id
from service.upkeep import delete
from service.videos import video_rows


class World:
    """A data folder, the views of one process on it, and what the rows of a collection must give."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.parts = Parts.over(Settings(data=folder, threads=1, **settings))
        self.storage, self.encoder, self.decoders = self.parts.storage, self.parts.encoder, self.parts.decoders
        self.dim = self.encoder.backbone.embed_dim
        with self.storage.database.write() as connection:
            self.tenant = tenant_rows.create_tenant(connection, "acme", {})
        self.vectors: dict[tuple[str, str, int], np.ndarray] = {}  # of live segments, by vector set, video, ordinal
        self.views = Views(self.storage, self.encoder)
        self.home = self.collection("home")

    def collection(self, name: str) -> Generation:
        with self.storage.database.write() as connection:
            collection_rows.create_collection(connection, self.tenant, name, {}, self.encoder.backbone.fingerprint)
            return collection_rows.active_generation(connection, self.tenant.id, name)[1]

    def add(self, generation: Generation, count: int = 1, segments: int = 1, seed: int = 0) -> list[str]:
        rng, added = np.random.default_rng([seed, len(self.vectors)]), []
        with self.storage.database.write() as connection:
            for _ in range(count):
                added.append(video := new_id("vid"))
                video_rows.add_video(connection, self.tenant.id, generation.collection_id, video, "a.mp4", video, 1, {}, [])
                vectors = rng.normal(size=(segments, self.dim))
                vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
                rows = [
                    {"ordinal": i, "start": 1.0 * i, "end": i + 1.0, "pooled": v.tobytes(), "frames": v.tobytes()}
                    for i, v in enumerate(vectors)
                ]
                segment_rows.add_segments(connection, self.tenant.id, video, generation.vector_set, rows)
                self.vectors |= {(generation.vector_set, video, i): v for i, v in enumerate(vectors)}
        return added

    def delete(self, generation: Generation, video: str) -> None:
        with self.storage.database.write() as connection:
            video_rows.mark_video_deleted(connection, self.tenant.id, video)
        self.forget(generation, video)

    def forget(self, generation: Generation, video: str | None = None) -> None:
        gone = [k for k in self.vectors if k[0] == generation.vector_set and video in (None, k[1])]
        for key in gone:
            del self.vectors[key]

    def open(self, generation: Generation | None = None) -> IndexView:
        return self.views.view(self.tenant.id, generation or self.home)

    def check(self, generation: Generation | None = None) -> IndexView:
        """A search finds exactly the live segments, in the order of their cosines."""
        generation = generation or self.home
        view, query = self.open(generation), np.random.default_rng(1).normal(size=self.dim).astype(np.float32)
        live = {key[1:]: vector for key, vector in self.vectors.items() if key[0] == generation.vector_set}
        hits = view.search(query, len(live) + 10)
        assert {(h.segment.video_id, h.segment.ordinal) for h in hits} == set(live)
        assert len(hits) == len(live) == len(view) and view.videos == len({video for video, _ in live})
        for hit in hits:
            cosine = live[hit.segment.video_id, hit.segment.ordinal].astype(np.float32) @ query / np.linalg.norm(query)
            assert hit.score == pytest.approx(float(cosine), abs=0.02 if view.approximate else 1e-3)
        return view

    def settle(self) -> None:
        """Waits until all that is to do beside is done."""
        done = threading.Event()
        self.views.beside(done.set)
        assert done.wait(60)

    def restart(self, clean: bool = True) -> None:
        """Another process: nothing is left but the disk."""
        if clean:
            self.views.close()
        self.views = Views(self.storage, self.encoder)

    def snapshots(self) -> list[Path]:
        return sorted(self.storage.settings.snapshots.glob("*/*.view"))

    def purge(self, generation: Generation, video: str) -> None:
        """What a request to delete the video and its job do."""
        with self.storage.database.write() as connection:
            task = delete.delete_video(connection, self.tenant.id, generation.collection_id, video)
        self.forget(generation, video)
        delete.purge(self.storage, task)

    def files_with(self, *what: bytes) -> set[str]:
        """The data folder's files that hold any of these bytes, by their endings."""
        found = [path for path in self.storage.settings.data.rglob("*") if path.is_file()]
        return {path.suffix for path in found if any(part in path.read_bytes() for part in what)}

    def opened_from_snapshot(self) -> bool:
        """Whether the open view of `home` came from its snapshot: then it has applied fewer rows than it holds."""
        return self.open().changes < len(self.open())


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(views, "WORTH", 20)
    monkeypatch.setattr(views, "TAIL", 16)
    made = World(tmp_path / "data")
    yield made
    made.views.close()
    made.parts.close()


def test_a_view_is_opened_at_first_use_and_follows_the_table(world: World) -> None:
    assert (len(world.views), world.views.bytes) == (0, 0)
    world.check()
    video = world.add(world.home, segments=3)[0]
    assert len(world.check()) == 3
    world.add(world.home, 40)
    world.delete(world.home, video)
    assert len(world.check()) == 40
    assert len(world.views) == 1 and world.views.bytes == world.open().bytes


def test_a_snapshot_and_the_rows_since_are_the_view(world: World) -> None:
    videos = world.add(world.home, 30, segments=2)
    world.check()
    world.settle()
    assert len(world.snapshots()) == 1
    world.add(world.home, 3)
    world.delete(world.home, videos[5])
    world.restart()
    world.check()
    assert world.opened_from_snapshot() and world.open().changes == 4


def test_a_snapshot_is_written_again_when_the_tail_has_grown_and_not_before(world: World) -> None:
    world.add(world.home, 400)
    world.check()
    world.settle()
    first = world.snapshots()[0].stat().st_mtime_ns
    world.add(world.home, 40)  # worth it, but less than an eighth
    world.check()
    world.settle()
    assert world.snapshots()[0].stat().st_mtime_ns == first
    world.add(world.home, 20)
    world.check()
    world.settle()
    assert world.snapshots()[0].stat().st_mtime_ns > first


def codes_of(view: IndexView, video: str) -> list[bytes]:
    """The vectors of a video's segments, as the view's memory holds them."""
    numbers = np.flatnonzero(view._rows["video"][: view._index.ntotal] == view._names.index(video))
    if not view.approximate:
        return [code.tobytes() for code in faiss.vector_to_array(view._index.codes).reshape(-1, 2 * view.dim)[numbers]]
    lists, found = view._index.invlists, []
    for number in range(view._index.nlist):
        size = lists.list_size(number)
        codes = faiss.rev_swig_ptr(lists.get_codes(number), size * view.dim).reshape(size, -1)
        found += [codes[i].tobytes() for i in range(size) if lists.get_single_id(number, i) in numbers]
    return found


@pytest.mark.parametrize("large", [False, True])
def test_no_snapshot_holds_what_was_deleted(world: World, monkeypatch: pytest.MonkeyPatch, large: bool) -> None:
    if large:
        monkeypatch.setattr(index, "LARGE", 40 * world.dim)
    videos = world.add(world.home, 30, segments=2)
    world.check()
    world.settle()
    gone = videos[7]
    secret = [world.vectors[world.home.vector_set, gone, i].tobytes() for i in (0, 1)]
    codes = codes_of(view := world.check(), gone)
    assert view.approximate == large and len(set(codes)) == 2 and (large or codes == secret)
    assert world.files_with(*codes, gone.encode()) >= {".view"}
    world.purge(world.home, gone)
    assert world.files_with(*codes, *secret) == set() and not world.snapshots()
    world.add(world.home, 30)
    assert world.check() is view, "it goes on from memory"
    world.settle()
    assert len(world.snapshots()) == 1
    assert world.files_with(*codes, *secret) == set()
    assert ".view" not in world.files_with(gone.encode())
    world.restart()
    world.check()
    assert world.opened_from_snapshot()


def test_a_view_whose_saving_failed_is_saved_after_a_while(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.add(world.home, 30)
    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "write", lambda *_: 1 / 0)
        world.open()
        world.settle()
    world.open()
    world.settle()
    assert not world.snapshots(), "not with every search"
    monkeypatch.setattr(views, "RETRY_SECONDS", 0.0)
    later = time.monotonic() + 100
    monkeypatch.setattr(time, "monotonic", lambda: later)
    world.open()
    world.settle()
    assert len(world.snapshots()) == 1


@pytest.mark.parametrize("before", ["the file is begun", "it is brought up to date", "the copy", "the sum", "the renaming"])
def test_a_snapshot_that_is_written_during_a_deletion_is_without_it(
    world: World, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """As by another process: the whole job of the deletion comes in between."""
    gone = world.add(world.home, 30)[7]
    secret = world.vectors[world.home.vector_set, gone, 0].tobytes()
    reached: list[str] = []
    place: dict[str, tuple[Any, str]] = {
        "the file is begun": (snapshot, "write"),
        "it is brought up to date": (segment_rows, "searched_sets"),
        "the copy": (IndexView, "dump"),
        "the sum": (hashlib, "sha256"),
        "the renaming": (os, "replace"),
    }
    owner, name = place[before]
    really = getattr(owner, name)

    def deleted_first(*arguments: Any) -> Any:
        if threading.current_thread().name == "views" and not reached:
            reached.append(gone)
            world.purge(world.home, gone)
        return really(*arguments)

    held = threading.Event()
    world.views.beside(lambda: (held.wait(60), None)[1])
    world.open()
    monkeypatch.setattr(owner, name, deleted_first)
    held.set()
    world.settle()
    assert reached and world.files_with(secret) == set()
    assert len(world.snapshots()) == (before == "the file is begun")
    world.restart()
    world.check()


def test_no_snapshot_is_written_of_a_collection_that_is_being_deleted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.add(world.home, 30)
    held, really = threading.Event(), segment_rows.drop_vectors
    world.views.beside(lambda: (held.wait(60), None)[1])
    world.open()
    monkeypatch.setattr(world.views, "_prune", lambda: None)  # as if the process died before

    def written_first(*arguments: Any) -> int:
        held.set()
        world.settle()
        return really(*arguments)

    monkeypatch.setattr(segment_rows, "drop_vectors", written_first)
    with world.storage.database.write() as connection:
        task = delete.delete_collection(connection, world.tenant.id, world.home.collection_id)
    delete.purge(world.storage, task)
    assert held.is_set() and not world.snapshots()


@pytest.mark.parametrize("damage", ["empty", "torn", "flipped", "another's"])
def test_a_damaged_snapshot_is_rebuilt_from_the_rows(world: World, damage: str) -> None:
    world.add(world.home, 50)
    world.check()
    world.settle()
    path = world.snapshots()[0]
    data = bytearray(path.read_bytes())
    if damage == "another's":
        other = world.collection("other")
        world.add(other, 50)
        world.check(other)
        world.settle()
        shutil.copy(next(p for p in world.snapshots() if p != path), path)
    elif damage == "flipped":
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    else:
        path.write_bytes(data[: 0 if damage == "empty" else len(data) // 2])
    world.restart()
    world.check()
    assert not world.opened_from_snapshot()
    world.settle()
    world.restart()
    world.check()
    assert world.opened_from_snapshot(), "it was written anew"


@pytest.mark.parametrize("after", ["nothing", "fewer videos", "other videos", "other videos, one deletion in both", "more"])
def test_a_snapshot_newer_than_a_restored_database_is_not_trusted(world: World, tmp_path: Path, after: str) -> None:
    """After the restore the sequence numbers run again, and other videos get those that the snapshot knows."""
    old = world.add(world.home, 30)
    database = world.storage.database
    with database.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    file = Path(database.url.removeprefix("sqlite:///"))
    shutil.copy(file, tmp_path / "backup")
    kept = dict(world.vectors)
    lost = world.add(world.home, 5, seed=1)
    if "deletion" in after:
        world.delete(world.home, old[3])
    world.check()
    world.settle()
    assert len(world.snapshots()) == 1
    world.views.close()
    database.close()
    for suffix in ("-wal", "-shm"):
        Path(f"{file}{suffix}").unlink(missing_ok=True)
    shutil.copy(tmp_path / "backup", file)
    world.vectors = kept
    count = {"nothing": 0, "fewer videos": 3, "more": 9}.get(after, 5)
    world.add(world.home, count, seed=2)
    if "deletion" in after:
        world.delete(world.home, old[3])
    world.restart()
    hits = world.check().search(np.ones(world.dim, np.float32), 100)
    assert not {hit.segment.video_id for hit in hits} & set(lost)
    assert not world.opened_from_snapshot()


@pytest.mark.parametrize("meanwhile", ["searched", "nothing", "restarted"])
def test_a_vector_set_that_was_dropped_and_filled_anew_is_read_anew(world: World, meanwhile: str) -> None:
    videos = world.add(world.home, 30)
    world.check()
    world.settle()
    again = {key: vector for key, vector in world.vectors.items() if key[1] != videos[-1]}
    with world.storage.database.write() as connection:
        segment_rows.drop_vectors(connection, world.tenant.id, world.home.vector_set)
    world.forget(world.home)
    if meanwhile == "searched":
        world.check()
    world.vectors = again
    with world.storage.database.write() as connection:
        video_rows.mark_video_deleted(connection, world.tenant.id, videos[-1])  # the last row that the view knows
        for (_, video, ordinal), vector in again.items():
            row = {"ordinal": ordinal, "start": 0.0, "end": 1.0, "pooled": vector.tobytes(), "frames": vector.tobytes()}
            segment_rows.add_segments(connection, world.tenant.id, video, world.home.vector_set, [row])
    if meanwhile == "restarted":
        world.restart()
    world.check()
    world.restart()
    world.check()


def test_the_last_video_and_many_more_may_be_deleted(world: World) -> None:
    videos = world.add(world.home, 30)
    world.check()
    for video in reversed(videos[10:]):
        world.delete(world.home, video)
    view = world.open()
    assert world.check() is view, "the tombstones tell it; it was not read anew"


def test_another_tenant_gets_none_of_it(world: World) -> None:
    world.add(world.home, 30)
    world.check()
    world.settle()
    with world.storage.database.write() as connection:
        other = tenant_rows.create_tenant(connection, "borealis", {})
    assert len(world.views.view(other.id, world.home)) == 0
    world.restart()
    assert len(world.views.view(other.id, world.home)) == 0
    world.check()


def test_searches_that_open_a_view_at_once_open_it_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.add(world.home, 200)
    opened, really = [], world.views._open
    monkeypatch.setattr(world.views, "_open", lambda key: (opened.append(key), time.sleep(0.05), really(key))[-1])  # type: ignore[func-returns-value]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: world.open(), range(32)))
    assert len(opened) == 1 and len({id(view) for view in found}) == 1
    world.check()


def test_an_opening_that_fails_fails_for_all_who_wait_and_is_tried_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.add(world.home, 3)

    def broken(_: views.Key) -> None:
        time.sleep(0.1)
        raise OSError("the database is away")

    with monkeypatch.context() as patched, ThreadPoolExecutor(4) as pool:
        patched.setattr(world.views, "_open", broken)
        for future in [pool.submit(world.open) for _ in range(4)]:
            with pytest.raises(OSError):
                future.result(timeout=10)
    world.check()


def test_the_least_recently_used_views_are_evicted_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "WORTH", 20)
    monkeypatch.setattr(views, "SHARE", 100.0)  # nothing is saved but by eviction
    world = World(tmp_path / "data", view_bytes=70_000)
    generations = [world.collection(f"films-{i}") for i in range(6)]
    for i, generation in enumerate(generations):
        world.add(generation, 30 if i else 10)
        world.check(generation)
        world.check(generations[1])
    world.settle()
    each = world.open(generations[1]).bytes
    assert world.views.bytes == sum(opened.view.bytes for opened in world.views._views.values()) <= 70_000
    assert 1 < len(world.views) <= 70_000 // each < 6
    saved = {path.stem for path in world.snapshots()}
    assert generations[2].vector_set in saved, "evicted"
    assert generations[0].vector_set not in saved, "evicted, but too small to be worth it"
    assert generations[1].vector_set not in saved, "used all the time"
    assert generations[5].vector_set not in saved, "used last"
    for generation in generations:
        world.check(generation)
    world.views.close()
    world.parts.close()


def test_snapshots_of_what_no_search_uses_are_removed(world: World) -> None:
    generations = [world.collection(f"films-{i}") for i in range(3)]
    for generation in generations:
        world.add(generation, 30)
        world.check(generation)
    world.settle()
    assert len(world.snapshots()) == 3
    folder = world.snapshots()[0].parent
    (folder / "gen_old.view.0123.part").write_bytes(b"half")
    (folder.parent / "ten_gone").mkdir()
    shutil.copy(world.snapshots()[0], folder.parent / "ten_gone" / "gen_x.view")
    with world.storage.database.write() as connection:
        collection_rows.mark_collection_deleted(connection, world.tenant.id, generations[0].collection_id)
        backbone = world.encoder.backbone.fingerprint
        collection = generations[1].collection_id
        new = generation_rows.add_generation(connection, world.tenant.id, collection, None, backbone, None, "building")
        collection_rows.switch(connection, world.tenant.id, collection, new["id"])
    world.restart()
    world.settle()
    assert [path.stem for path in world.snapshots()] == [generations[2].vector_set]
    assert not (folder.parent / "ten_gone").exists()
    assert (folder / "gen_old.view.0123.part").exists(), "another process may be writing it"


def test_snapshots_keep_to_their_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "WORTH", 20)
    world = World(tmp_path / "data", snapshot_bytes=50_000)
    generations = [world.collection(f"films-{i}") for i in range(8)]
    for generation in generations:
        world.add(generation, 30)
        world.check(generation)
        world.settle()
        assert sum(path.stat().st_size for path in world.snapshots()) <= 50_000
    left = {path.stem for path in world.snapshots()}
    assert 1 < len(left) < 8 and left == {g.vector_set for g in generations[-len(left) :]}
    world.views.close()
    world.parts.close()


def test_without_room_on_disk_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "WORTH", 20)
    world = World(tmp_path / "data", snapshot_bytes=0)
    world.add(world.home, 60)
    world.check()
    world.settle()
    assert not world.snapshots()
    world.views.close()
    world.parts.close()


def test_a_folder_that_cannot_be_written_to_harms_no_search(world: World) -> None:
    world.storage.settings.snapshots.write_bytes(b"in the way")
    world.add(world.home, 60)
    world.check()
    world.settle()
    world.add(world.home, 60)
    world.check()
    world.settle()
    assert world.storage.settings.snapshots.read_bytes() == b"in the way"


def test_a_worn_view_is_rebuilt_beside(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "FEW_DEAD", 10)
    videos = world.add(world.home, 60)
    first = world.check()
    for video in videos[:40]:
        world.delete(world.home, video)
    assert world.open() is first and first.due == "rebuild"
    world.settle()
    assert world.check() is not first
    assert world.open().bytes < first.bytes and world.open().due is None


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_a_search_finds_what_the_rows_say(
    world: World, monkeypatch: pytest.MonkeyPatch, seed: int, large: bool
) -> None:
    """Random histories of uploads, deletions, restarts, kills and damaged snapshots, against a dictionary."""
    monkeypatch.setattr(index, "FEW_DEAD", 8)
    if large:
        monkeypatch.setattr(index, "LARGE", 40 * world.dim)
        monkeypatch.setattr(index, "PROBES", 4)
        monkeypatch.setattr(index, "SPARE", 1.5)  # 41 rows tell less of the range than the thousands of a view that is large
    rng, approximate = np.random.default_rng(seed), False
    happenings = ["add"] * 6 + ["delete"] * 4 + ["look"] * 4 + ["settle", "restart"] * 2 + ["kill", "damage"]
    for happening in rng.choice(happenings, 40):
        match happening:
            case "add":
                world.add(world.home, int(rng.integers(1, 25)), int(rng.integers(1, 4)), seed)
            case "delete" if world.vectors:
                videos = sorted({video for _, video, _ in world.vectors})
                for video in rng.choice(videos, rng.integers(1, 1 + len(videos) // 3 or 2), replace=False).tolist():
                    world.delete(world.home, video)
            case "look":
                approximate |= world.check().approximate
            case "settle":
                world.settle()
            case "restart" | "kill" as end:
                world.restart(clean=end == "restart")
            case "damage":
                for path in world.snapshots():
                    data = bytearray(path.read_bytes())
                    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
                    path.write_bytes(data)
    world.check()
    world.settle()
    world.restart()
    approximate |= world.check().approximate
    assert approximate == large
