"""The job engine, DBOS: the API hands tasks in, workers take them out; arguments are ids, the rows are the truth.

A task's first workflow bears the task's id, so that enqueueing twice is harmless; when it is tried again, the next workflow
bears the next number behind that id. `sweep` enqueues what a crash left between a task's row and its queue, `rescue`
takes the jobs of dead workers up again. Chunks of videos to be embedded are workflows of their own, which any worker takes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy
import structlog
from dbos import DBOS, DBOSClient, EnqueueOptions, WorkflowStatus
from dbos._serialization import DBOSPortableJSON
from sqlalchemy.exc import DBAPIError

from adapters_store import durable
from service.jobs import task_rows
from service.jobs.kinds import JobFailed
from service.jobs.task_rows import Task
from service.settings import Settings
from service.storage import facts
from service.storage.storage import Storage
from service.storage.tables import new_id

VERSION = "2"  # of the workflows; DBOS would derive one from the code and strand the jobs of the version before


@dataclass(frozen=True, slots=True)
class Queue:
    """How many jobs one worker runs at once, how many of them one tenant's, and how often it looks for more."""

    at_once: int
    of_a_tenant: int
    seconds: float


QUEUES = {
    "index": Queue(8, 6, 0.25),
    "fetch": Queue(8, 4, 0.5),
    "reembed": Queue(2, 1, 0.5),
    "chunks": Queue(2, 2, 0.25),  # of the jobs in `reembed` and `train`, which wait for them
    "quick": Queue(4, 2, 0.5),
    "alerts": Queue(4, 4, 0.25),
    "webhooks": Queue(16, 2, 0.5),  # each waits for somebody else's server, ten seconds at most
    "train": Queue(1, 1, 0.5),
}
QUEUE_OF = {
    "index_video": "index",
    "fetch_video": "fetch",
    "train_adapter": "train",
    "activate": "reembed",
    "import_collection": "reembed",
    "evaluate": "quick",
    "purge": "quick",
    "match_alerts": "alerts",
    "deliver_event": "webhooks",
}
GROUPS = {  # for the command line
    "index": ["index", "fetch"],
    "reembed": ["reembed", "chunks", "quick", "alerts", "webhooks"],
    "train": ["train"],
}
ACTIVE = ["ENQUEUED", "DELAYED", "PENDING"]
DEAD_SECONDS = 60.0  # without a sign of life
KEPT_DAYS = 3.0  # workflows that have ended; their tasks say what came of them

log = structlog.get_logger()


class Jobs:
    """A connection to the engine's database: one per API process, worker or offline command."""

    def __init__(self, settings: Settings) -> None:
        prepare_engine(settings)
        self._client = DBOSClient(
            system_database_url=settings.jobs_database,
            serializer=DBOSPortableJSON,
            application_name="polyclip",
            retry_connection_errors=False,
        )

    def enqueue(self, task: Task, number: int = 0, tries: int = 1, delay: float | None = None) -> None:
        """Hands a task to its queue, as its workflow of this number; one that is there already stays as it is.

        Where the engine does not answer, the task's row is enough: the sweep finds it.
        """
        workflow = f"{task.id}:{number}" if number else task.id
        try:
            self._enqueue("run_task", QUEUE_OF[task.kind], workflow, task.tenant_id, (task.id, tries), delay)
            log.info("task_enqueued", task_id=task.id, kind=task.kind)
        except DBAPIError as error:
            log.warning("not_enqueued", task_id=task.id, error=str(error))

    def ensure(self, task: Task) -> None:
        """`enqueue`, unless a workflow of the task waits or runs."""
        known = self._list(workflow_id_prefix=task.id)
        if not any(flow.status in ACTIVE and flow.app_version == VERSION for flow in known):
            numbers = [int(flow.workflow_id.partition(":")[2] or 0) for flow in known]
            self.enqueue(task, number=max(numbers, default=-1) + 1)  # not their count: the first may be forgotten already

    def active_tasks(self) -> set[str]:
        """Ids of the tasks that have a workflow which waits or runs."""
        found = self._list(status=ACTIVE, name="run_task", app_version=VERSION)
        return {flow.workflow_id.split(":")[0] for flow in found}

    def enqueue_chunks(self, task: Task, generation: str, chunks: Sequence[Sequence[str]]) -> str:
        """Hands some chunks of video ids out to be embedded, one after the other; returns the workflow's id."""
        workflow = f"chunk:{task.id}:{new_id('run')}"
        arguments = (task.id, generation, [list(chunk) for chunk in chunks])
        self._enqueue("fill_chunks", "chunks", workflow, task.tenant_id, arguments)
        return workflow

    def ended_chunks(self, workflows: Sequence[str]) -> dict[str, Any]:
        """Those of these workflows that neither wait nor run, with what they returned, or what broke them."""
        known = {flow.workflow_id: flow for flow in self._list(workflow_ids=list(workflows), load_output=True)}
        ended: dict[str, Any] = {}
        for workflow in workflows:
            flow = known.get(workflow)
            if flow is not None and flow.status == "ERROR":
                ended[workflow] = JobFailed("worker_failed", str(flow.error), may_pass=True).to_json()
            elif flow is None or flow.status not in ACTIVE:
                ended[workflow] = flow and flow.output
        return ended

    def withdraw_chunks(self, task: str) -> None:
        """Takes back the chunks of a task that wait; those that run end with their results unread."""
        if left := [flow.workflow_id for flow in self._list(workflow_id_prefix=f"chunk:{task}:", status=ACTIVE)]:
            self._client.cancel_workflows(left)

    def give_up(self, worker: str) -> None:
        """Puts what a worker had begun, and will not end, back into its queues."""
        self._put_back(self._list(status="PENDING", executor_id=worker))

    def rescue(self, living: set[str]) -> int:
        """`give_up` for every worker but these; returns the number of jobs."""
        stranded = [flow for flow in self._list(status="PENDING") if flow.executor_id not in living]
        self._put_back(stranded)
        return len(stranded)

    def forget(self, days: float = KEPT_DAYS) -> int:
        """Removes workflows that ended so long ago; returns their number."""
        before = (datetime.now(UTC) - timedelta(days=days)).isoformat()
        removed = 0
        while old := self._list(completed_before=before, status=["SUCCESS", "ERROR", "CANCELLED"], limit=500):
            self._client.delete_workflows([flow.workflow_id for flow in old])
            removed += len(old)
        return removed

    def close(self) -> None:
        self._client.destroy()

    def _enqueue(
        self, name: str, queue: str, workflow: str, tenant: str, arguments: Sequence[Any], delay: float | None = None
    ) -> None:
        options: EnqueueOptions = {
            "workflow_name": name,
            "queue_name": queue,
            "workflow_id": workflow,
            "app_version": VERSION,
            "queue_partition_key": tenant,
        }
        if delay is not None:
            options["delay_seconds"] = delay
        self._client.enqueue(options, tenant, *arguments)

    def _put_back(self, flows: Iterable[WorkflowStatus]) -> None:
        """Chunks are not taken up: the job that waits for them finds what is missing, and counts the deaths they bring."""
        by_queue: dict[str, list[str]] = {}
        for flow in flows:
            by_queue.setdefault(str(flow.queue_name), []).append(flow.workflow_id)
        if chunks := by_queue.pop("chunks", None):
            self._client.cancel_workflows(chunks)
        for queue, workflows in by_queue.items():
            self._client.resume_workflows(workflows, queue_name=queue)

    def _list(self, load_output: bool = False, **which: Any) -> list[WorkflowStatus]:
        return self._client.list_workflows(load_input=False, load_output=load_output, **which)


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


def sweep(storage: Storage, jobs: Jobs) -> None:
    """Sees to it that every task that has not ended has a job, or ends. Several may do it at once."""
    with storage.database.read() as connection:
        waiting = task_rows.open_tasks(connection)
    active = jobs.active_tasks() if waiting else set()
    for task in waiting:
        if task.request.get("offline"):
            _end_if_killed(storage, task)
        elif task.id not in active:
            jobs.ensure(task)


def sign_of_life(settings: Settings, task_id: str) -> Path:
    """The file that an offline command keeps locked while it runs a task."""
    return settings.data / f"offline-{task_id}.lock"


def _end_if_killed(storage: Storage, task: Task) -> None:
    """Ends the task of an offline command whose file is here and held by nobody."""
    path = sign_of_life(storage.settings, task.id)
    with suppress(FileNotFoundError, TimeoutError), path.open("r+") as file:
        durable.lock(file, 0)
        with storage.database.write() as connection:
            error = {"code": "interrupted", "detail": "the command that ran this training was killed"}
            task_rows.end_task(connection, task.tenant_id, task.id, "failed", error=error)
        path.unlink()


def rescue(storage: Storage, jobs: Jobs) -> None:
    """Takes the jobs of dead workers up again. For one who has seen the database answer as long as `DEAD_SECONDS`: after an
    outage every worker would look dead."""
    with storage.database.write() as connection:  # whoever does it at the same time waits here and finds nothing left
        if taken := jobs.rescue(facts.living_workers(connection, DEAD_SECONDS, lock=True)):
            log.warning("jobs_of_dead_workers", jobs=taken)
