"""A full disk, a broken one, a power failure, damaged files, a locked database, a clock that is set: what happens then."""

from __future__ import annotations

import io
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from disks import Power, break_disk, full, small_disk
from PIL import Image
from serving import ROOT, ROOT_KEY, clip, new_tenant, wait_for
from sqlalchemy import event, text, update
from starlette.testclient import TestClient
from workshop import Workshop, runner

from adapters_store import describe, pack, read, write
from backbone import AdapterShape, TowerDims
from service.adapters import adapter_rows, train
from service.adapters.trainer import TrainingFailed
from service.app import create_app
from service.cli.doctor import examine
from service.cli.parts import Parts
from service.errors import line
from service.jobs import task_rows
from service.search import views
from service.search.query import Searcher
from service.settings import Settings
from service.storage import collection_rows, facts
from service.storage.blobs import adapter_key, frames_key, video_key
from service.storage.database import Database
from service.storage.storage import Storage
from service.storage.tables import api_keys, new_id
from service.videos import index, video_rows
from training import checkpoint

HOUR = 3600


@contextmanager
def application(data: Path) -> Iterator[Workshop]:
    settings = Settings(data=data, root_key=ROOT_KEY, threads=1)
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield Workshop(new_tenant(client))


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with small_disk(tmp_path_factory.mktemp("small")) as mounted:
        yield mounted


@pytest.fixture(scope="module")
def cramped(disk: Path) -> Iterator[Workshop]:
    """A tenant of an application whose data folder is on the small disk."""
    with application(disk / "data") as workshop:
        yield workshop


def files(workshop: Workshop) -> set[str]:
    """All files of the data folder but the databases', as paths in it."""
    data = workshop.storage.settings.data
    return {str(path.relative_to(data)) for path in data.rglob("*") if path.is_file() and ".sqlite" not in path.name}


def long_unused(workshop: Workshop) -> None:
    """The next request of each key would note that it was used."""
    with workshop.storage.database.write() as connection:
        connection.execute(update(api_keys).values(last_used_at="2020-01-01T00:00:00.000000Z"))


def checkpoint_journal(storage: Storage, how: str) -> None:
    connection = storage.database.engine.raw_connection()
    assert connection.cursor().execute(f"PRAGMA wal_checkpoint({how})").fetchone()[0] == 0
    connection.close()


def is_refused(answer: Any, status: int, code: str) -> bool:
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    return "Retry-After" in answer.headers


# --- a full disk


def test_an_upload_onto_a_full_disk_is_refused_and_leaves_nothing_behind(cramped: Workshop, disk: Path) -> None:
    collection, videos = cramped.filled([1, 2])
    before = files(cramped)
    long_unused(cramped)
    with full(disk, spare=50_000):
        assert is_refused(cramped.guest.upload(collection, clip(3) + bytes(200_000)), 507, "insufficient_storage")
    with full(disk):
        assert is_refused(cramped.guest.upload(collection, clip(3)), 507, "insufficient_storage")
        assert sorted(cramped.guest.found(collection)) == sorted(videos), "searches go on"
    assert files(cramped) == before
    assert cramped.guest.get(f"/collections/{collection}/videos").json()["page_info"]["total_results"] == 2
    assert not cramped.open_tasks()
    videos.append(cramped.video(collection, 3))
    assert sorted(cramped.guest.found(collection)) == sorted(videos)


def test_what_the_database_has_no_room_for_is_refused(cramped: Workshop, disk: Path) -> None:
    collection, (video,) = cramped.filled([4], captions=["a caption"])
    path = f"/collections/{collection}/videos/{video}"
    checkpoint_journal(cramped.storage, "TRUNCATE")  # no room is left in the journal either
    with full(disk):
        answer = cramped.guest.call("PUT", f"{path}/captions", json={"captions": [{"text": "another"}]})
        assert is_refused(answer, 507, "insufficient_storage")
        assert [caption["text"] for caption in cramped.guest.get(path).json()["captions"]] == ["a caption"]
    assert cramped.guest.call("PUT", f"{path}/captions", json={"captions": [{"text": "another"}]}).status_code == 200


def test_a_video_whose_frames_find_no_room_waits_for_it(cramped: Workshop, disk: Path) -> None:
    collection = cramped.guest.collection()
    answer = cramped.guest.upload(collection, clip(5, seconds=3.0))
    task, before = cramped.task(answer), files(cramped)
    shift, tries = runner(cramped), cramped.storage.settings.job_tries
    with cramped.storage.database.write() as connection:  # the journal keeps its room, the folders have none
        connection.execute(text("create table room as select randomblob(1000000) as bytes"))
        connection.execute(text("drop table room"))
    checkpoint_journal(cramped.storage, "RESTART")
    with full(disk):
        again = shift.run(cramped.tenant, task.id, tries)
        assert again is not None and again["tries"] == tries, "it is tried as long as the disk is full"
        assert cramped.task(answer).status == "queued"
    assert files(cramped) == before, "nothing of it is left half-way"
    assert shift.run(cramped.tenant, task.id, again["tries"]) is None
    assert cramped.guest.found(collection) == [answer.json()["video_id"]]


def test_a_training_whose_checkpoint_finds_no_room_waits_for_it(
    cramped: Workshop, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with full(disk), pytest.raises(OSError) as told:
        checkpoint.write_tensors(disk / "c.safetensors", {"a": torch.ones(100_000)}, {})
    collection = cramped.id(cramped.guest.collection())
    with cramped.storage.database.write() as connection:
        task = task_rows.add_task(connection, cramped.tenant, collection, "train_adapter", {})
    for error, goes_on in ((told.value, True), (OSError("the device is gone"), False)):

        def fails(*_: Any, said: str = str(error)) -> None:
            raise TrainingFailed("io_error", said)  # its process tells it in words

        monkeypatch.setattr(train, "train_adapter", fails)
        again = runner(cramped).run(cramped.tenant, task.id, cramped.storage.settings.job_tries)
        assert (again is not None) == goes_on


def test_an_adapter_that_finds_no_room_is_not_published(cramped: Workshop, disk: Path) -> None:
    collection, _ = cramped.filled([6])
    before = files(cramped)
    for spare in (0, 120_000):  # none; room to receive it, not to store it
        with full(disk, spare), pytest.raises(AssertionError, match="insufficient_storage"):
            cramped.adapter(collection, seed=1)
        assert files(cramped) == before
    assert cramped.guest.get(f"/collections/{collection}/adapters").json()["data"] == []
    assert cramped.adapter(collection, seed=1)


def test_a_snapshot_that_finds_no_room_is_done_without(cramped: Workshop, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "WORTH", 1)
    collection, videos = cramped.filled([7, 8])
    with full(disk), structlog.testing.capture_logs() as logs:
        assert sorted(cramped.guest.found(collection)) == sorted(videos)
        wait_for("the attempt", lambda: any(entry["event"] == "snapshot_not_written" for entry in logs))
        assert sorted(cramped.guest.found(collection, "a blue ball")) == sorted(videos)
    assert not [name for name in files(cramped) if name.startswith("snapshots/")]


# --- a disk that takes no writes any more


def test_searches_go_on_while_the_disk_takes_no_writes(tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        with application(disk / "data") as workshop:
            collection, videos = workshop.filled([9, 10])
            long_unused(workshop)
            break_disk(disk)
            assert is_refused(workshop.guest.upload(collection, clip(11)), 503, "storage_read_only")
            assert is_refused(workshop.guest.post("/collections", {"name": "new"}), 503, "storage_read_only")
            workshop.storage.database.close()  # new connections are no worse than those that were open
            assert sorted(workshop.guest.found(collection)) == sorted(videos)
            assert workshop.guest.get(f"/collections/{collection}/videos").status_code == 200
            settings = workshop.storage.settings
        found = {finding.what: finding for finding in examine(settings)}
        for what in ("data folder", "database", "blobs"):
            assert not found[what].ok and "ead-only file system" in found[what].detail, found[what]
        with pytest.raises(OSError) as told:
            Parts.over(settings)
        assert str(line(told.value)).startswith("Read-only file system: ")


# --- a power failure


def test_what_a_client_was_promised_survives_a_power_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "machine"
    root.mkdir()
    power = Power(root, monkeypatch)
    with application(root / "new" / "data") as workshop:
        collection = workshop.guest.collection()
        gone = workshop.guest.upload(collection, clip(12)).json()["video_id"]
        answer = workshop.guest.upload(collection, clip(13))
        assert answer.status_code == 202
        after_upload = power.fail(tmp_path / "after upload")
        adapter = workshop.adapter(collection, seed=2)
        after_import = power.fail(tmp_path / "after import")
        assert workshop.guest.call("DELETE", f"/collections/{collection}/videos/{gone}").status_code == 204
        after_delete = power.fail(tmp_path / "after delete")
        archive = workshop.guest.call("GET", f"/admin/collections/{collection}/export").content
        path = "/admin/collections/import?collection=copy"
        moved = workshop.guest.call("POST", path, files={"file": ("c.tar", archive)})
        assert moved.status_code == 202, moved.text
        after_archive = power.fail(tmp_path / "after archive")
        collection_id, tenant = workshop.id(collection), workshop.tenant
    video = answer.json()["video_id"]
    with reopened(after_upload / "new" / "data") as parts:
        assert parts.storage.blobs.get(video_key(collection_id, video)) == clip(13)
        runner(parts).run(tenant, answer.json()["task_id"])
        with parts.storage.database.read() as connection:
            assert video_rows.video(connection, tenant, video).status == "ready"
            assert video_rows.video(connection, tenant, gone)
    with reopened(after_import / "new" / "data") as parts, parts.storage.database.read() as connection:
        version = adapter_rows.adapter(connection, tenant, collection_id, adapter)
        assert describe(parts.storage.blobs.get(adapter_key(collection_id, version.digest))).digest == version.digest
    with reopened(after_delete / "new" / "data") as parts, parts.storage.database.read() as connection:
        assert list(video_rows.videos_by_id(connection, tenant, [gone, video])) == [video]
    with reopened(after_archive / "new" / "data") as parts:
        runner(parts).run(tenant, moved.json()["task_id"])
        with parts.storage.database.read() as connection:
            copied = collection_rows.collection_named(connection, tenant, "copy")
            assert sum(collection_rows.counts(connection, tenant, copied.id).values()) == 1


@contextmanager
def reopened(data: Path) -> Iterator[Parts]:
    parts = Parts.over(Settings(data=data, threads=1))
    try:
        yield parts
    finally:
        parts.close()


def test_a_trained_adapter_and_a_checkpoint_survive_a_power_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "machine"
    root.mkdir()
    power = Power(root, monkeypatch)
    shape = AdapterShape(TowerDims(32, 2, 16, 2), rank=2, shared=0)
    data = pack(shape, "a backbone", shape.initial(0))
    write(root / "out" / "run", data, describe(data))
    tensors = {"a": torch.ones(3)}
    optimiser = torch.optim.Adam([torch.nn.Parameter(torch.ones(3))])
    for step in (1, 2):
        checkpoint.save(root / "out" / "run" / "c.safetensors", "run", checkpoint.State(step), tensors, optimiser)
    left = power.fail(tmp_path / "left") / "out" / "run"
    assert read(left)[0] == data
    restored = checkpoint.restore(left / "c.safetensors", "run", tensors, optimiser)
    assert restored is not None and restored.step == 2


# --- damaged files


def test_a_damaged_adapter_is_told_and_stops_nobody_else(workshop: Workshop) -> None:
    guest, blobs = workshop.guest, workshop.storage.blobs
    collection, videos = workshop.filled([20, 21])
    other, theirs = workshop.filled([22])
    workshop.activate(collection, workshop.adapter(collection, seed=20, scope="text"))
    workshop.encoder.__dict__.pop("_residency").close()  # as after a restart: nothing has loaded it yet
    (active,) = [g for g in workshop.generations(collection) if g.state == "active"]
    key = adapter_key(active.collection_id, str(active.digest))
    whole, failures = blobs.get(key), workshop.encoder.residency.counters.failures
    blobs.put(key, whole[:-5] + b"wrong")
    with structlog.testing.capture_logs() as logs:
        answer = guest.post("/search", {"collection": collection, "text": "a ball"})
        assert is_refused(answer, 503, "adapter_damaged") and str(active.digest)[:12] in answer.json()["detail"]
    assert any(entry["event"] == "adapter_damaged" and str(active.digest)[:12] in entry["reason"] for entry in logs)
    assert guest.found(other, "a ball") == theirs
    blobs.delete(key)
    assert is_refused(guest.post("/search", {"collection": collection, "text": "a ball"}), 503, "adapter_damaged")
    assert workshop.encoder.residency.counters.failures == failures + 2, "it is looked at once for each search"
    blobs.put(key, whole)
    assert sorted(guest.found(collection, "a ball")) == sorted(videos)


def torn(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def small(data: bytes) -> bytes:
    """As cached for a backbone of smaller pictures: the built-in one takes 64 pixels."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(out, "w") as after:
        for name in before.namelist():
            file = io.BytesIO(before.read(name))
            if name.endswith(".jpg"):
                picture = Image.open(file).resize((48, 32))
                file = io.BytesIO()
                picture.save(file, "JPEG")
            after.writestr(name, file.getvalue())
    return out.getvalue()


@pytest.mark.parametrize("damage", [torn, flipped, small, None])
def test_cached_frames_that_are_damaged_too_small_or_gone_are_made_again(
    workshop: Workshop, damage: Callable[[bytes], bytes] | None
) -> None:
    collection, (video,) = workshop.filled([23])
    (generation,) = workshop.generations(collection)
    blobs, key = workshop.storage.blobs, frames_key(generation.collection_id, video)
    whole = blobs.get(key)
    with workshop.storage.database.read() as connection:
        record = video_rows.video(connection, workshop.tenant, video)
    vectors = index.embedded_segments(workshop.storage, workshop.encoder, workshop.decoders, record, generation)
    if damage is None:
        blobs.delete(key)
    else:
        blobs.put(key, damage(whole))
    assert index.embedded_segments(workshop.storage, workshop.encoder, workshop.decoders, record, generation) == vectors
    assert blobs.get(key) == whole


def test_a_video_without_frames_and_file_fails_and_the_others_move_on(workshop: Workshop) -> None:
    collection, (lost, other) = workshop.filled([24, 25])
    adapter, blobs, home = workshop.adapter(collection, seed=24), workshop.storage.blobs, workshop.id(collection)
    blobs.delete(frames_key(home, lost))
    blobs.delete(video_key(home, lost))
    assert workshop.activate(collection, adapter)["activated"]
    assert workshop.guest.found(collection) == [other]
    assert workshop.guest.video(collection, lost)["error"]["code"] == "frames_damaged"


def test_a_damaged_snapshot_is_not_believed(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "WORTH", 1)
    collection, _ = workshop.filled([26, 27, 28])
    snapshots = workshop.storage.settings.snapshots / workshop.tenant
    hits = workshop.guest.search(collection)["data"]
    (snapshot,) = wait_for("the snapshot", lambda: list(snapshots.glob("*.view")))
    snapshot.write_bytes(flipped(snapshot.read_bytes()))
    searcher = Searcher(workshop.storage, workshop.encoder)
    with structlog.testing.capture_logs() as logs:
        found = searcher.search(workshop.tenant, collection, "a red ball", wanted=10)
    searcher.close()
    assert [(hit.video.id, round(hit.score, 6)) for hit in found.hits] == [(hit["video_id"], hit["score"]) for hit in hits]
    assert any(entry["event"] == "snapshot_not_trusted" for entry in logs)


# --- a locked database

LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def locked(storage: Storage) -> Iterator[None]:
    """Another process holds the database's write lock."""
    command = [sys.executable, "-c", LOCK, str(storage.database.engine.url.database)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"locked\n"
        yield
        process.stdin.close()


def test_writes_wait_ten_seconds_for_a_locked_database_and_searches_do_not(workshop: Workshop) -> None:
    collection, videos = workshop.filled([30])
    with ThreadPoolExecutor(1) as pool:
        with locked(workshop.storage):
            began = time.monotonic()
            waiting = pool.submit(workshop.guest.upload, collection, clip(31))
            longest = 0.0
            while time.monotonic() - began < 10:
                long_ago, asked = began, time.monotonic()
                assert workshop.guest.found(collection, f"{long_ago} {asked}") == videos
                longest = max(longest, time.monotonic() - asked)
                time.sleep(0.1)
            assert not waiting.done() and longest < 2
        assert waiting.result().status_code == 202


def test_a_search_does_not_wait_to_note_that_its_key_was_used(workshop: Workshop) -> None:
    collection, videos = workshop.filled([32])
    long_unused(workshop)
    with locked(workshop.storage):
        began = time.monotonic()
        assert workshop.guest.found(collection) == videos
        assert time.monotonic() - began < 5
    assert workshop.guest.found(collection) == videos
    with workshop.storage.database.read() as connection:
        assert max(connection.scalars(text("select last_used_at from api_keys"))) > "2021", "it is noted when there is room"


def test_a_database_that_stays_locked_is_told(workshop: Workshop) -> None:
    engine = workshop.storage.database.engine

    def impatient(connection: Any, *_: Any) -> None:
        connection.execute("PRAGMA busy_timeout=100")

    event.listen(engine, "checkout", impatient)
    try:
        with locked(workshop.storage):
            assert is_refused(workshop.guest.post("/collections", {"name": "patience"}), 503, "database_busy")
        assert workshop.guest.post("/collections", {"name": "patience"}).status_code == 201
    finally:
        event.remove(engine, "checkout", impatient)
        engine.dispose()


def test_the_journal_shrinks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.storage.database.JOURNAL_BYTES", 100_000)
    database, journal = Database(f"sqlite:///{tmp_path / 'd.sqlite'}"), tmp_path / "d.sqlite-wal"
    with database.write() as connection:
        connection.execute(text("create table t (x)"))
    reader = database.engine.connect()
    reader.execute(text("select * from t")).all()
    for _ in range(3):
        with database.write() as connection:
            connection.execute(text("insert into t values (randomblob(3000000))"))
    assert journal.stat().st_size > 9_000_000, "a reader keeps all of it"
    reader.close()
    for _ in range(2):
        with database.write() as connection:
            connection.execute(text("insert into t values (randomblob(1))"))
    assert journal.stat().st_size < 200_000
    database.close()


# --- a clock that is set


class Clock:
    """The time of day as the service sees it, `seconds` from the true one; what counts monotonically goes on as before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        true = time.time

        class Told(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
                return datetime.fromtimestamp(true() + self.seconds, tz)

        monkeypatch.setattr(time, "time", lambda: true() + self.seconds)
        monkeypatch.setattr(time, "time_ns", lambda: int((true() + self.seconds) * 1e9))
        for name, module in list(sys.modules.items()):
            if name.startswith("service.") and getattr(module, "datetime", None) is datetime:
                monkeypatch.setattr(module, "datetime", Told)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_ids_rise_whatever_the_clock_says(clock: Clock) -> None:
    ids = [new_id("vid") for _ in range(1000)]
    clock.seconds = -HOUR
    ids += [new_id("vid") for _ in range(1000)]
    assert ids == sorted(set(ids))


def test_lists_keep_their_order_and_pages_when_the_clock_is_set_back(workshop: Workshop, clock: Clock) -> None:
    collection, (first, second) = workshop.filled([40, 41])
    path = f"/collections/{collection}/videos"
    page = workshop.guest.get(path, page_limit=1).json()
    clock.seconds = -HOUR
    third = workshop.video(collection, 42)
    assert [video["video_id"] for video in workshop.guest.get(path).json()["data"]] == [third, second, first]
    after = workshop.guest.get(path, page_token=page["page_info"]["next_page_token"]).json()
    assert [video["video_id"] for video in after["data"]] == [first]


@pytest.mark.parametrize("seconds", [-HOUR, HOUR])
def test_no_task_ends_before_it_began(workshop: Workshop, clock: Clock, seconds: int) -> None:
    collection = workshop.guest.collection()
    answer = workshop.guest.upload(collection, clip(43))
    index.prepare_frames(workshop.storage, workshop.encoder, workshop.decoders, workshop.tenant, answer.json()["video_id"])
    clock.seconds = seconds
    workshop.done(answer)
    task = workshop.task(answer)
    assert task.created_at <= str(task.started_at) <= str(task.finished_at)


def test_media_urls_follow_the_clock(workshop: Workshop, clock: Clock) -> None:
    collection, _ = workshop.filled([44])
    client = workshop.guest.client
    url = workshop.guest.search(collection)["data"][0]["video_url"]
    clock.seconds = -HOUR
    assert client.get(url).status_code == 200
    assert client.get(workshop.guest.search(collection)["data"][0]["video_url"]).status_code == 200
    clock.seconds = HOUR + 10
    assert client.get(url).json()["code"] == "invalid_signature"
    assert client.get(workshop.guest.search(collection)["data"][0]["video_url"]).status_code == 200


def test_keys_follow_the_clock(workshop: Workshop, clock: Clock) -> None:
    guest, expires = workshop.guest, (datetime.now(UTC) + timedelta(seconds=HOUR / 2)).isoformat()
    path, body = f"/admin/tenants/{guest.name}/keys", {"role": "search", "expires_at": expires}
    key = guest.client.post(path, json=body, headers=ROOT).json()["key"]

    def status() -> int:
        return int(guest.client.get("/collections", headers={"X-API-Key": key}).status_code)

    def noted() -> str:
        with workshop.storage.database.read() as connection:
            query = "select last_used_at from api_keys where expires_at is not null and tenant_id = :tenant"
            return str(connection.execute(text(query), {"tenant": workshop.tenant}).scalar())

    assert status() == 200
    before = noted()
    clock.seconds = -HOUR
    assert status() == 200 and noted() < before, "a last use in the future does not stay"
    clock.seconds = HOUR
    assert status() == 401


def test_only_a_sign_of_life_of_now_is_one(workshop: Workshop, clock: Clock) -> None:
    def worker() -> bool:
        return bool(workshop.guest.client.get("/readyz").json()["checks"]["worker"])

    def beat(name: str) -> None:
        with workshop.storage.database.write() as connection:
            facts.worker_seen(connection, name)

    beat("one that dies")
    assert worker()
    clock.seconds = -HOUR
    assert not worker(), "a sign from the future is none"
    beat("another")
    assert worker(), "and does not hide the others'"
    clock.seconds = HOUR
    assert not worker()
    beat("another")
    assert worker()


def test_an_activation_after_the_clock_was_set_back_counts(workshop: Workshop, clock: Clock) -> None:
    collection, _ = workshop.filled([45])
    first, second = (workshop.adapter(collection, seed, scope="text") for seed in (45, 46))
    assert workshop.activate(collection, first)["activated"]
    clock.seconds = -HOUR
    assert workshop.activate(collection, second)["activated"]
    assert workshop.states(collection)[second] == "active"
