"""Jobs on DBOS: the API enqueues, one worker (or many, on PostgreSQL) runs; arguments are ids, the catalog is the truth.

A workflow's id is the id of its task, so that enqueueing twice is harmless. `sweep` enqueues what a crash left between a
task's row and its queue.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import sqlalchemy
import structlog
from dbos import DBOS, DBOSClient, DBOSConfig
from dbos._serialization import DBOSPortableJSON

from adapters_store import AdapterMismatch, InvalidAdapter
from backbone import BackboneNotFound, UnsupportedBackbone
from indexer.frames import DamagedFrames
from service import catalog, ingest, learning
from service.blobs import BlobMissing
from service.catalog import NotFound, Task
from service.learning import Cancelled, TooFewCaptions, TrainingFailed
from service.runtime import OtherBackbone, Runtime
from service.settings import Settings
from training.recipe import InvalidRecipe

VERSION = "1"  # of the workflows; DBOS would derive one from the code and strand the jobs of the version before
QUEUES = {"index_video": "index", "train_adapter": "train", "activate": "reembed", "evaluate": "reembed", "purge": "reembed"}
CONCURRENCY = {"index": 8, "reembed": 2, "train": 1}
HEARTBEAT_SECONDS = 5.0
SWEEP_SECONDS = 60.0

log = structlog.get_logger()


class Jobs:
    """The enqueueing side: one per API process or offline command."""

    def __init__(self, settings: Settings) -> None:
        prepare_engine(settings)
        self._client = DBOSClient(
            system_database_url=settings.jobs_database, serializer=DBOSPortableJSON, application_name="polyclip"
        )

    def enqueue(self, task: Task) -> None:
        """Hands a task to its queue; a task that is there already stays as it is."""
        self._client.enqueue(
            {
                "workflow_name": "run_task",
                "queue_name": QUEUES[task.kind],
                "workflow_id": task.id,
                "app_version": VERSION,
            },
            task.tenant_id,
            task.id,
        )

    def ensure(self, task: Task) -> None:
        """`enqueue`, and a new start for a workflow that the engine has given up though its task is open."""
        self.enqueue(task)
        status = self._client.retrieve_workflow(task.id).get_status().status
        if status not in ("ENQUEUED", "PENDING", "DELAYED"):
            self._client.resume_workflow(task.id, queue_name=QUEUES[task.kind])

    def close(self) -> None:
        self._client.destroy()


def prepare_engine(settings: Settings) -> None:
    """Schema of the job engine; WAL on SQLite, which DBOS does not switch on itself."""
    url = settings.jobs_database
    logging.getLogger("dbos").setLevel(logging.WARNING)
    if url.startswith("sqlite"):
        engine = sqlalchemy.create_engine(url)
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        engine.dispose()
    DBOS.migrate(url)


def run_task(runtime: Runtime, tenant: str, task_id: str) -> None:
    """Runs a task to its end. Whatever happens, the task ends with a result or a reason."""
    with runtime.database.write() as connection:
        try:
            task = catalog.task(connection, tenant, task_id)
        except NotFound:
            return
        if task.status in ("succeeded", "failed", "cancelled"):
            return
        catalog.start_task(connection, tenant, task_id)
    try:
        result = KINDS[task.kind](runtime, task)
    except Cancelled:
        _end(runtime, task, "cancelled")
    except (NotFound, TooFewCaptions, InvalidRecipe, AdapterMismatch, InvalidAdapter, OtherBackbone, BlobMissing) as error:
        code = {NotFound: "not_found", TooFewCaptions: "too_few_captions", InvalidRecipe: "invalid_recipe"}
        _end(runtime, task, "failed", code.get(type(error), "adapter_unusable"), str(error))
    except TrainingFailed as error:
        _end(runtime, task, "failed", error.code, str(error))
    except (DamagedFrames, BackboneNotFound, UnsupportedBackbone, OSError) as error:
        _end(runtime, task, "failed", "worker_failed", str(error))
    except Exception as error:
        log.exception("task_failed", task=task.id, kind=task.kind)
        _end(runtime, task, "failed", "internal", f"{type(error).__name__}: {error}")
    else:
        if result is not None:
            _end(runtime, task, "succeeded", result=result)


def _end(runtime: Runtime, task: Task, status: str, code: str | None = None, detail: str = "", **values: Any) -> None:
    error = {"code": code, "detail": detail} if code else None
    if code and task.kind == "index_video":
        ingest.fail_video(runtime, task.tenant_id, task.request["video_id"], code, detail)
    with runtime.database.write() as connection:
        catalog.end_task(connection, task.tenant_id, task.id, status, error=error, **values)


def _index_video(runtime: Runtime, task: Task) -> None:
    ingest.index_video(runtime, task.tenant_id, task.request["video_id"])  # ends its task itself, with the video
    with runtime.database.write() as connection:  # a deleted video's task ends here
        catalog.end_task(connection, task.tenant_id, task.id, "cancelled")


def _train_adapter(runtime: Runtime, task: Task) -> dict[str, Any]:
    return learning.train_adapter(runtime, task.tenant_id, task, reporter(runtime, task))


def _activate(runtime: Runtime, task: Task) -> dict[str, Any]:
    adapter = task.request["adapter_id"]
    generation = learning.activate(runtime, task.tenant_id, str(task.collection_id), adapter, reporter(runtime, task))
    return {"adapter_id": adapter, "generation_id": generation, "activated": True}


def _evaluate(runtime: Runtime, task: Task) -> dict[str, Any]:
    with runtime.database.read() as connection:
        name = catalog.collection_name(connection, task.tenant_id, str(task.collection_id))
    return learning.evaluate(runtime, task.tenant_id, name, task.request["split"]).found.to_json(intervals=True)


def _purge(runtime: Runtime, task: Task) -> dict[str, Any]:
    for video in task.request["videos"]:
        ingest.purge_video(runtime, str(task.collection_id), video)
    if task.request["whole_collection"]:
        for kind in ("videos", "frames", "thumbnails", "adapters"):
            for key in runtime.blobs.keys(f"{kind}/{task.collection_id}/"):
                runtime.blobs.delete(key)
        with runtime.database.write() as connection:
            for vector_set in catalog.vector_sets(connection, task.tenant_id, str(task.collection_id)):
                catalog.drop_vectors(connection, task.tenant_id, vector_set)
    return {"videos": len(task.request["videos"])}


KINDS: dict[str, Callable[[Runtime, Task], dict[str, Any] | None]] = {
    "index_video": _index_video,
    "train_adapter": _train_adapter,
    "activate": _activate,
    "evaluate": _evaluate,
    "purge": _purge,
}


def reporter(runtime: Runtime, task: Task) -> Callable[[float, str], None]:
    """Writes progress at most twice a second; raises Cancelled where the owner has asked for it."""
    last = 0.0

    def report(progress: float, message: str) -> None:
        nonlocal last
        if time.monotonic() - last < 0.5:
            return
        last = time.monotonic()
        with runtime.database.write() as connection:
            catalog.set_task(connection, task.tenant_id, task.id, progress=round(progress, 4), message=message)
            if catalog.task(connection, task.tenant_id, task.id).cancel_requested:
                raise Cancelled

    return report


def sweep(runtime: Runtime, jobs: Jobs) -> int:
    """Sees to it that every task that has not ended has a job; returns their number."""
    with runtime.database.read() as connection:
        waiting = catalog.open_tasks(connection)
    for task in waiting:
        jobs.ensure(task)
    return len(waiting)


def work(settings: Settings, queues: list[str], name: str = "worker") -> None:
    """A worker process: runs until SIGTERM. `name` must be stable over restarts: its jobs are taken up again under it."""
    runtime = Runtime(settings)
    runtime.prepare()
    prepare_engine(settings)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    config: DBOSConfig = {
        "name": "polyclip",
        "system_database_url": settings.jobs_database,
        "application_version": VERSION,
        "executor_id": name,
        "serializer": DBOSPortableJSON,
        "console_log_level": "WARNING",
        "log_level": "WARNING",
    }
    DBOS(config=config)

    @DBOS.step(name="run")
    def step(tenant: str, task_id: str) -> None:
        run_task(runtime, tenant, task_id)

    @DBOS.workflow(name="run_task")
    def workflow(tenant: str, task_id: str) -> None:
        step(tenant, task_id)

    DBOS.listen_queues(queues)
    DBOS.launch()
    for queue in queues:
        DBOS.register_queue(queue, worker_concurrency=CONCURRENCY[queue], polling_interval_sec=0.25)
    jobs = Jobs(settings)
    log.info("worker_started", worker=name, queues=queues, pid=os.getpid())
    last_sweep: float | None = None
    while not stop.wait(HEARTBEAT_SECONDS if last_sweep is not None else 0):
        try:
            with runtime.database.write() as connection:
                catalog.worker_seen(connection, name)
            if last_sweep is None or time.monotonic() - last_sweep > SWEEP_SECONDS:
                last_sweep = time.monotonic()
                sweep(runtime, jobs)
        except sqlalchemy.exc.OperationalError as error:  # a locked or vanished database: go on trying
            log.warning("heartbeat_failed", error=str(error))
    log.info("worker_stopping", worker=name)
    os._exit(0)  # jobs in flight stop where they are; the next start goes on from the rows
