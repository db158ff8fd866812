"""Tasks and the engine under them: tried again or not, put back, cancelled, told about; shared by tenants and workers."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import obstore
import pytest
import torch
from dbos import DBOS
from serving import ROOT_KEY, clip, new_tenant, wait_for
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient
from workshop import Workshop, runner

from adapters_store import LeaseTimeout
from backbone import BackboneNotFound
from indexer.frames import DamagedFrames
from service.adapters import activate
from service.adapters.train import TooFewCaptions
from service.adapters.trainer import TrainingFailed
from service.app import create_app
from service.cli.worker import KINDS, make
from service.http import tasks as routes
from service.jobs import queue, run, task_rows
from service.jobs.queue import Jobs, rescue, sweep
from service.jobs.run import Report, Runner
from service.jobs.supervisor import environment
from service.jobs.task_rows import Task
from service.jobs.worker import Worker
from service.settings import Settings
from service.storage import collection_rows, facts
from service.storage.blobs import BlobMissing
from service.storage.rows import NotFound
from service.storage.storage import Storage
from service.storage.tables import OPEN
from service.videos import video_rows
from training.progress import Progress

Job = Callable[[Runner, Task, Report], Any]


@pytest.fixture
def does(monkeypatch: pytest.MonkeyPatch) -> Callable[[Job], None]:
    """Makes `evaluate` and `index_video` a job of the test's own."""

    def make(job: Job) -> None:
        for kind in ("evaluate", "index_video"):
            stand_in = replace(KINDS.by_name[kind], run=lambda parts, *rest: job(*rest))
            monkeypatch.setitem(KINDS.by_name, kind, stand_in)

    return make


def raises(error: Exception) -> Job:
    def job(*_: Any) -> Any:
        raise error

    return job


def asked(workshop: Workshop, kind: str = "evaluate") -> Task:
    """A new task, of which nothing has run."""
    collection = workshop.guest.collection()
    if kind == "index_video":
        return workshop.task(workshop.guest.upload(collection, clip(700)))
    with workshop.storage.database.write() as connection:
        return task_rows.add_task(connection, workshop.tenant, workshop.id(collection), kind, {"split": "all"})


def state(workshop: Workshop, task: Task) -> Task:
    with workshop.storage.database.read() as connection:
        return task_rows.task(connection, workshop.tenant, task.id)


def video_of(workshop: Workshop, task: Task) -> video_rows.Video:
    with workshop.storage.database.read() as connection:
        return video_rows.video(connection, workshop.tenant, task.request["video_id"])


def started(workshop: Workshop, task: Task, times: int = 1) -> None:
    """As the death of a worker leaves it."""
    with workshop.storage.database.write() as connection:
        task_rows.start_task(connection, workshop.tenant, task.id, attempts=times)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("gone"),
        OSError(28, "No space left on device"),
        OperationalError("select 1", {}, Exception("database is locked")),
        obstore.exceptions.GenericError("timeout"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        LeaseTimeout("no slot"),
        TrainingFailed("in_use", "another run trains there"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_may_pass_is_tried_again_later(workshop: Workshop, does: Any, error: Exception) -> None:
    does(raises(error))
    task = asked(workshop)
    again = runner(workshop).run(workshop.tenant, task.id, tries=2)
    assert again is not None and again["tries"] == 3 and 7 <= again["seconds"] <= 23
    now = state(workshop, task)
    assert (now.status, now.attempts, now.error) == ("queued", 0, None) and "tried again" in now.message


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotFound("collection", "x"), "not_found"),
        (TooFewCaptions("2"), "too_few_captions"),
        (BlobMissing("videos/x"), "file_missing"),
        (DamagedFrames("no zip"), "frames_damaged"),
        (BackboneNotFound("no such file"), "backbone_not_found"),
        (FileNotFoundError(2, "no such file"), "worker_failed"),
        (obstore.exceptions.PermissionDeniedError("denied"), "worker_failed"),
        (TrainingFailed("training_out_of_memory", "killed"), "training_out_of_memory"),
        (KeyError("a fault of ours"), "internal"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_will_not_pass_fails_at_once(workshop: Workshop, does: Any, error: Exception, code: str) -> None:
    does(raises(error))
    task = asked(workshop)
    assert runner(workshop).run(workshop.tenant, task.id) is None
    now = state(workshop, task)
    assert (now.status, (now.error or {})["code"]) == ("failed", code)


def test_the_last_try_fails_the_task_and_its_video_with_the_reason(workshop: Workshop, does: Any) -> None:
    does(raises(ConnectionResetError("the store is gone")))
    task = asked(workshop, "index_video")
    most = workshop.storage.settings.job_tries
    assert runner(workshop).run(workshop.tenant, task.id, tries=most - 1) is not None
    assert runner(workshop).run(workshop.tenant, task.id, tries=most) is None
    error = state(workshop, task).error or {}
    assert error["code"] == "worker_failed" and "the store is gone" in error["detail"] and f"{most} times" in error["detail"]
    assert (video_of(workshop, task).status, video_of(workshop, task).error) == ("failed", error)


def test_a_start_that_got_further_than_all_before_has_all_its_tries_again(workshop: Workshop, does: Any) -> None:
    def job(shift: Runner, task: Task, report: Report) -> None:
        report._last = 0.0
        report(Progress("on", 7, 10))
        raise ConnectionResetError

    does(job)
    task = asked(workshop)
    most = workshop.storage.settings.job_tries
    assert (runner(workshop).run(workshop.tenant, task.id, tries=most) or {})["tries"] == 2
    assert runner(workshop).run(workshop.tenant, task.id, tries=most) is None, "not further than before"


def test_a_task_that_kills_its_worker_again_and_again_fails(workshop: Workshop) -> None:
    task = asked(workshop, "index_video")
    started(workshop, task, times=3)
    runner(workshop).run(workshop.tenant, task.id)
    now = state(workshop, task)
    assert (now.status, (now.error or {})["code"]) == ("failed", "job_killed_worker")
    assert video_of(workshop, task).status == "failed"
    other = asked(workshop, "index_video")
    started(workshop, other, times=2)
    runner(workshop).run(workshop.tenant, other.id)
    assert state(workshop, other).status == "succeeded"


def test_progress_clears_of_suspicion_and_never_falls(workshop: Workshop, does: Any) -> None:
    seen = []

    def job(shift: Runner, task: Task, report: Report) -> dict[str, Any]:
        for share in (0.5, 0.2):
            report._last = 0.0
            report(Progress(f"at {share}", share, 1))
            seen.append((state(workshop, task).progress, state(workshop, task).attempts))
        return {}

    does(job)
    task = asked(workshop)
    started(workshop, task, times=2)
    runner(workshop).run(workshop.tenant, task.id)
    assert seen == [(0.5, 1), (0.5, 1)]


def test_of_tasks_that_ran_when_their_worker_died_one_is_started_at_a_time(workshop: Workshop, does: Any) -> None:
    at_once: list[int] = []
    shift = runner(workshop)

    def job(*_: Any) -> dict[str, Any]:
        at_once.append(len(shift.running))
        time.sleep(0.1)
        return {}

    does(job)
    tasks = [asked(workshop) for _ in range(3)]
    for task in tasks:
        started(workshop, task)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda task: shift.run(workshop.tenant, task.id), tasks))
    assert at_once == [1, 1, 1]


def test_a_suspect_that_has_run_for_a_while_holds_up_no_other(
    workshop: Workshop, does: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "PROBATION", 0.2)
    both = threading.Barrier(2, timeout=20)

    def job(*_: Any) -> dict[str, Any]:
        both.wait()
        return {}

    does(job)
    tasks = [asked(workshop) for _ in range(2)]
    for task in tasks:
        started(workshop, task)
    shift = runner(workshop)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda task: shift.run(workshop.tenant, task.id), tasks))
    assert [state(workshop, task).status for task in tasks] == ["succeeded"] * 2


def test_a_worker_that_stops_puts_its_tasks_back_as_if_they_had_not_been_started(workshop: Workshop, does: Any) -> None:
    reached, cleaned = threading.Event(), []

    def job(shift: Runner, task: Task, report: Report) -> dict[str, Any]:
        try:
            while True:
                reached.set()
                report(Progress("on", 1, 10))
                time.sleep(0.01)
        finally:
            cleaned.append(task.id)

    does(job)
    task, later = asked(workshop), asked(workshop)
    shift = runner(workshop)
    threading.Thread(target=shift.run, args=(workshop.tenant, task.id), daemon=True).start()
    assert reached.wait(10) and not shift.at_rest()
    shift.stop()
    threading.Thread(target=shift.run, args=(workshop.tenant, later.id), daemon=True).start()
    wait_for("rest", shift.at_rest)
    assert (state(workshop, task).status, state(workshop, task).attempts) == ("queued", 0)
    assert state(workshop, later).status == "queued", "nothing new is started"
    assert cleaned == [], "a clean-up would take away what the next start goes on from"


def test_a_waiting_upload_is_cancelled_at_once_and_may_come_again(workshop: Workshop) -> None:
    task = asked(workshop, "index_video")
    answer = workshop.guest.post(f"/tasks/{task.id}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    assert (video_of(workshop, task).status, (video_of(workshop, task).error or {})["code"]) == ("failed", "cancelled")
    runner(workshop).run(workshop.tenant, task.id)  # the engine still hands it out
    assert video_of(workshop, task).status == "failed"
    with workshop.storage.database.read() as connection:
        collection = collection_rows.collection_name(connection, workshop.tenant, str(task.collection_id))
    assert workshop.guest.upload(collection, clip(700)).json()["duplicate_of"] is None


def test_a_running_upload_is_cancelled_at_its_next_report(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "REPORT_SECONDS", 0.0)
    task = asked(workshop, "index_video")
    decode = workshop.decoders.decode

    def cancel_meanwhile(*arguments: Any) -> Any:
        assert workshop.guest.post(f"/tasks/{task.id}/cancel").json()["status"] == "running"
        return decode(*arguments)

    monkeypatch.setattr(workshop.decoders, "decode", cancel_meanwhile)
    runner(workshop).run(workshop.tenant, task.id)
    assert state(workshop, task).status == "cancelled"
    assert (video_of(workshop, task).error or {})["code"] == "cancelled"


@pytest.mark.parametrize("way", ["cancelled", "deleted"])
def test_the_decoder_is_ended_when_the_task_is_cancelled_or_the_video_deleted(workshop: Workshop, way: str) -> None:
    collection = workshop.guest.collection(segment_seconds=1.0)
    answer = workshop.guest.upload(collection, clip(990, seconds=60, size=(1280, 720)))  # some seconds of work
    task = workshop.task(answer)
    shift = threading.Thread(target=runner(workshop).run, args=(workshop.tenant, task.id))
    shift.start()
    wait_for("decoding", lambda: any(workshop.storage.settings.scratch.glob("decode-*/*.jpg")))
    if way == "cancelled":
        assert workshop.guest.post(f"/tasks/{task.id}/cancel").json()["status"] == "running"
    else:
        workshop.guest.call("DELETE", f"/collections/{collection}/videos/{answer.json()['video_id']}")
    shift.join(60)
    assert state(workshop, task).status == "cancelled"
    assert state(workshop, task).progress < 0.5, "the decoding was not waited for"
    assert not any(workshop.storage.settings.scratch.glob("decode-*"))


def test_a_task_cancelled_while_its_worker_was_dead_does_not_run(workshop: Workshop, does: Any) -> None:
    does(raises(AssertionError("it ran")))
    task = asked(workshop)
    started(workshop, task)
    assert workshop.guest.post(f"/tasks/{task.id}/cancel").json()["status"] == "running"
    runner(workshop).run(workshop.tenant, task.id)
    assert state(workshop, task).status == "cancelled"


def test_a_purge_is_not_cancelled(workshop: Workshop) -> None:
    task = asked(workshop, "purge")
    answer = workshop.guest.post(f"/tasks/{task.id}/cancel")
    assert (answer.status_code, answer.json()["code"]) == (409, "task_not_cancellable")
    with workshop.storage.database.write() as connection:
        task_rows.end_task(connection, workshop.tenant, task.id, "failed")


def test_a_task_tells_what_is_left_at_the_pace_so_far(workshop: Workshop) -> None:
    task = asked(workshop)
    assert routes.show(task, None)["eta_seconds"] is None
    started(workshop, task)
    with workshop.storage.database.write() as connection:
        started_at = "2020-01-01T00:00:00.000000Z"
        task_rows.set_task(connection, workshop.tenant, task.id, progress=0.5, started_at=started_at)
    eta = workshop.guest.get(f"/tasks/{task.id}").json()["eta_seconds"]
    assert eta == pytest.approx(time.time() - 1577836800, abs=60)
    started(workshop, task)
    assert state(workshop, task).started_at == started_at, "a second start does not make it look fast"


def events(body: str) -> list[tuple[int, dict[str, Any]]]:
    blocks = [dict(line.split(": ", 1) for line in block.split("\n")) for block in body.split("\n\n") if "data: " in block]
    return [(int(block["id"]), json.loads(block["data"])) for block in blocks]


def test_events_are_resumed_where_the_client_left_off(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(routes, "QUIET_SECONDS", 0.1)
    task, looks, sent = asked(workshop), [], []
    path = f"/tasks/{task.id}/events"
    look, send = routes._task, routes._show
    monkeypatch.setattr(routes, "_task", lambda *of: looks.append(time.monotonic()) or look(*of))  # type: ignore[func-returns-value]
    monkeypatch.setattr(routes, "_show", lambda house, of: sent.append(of.revision) or send(house, of))  # type: ignore[func-returns-value]
    with ThreadPoolExecutor(2) as pool:
        fresh = pool.submit(workshop.guest.call, "GET", path)
        wait_for("two looks after a quiet time", lambda: len([at for at in looks[1:] if at > looks[1] + 0.1]) > 1)
        started(workshop, task)
        wait_for("the start", lambda: sent == [0, 1])
        back, before = pool.submit(workshop.guest.call, "GET", path, headers={"Last-Event-ID": "1"}), len(looks)
        wait_for("the second stream", lambda: len(looks) > before + 4)
        with workshop.storage.database.write() as connection:
            task_rows.set_task(connection, workshop.tenant, task.id, progress=0.5)
        wait_for("the progress in both", lambda: sent == [0, 1, 2, 2])
        with workshop.storage.database.write() as connection:
            task_rows.end_task(connection, workshop.tenant, task.id, "succeeded", result={"a": 1})
        told, newer = events(fresh.result().text), events(back.result().text)
    assert [number for number, _ in told] == [0, 1, 2, 3]
    assert [shown["status"] for _, shown in told] == ["queued", "running", "running", "succeeded"]
    assert newer == told[2:], "nothing twice"
    assert ": still here" in fresh.result().text
    late = workshop.guest.call("GET", path, headers={"Last-Event-ID": "2"})
    assert events(late.text) == told[3:]
    assert workshop.guest.call("GET", path, headers={"Last-Event-ID": "3"}).status_code == 204
    assert events(workshop.guest.call("GET", path, headers={"Last-Event-ID": "x"}).text) == told[3:]


def test_a_stream_of_events_ends_when_the_server_drains(workshop: Workshop) -> None:
    task = asked(workshop)
    draining = workshop.guest.client.app.state.draining
    draining.set()
    try:
        assert len(events(workshop.guest.get(f"/tasks/{task.id}/events").text)) == 1
    finally:
        draining.clear()


def test_old_tasks_are_forgotten_and_open_ones_are_not(workshop: Workshop) -> None:
    ended, waiting = asked(workshop), asked(workshop)
    with workshop.storage.database.write() as connection:
        task_rows.end_task(connection, workshop.tenant, ended.id, "succeeded")
        task_rows.forget_tasks(connection, ended.created_at)
        assert task_rows.task(connection, workshop.tenant, ended.id)
        task_rows.forget_tasks(connection, "9999")
        assert task_rows.task(connection, workshop.tenant, waiting.id)
        with pytest.raises(NotFound):
            task_rows.task(connection, workshop.tenant, ended.id)


# --- the engine itself: a worker in this process, on SQLite and on PostgreSQL


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Worker, Any]]:
    """A worker, and the client of an application on the same data."""
    url = None if request.param == "sqlite" else request.getfixturevalue("postgres")
    data = tmp_path_factory.mktemp("house") / "data"
    settings = Settings(data=data, database_url=url, root_key=ROOT_KEY, threads=1, worker_id="here")
    with TestClient(create_app(settings)) as client:
        worker = make(settings, list(queue.QUEUES), "here")
        worker.launch()
        yield worker, client
        DBOS.destroy(destroy_registry=True)
        worker.jobs.close()
        worker.runner.parts.close()


@pytest.fixture
def shop(house: tuple[Worker, Any]) -> Workshop:
    return Workshop(new_tenant(house[1]))


@pytest.fixture
def engine(house: tuple[Worker, Any]) -> Jobs:
    return house[0].jobs


def ended(shop: Workshop, task: Task, seconds: float = 120.0) -> Task:
    return wait_for("its end", lambda: (now := state(shop, task)).status not in OPEN and now, seconds)  # type: ignore[no-any-return]


def flows(engine: Jobs, task: Task) -> list[tuple[str, str]]:
    return [(flow.workflow_id.removeprefix(task.id), flow.status) for flow in engine._list(workflow_id_prefix=task.id)]


def test_a_task_is_run_once_though_it_is_enqueued_twice(shop: Workshop, engine: Jobs, does: Any) -> None:
    runs: list[str] = []
    does(lambda shift, task, report: runs.append(task.id) or {})  # type: ignore[func-returns-value]
    task = asked(shop)
    for _ in range(2):
        engine.enqueue(task)
    assert ended(shop, task).status == "succeeded"
    wait_for("the engine", lambda: flows(engine, task) == [("", "SUCCESS")])
    assert runs == [task.id]


def test_the_next_try_is_a_workflow_of_its_own(
    shop: Workshop, engine: Jobs, does: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "FIRST_WAIT", 0.1)
    runs: list[float] = []

    def job(*_: Any) -> dict[str, Any]:
        runs.append(time.monotonic())
        if len(runs) < 3:
            raise ConnectionResetError
        return {}

    does(job)
    task = asked(shop)
    engine.enqueue(task)
    assert ended(shop, task).status == "succeeded"
    wait_for("the engine", lambda: flows(engine, task) == [("", "SUCCESS"), (":1", "SUCCESS"), (":2", "SUCCESS")])
    assert len(runs) == 3


def test_the_sweep_finds_what_no_queue_knows_and_what_the_engine_gave_up(shop: Workshop, engine: Jobs, does: Any) -> None:
    runs: list[str] = []
    does(lambda shift, task, report: runs.append(task.id) or {})  # type: ignore[func-returns-value]
    lost, broken, deadly = (asked(shop) for _ in range(3))
    engine._enqueue("run_task", "quick", broken.id, shop.tenant, ())  # without its arguments it breaks
    wait_for("it to break", lambda: flows(engine, broken) == [("", "ERROR")])
    started(shop, deadly, times=3)
    for _ in range(3):
        sweep(shop.storage, engine)
    assert ended(shop, lost).status == ended(shop, broken).status == "succeeded"
    assert ended(shop, deadly).status == "failed"
    assert sorted(runs) == sorted([lost.id, broken.id])


def test_one_tenants_thousand_jobs_do_not_starve_anothers_single_one(
    house: tuple[Worker, Any], shop: Workshop, engine: Jobs, does: Any
) -> None:
    order: list[str] = []

    def job(shift: Runner, task: Task, report: Report) -> dict[str, Any]:
        time.sleep(0.1)
        order.append(task.tenant_id)
        return {}

    does(job)
    other = Workshop(new_tenant(house[1]))
    many = [asked(shop) for _ in range(30)]
    one = asked(other)
    for task in [*many, one]:
        engine.enqueue(task)
    ended(other, one)
    assert order.count(shop.tenant) < 12, "it does not wait for those that were there before"
    for task in many:
        ended(shop, task)


def test_an_activation_is_spread_over_workflows_and_a_cancelled_one_leaves_the_old_state(
    shop: Workshop, engine: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activate, "CHUNK", 1)
    monkeypatch.setattr(run, "REPORT_SECONDS", 0.0)
    collection = shop.guest.collection()
    uploads = [shop.guest.upload(collection, clip(710 + i)) for i in range(5)]
    assert all(ended(shop, shop.task(upload)).status == "succeeded" for upload in uploads)
    adapter = shop.adapter(collection, 1)
    fill, may_go_on = activate.fill_chunk, threading.Event()

    def slow(*arguments: Any) -> list[str]:
        may_go_on.wait(20)
        return fill(*arguments)

    monkeypatch.setattr(activate, "fill_chunk", slow)
    task = shop.task(shop.ask(collection, adapter))

    def chunks(task: Task) -> list[str]:
        return [flow.status for flow in engine._list(workflow_id_prefix=f"chunk:{task.id}:")]

    wait_for("its chunks", lambda: len(chunks(task)) == 5 and chunks(task).count("PENDING") == 2)
    assert shop.states(collection)[adapter] == "building"
    shop.guest.post(f"/tasks/{task.id}/cancel")
    assert ended(shop, task).status == "cancelled"
    may_go_on.set()
    assert shop.states(collection) == {None: "active", adapter: "retired"}
    wait_for("no chunk that waits", lambda: not set(chunks(task)) & set(queue.ACTIVE))
    again = shop.task(shop.ask(collection, adapter))
    assert ended(shop, again).status == "succeeded", state(shop, again).error
    assert shop.states(collection) == {None: "retired", adapter: "active"}
    assert chunks(again).count("SUCCESS") == (state(shop, again).result or {})["embedded"] >= 3


def test_a_chunk_that_fails_puts_its_task_off_and_a_chunk_whose_worker_died_is_made_again(
    shop: Workshop, engine: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "FIRST_WAIT", 0.1)
    collection = shop.guest.collection()
    assert ended(shop, shop.task(shop.guest.upload(collection, clip(720)))).status == "succeeded"
    adapter = shop.adapter(collection, 1)
    fill, calls, stuck = activate.fill_chunk, [0], threading.Event()

    def faulty(*arguments: Any) -> list[str]:
        calls[0] += 1
        if calls[0] == 1:
            raise ConnectionResetError
        if calls[0] == 2:
            stuck.wait(20)
        return fill(*arguments)

    monkeypatch.setattr(activate, "fill_chunk", faulty)
    task = shop.task(shop.ask(collection, adapter))
    wait_for("the second start", lambda: calls[0] == 2)
    running = engine._list(workflow_id_prefix=f"chunk:{task.id}:", status="PENDING")
    engine._put_back(running)  # as the sweep does with those of the dead
    assert ended(shop, task).status == "succeeded", state(shop, task).error
    stuck.set()
    assert calls[0] == 3 and shop.states(collection)[adapter] == "active"


def test_a_chunk_that_finds_a_full_disk_is_tried_as_long_as_it_is_full(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "LONGEST_WAIT", 0.1)
    collection = shop.guest.collection()
    assert ended(shop, shop.task(shop.guest.upload(collection, clip(721)))).status == "succeeded"
    adapter = shop.adapter(collection, 1)
    fill, left = activate.fill_chunk, [shop.storage.settings.job_tries + 1]

    def full(*arguments: Any) -> list[str]:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return fill(*arguments)

    monkeypatch.setattr(activate, "fill_chunk", full)
    task = shop.task(shop.ask(collection, adapter))
    assert ended(shop, task, 90).status == "succeeded", state(shop, task).error
    assert shop.states(collection)[adapter] == "active"


def test_an_imported_video_without_vectors_is_indexed_without_a_sweep(
    shop: Workshop, does: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, collection = KINDS.by_name["index_video"], shop.guest.collection()
    assert ended(shop, shop.task(shop.guest.upload(collection, clip(722)))).status == "succeeded"
    does(raises(ConnectionResetError()))
    waiting = shop.task(shop.guest.upload(collection, clip(723)))
    wait_for("it to be put off", lambda: state(shop, waiting).message)
    archive = shop.guest.call("GET", f"/admin/collections/{collection}/export").content
    shop.guest.post(f"/tasks/{waiting.id}/cancel")
    monkeypatch.setitem(KINDS.by_name, "index_video", index)
    path = "/admin/collections/import?collection=copy"
    task = shop.task(shop.guest.call("POST", path, files={"file": ("c.tar", archive)}))
    result = ended(shop, task).result or {}
    assert (result["videos"], result["queued"]) == (2, 1), state(shop, task).error
    wait_for("the other", lambda: len(shop.guest.found("copy")) == 2)


def test_workflows_that_ended_long_ago_are_forgotten(shop: Workshop, engine: Jobs, does: Any) -> None:
    does(lambda *_: {})
    task = asked(shop)
    engine.enqueue(task)
    wait_for("the engine", lambda: flows(engine, task) == [("", "SUCCESS")])
    engine.forget(days=1)
    assert flows(engine, task) == [("", "SUCCESS")]
    engine.forget(days=0)
    assert flows(engine, task) == []


def test_a_task_whose_first_workflow_is_forgotten_gets_a_new_one(shop: Workshop, engine: Jobs, does: Any) -> None:
    does(lambda *_: {})
    task = asked(shop)
    for workflow in (task.id, f"{task.id}:1"):
        engine._enqueue("run_task", "quick", workflow, shop.tenant, ())  # without its arguments it breaks
    wait_for("them to break", lambda: [status for _, status in flows(engine, task)] == ["ERROR"] * 2)
    engine._client.delete_workflows([task.id])
    engine.ensure(task)
    assert ended(shop, task).status == "succeeded"
    assert [name for name, _ in flows(engine, task)] == [":1", ":2"]


def living(storage: Storage) -> set[str]:
    with storage.database.read() as connection:
        return facts.living_workers(connection, 60)


@pytest.mark.slow
def test_the_jobs_of_a_worker_that_died_for_good_are_taken_up_by_another(
    house: tuple[Worker, Any], shop: Workshop, engine: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, _ = house
    settings = here.storage.settings
    if settings.database_url is None:
        pytest.skip("SQLite has one worker")
    variables = {**os.environ, **environment(settings), "POLYCLIP_WORKER_ID": "there"}
    there = f"{socket.gethostname()}:{settings.data.absolute()}:there"
    with subprocess.Popen([sys.executable, "-m", "service.cli.worker", "--queues", "index"], env=variables) as other:
        try:
            wait_for("the other worker", lambda: there in living(shop.storage))
            collection = shop.guest.collection()
            tasks = [shop.task(shop.guest.upload(collection, clip(730 + i, seconds=20.0))) for i in range(16)]
            wait_for("a job of its own", lambda: engine._list(status="PENDING", executor_id=there))
        finally:
            os.kill(other.pid, signal.SIGKILL)
    stranded = [flow.workflow_id for flow in engine._list(status="PENDING", executor_id=there)]
    here._beat()
    rescue(shop.storage, engine)
    assert stranded == [flow.workflow_id for flow in engine._list(status="PENDING", executor_id=there)] != [], "not dead yet"
    monkeypatch.setattr(queue, "DEAD_SECONDS", 0.5)
    time.sleep(0.6)
    here._beat()
    rescue(shop.storage, engine)
    assert [ended(shop, task).status for task in tasks] == ["succeeded"] * 16
