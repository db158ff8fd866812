"""What a worker does with a task: runs it to its end, or puts it back to be tried again.

Errors that may pass are tried again later, by a new workflow, so that no place in a queue is held meanwhile. A task that was
running when its worker died is suspect: of such tasks one at a time is started, and one through which the worker has died
again and again fails. A worker that is told to stop lets nothing go on beyond its next report: the task goes back into its
queue as if it had not been started, and what has been done of it is in the rows, as after a crash.
"""

from __future__ import annotations

import math
import random
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import structlog
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnectionFree
from structlog.contextvars import bound_contextvars

from service.jobs import task_rows
from service.jobs.kinds import CANCELLED, Cancelled, JobFailed, Kinds, TurnOver
from service.jobs.queue import Jobs
from service.jobs.task_rows import Task
from service.storage.generation_rows import Generation
from service.storage.rows import NotFound
from service.storage.storage import Storage
from service.storage.tables import OPEN
from training.progress import Progress, Tell

FIRST_WAIT, LONGEST_WAIT = 5.0, 300.0  # seconds before a task is tried again; three times as long after each try
PROBATION = 60.0  # seconds after which a suspect that still runs does not hold up the next one
REPORT_SECONDS = 0.5
TURN_WAIT, TURN_WAITS = 2.0, 5  # seconds for another tenant's training to start in, and how often it is let go first
CHUNKS_AHEAD = 32  # workflows of a job that are handed out at once
CHUNKS_TOGETHER = 8  # of a large collection, in one workflow
CHUNKS_LOOK = 0.25  # seconds

Result = TypeVar("Result")

log = structlog.get_logger()


class Runner:
    """Runs the tasks of one worker, until it is told to stop. Without `jobs`, a task embeds its chunks by itself.

    `parts` is handed to the functions of `kinds`. `children`: their training processes, ended with the worker.
    """

    def __init__(self, storage: Storage, kinds: Kinds, parts: Any, jobs: Jobs | None = None) -> None:
        self.storage, self.kinds, self.parts, self._jobs = storage, kinds, parts, jobs
        self.children: set[subprocess.Popen[str]] = set()
        self.stopping = threading.Event()
        self.running: dict[str, Task] = {}
        self._turn = threading.Condition()
        self._suspect, self._since = "", 0.0
        self._turns: dict[str, float] = {}  # when each tenant's last training had its turn
        self._waits: dict[str, int] = {}  # how often in a row a training has let others go first

    def run(self, tenant: str, task_id: str, tries: int = 1) -> dict[str, Any] | None:
        """Runs a task to its end and returns None; or returns after how many seconds to try again, and which try that is."""
        self.pause_if_stopping()
        with bound_contextvars(task_id=task_id), self._one_suspect_at_a_time(tenant, task_id):
            task = self._started(tenant, task_id)
            if task is None:
                return None
            with _request_of(task):
                log.info("task_started", kind=task.kind)
                self.running[task_id] = task
                again = self._run(task, tries)
                self.running.pop(task_id, None)
                return again

    def fill(self, tenant: str, task_id: str, generation: str, chunks: Sequence[Sequence[str]]) -> dict[str, Any] | None:
        """Embeds some chunks for a task that another job runs, as long as it is wanted; returns what went wrong."""
        for chunk in chunks:
            self.pause_if_stopping()
            try:
                task = self._task(tenant, task_id)
                if task.status not in OPEN or task.cancel_requested:
                    return None
                with bound_contextvars(task_id=task_id), _request_of(task):
                    self.kinds.fill(self.parts, tenant, generation, chunk)
            except Exception as error:
                self.pause_if_stopping()
                return self.kinds.explain(error).to_json()
        return None

    def stop(self) -> None:
        """Nothing new is started; what runs stops at its next report, training processes after a checkpoint."""
        self.stopping.set()
        for child in self.children.copy():
            child.terminate()

    def at_rest(self) -> bool:
        return not self.running and all(child.poll() is not None for child in self.children.copy())

    def others_wait(self, task: Task) -> list[str]:
        """Other tenants with a task of this kind that waits in the queue."""
        with self.storage.database.read() as connection:
            waiting = [other for other in task_rows.open_tasks(connection) if other.kind == task.kind]
        mine = task.tenant_id
        return [t.tenant_id for t in waiting if t.status == "queued" and t.tenant_id != mine and not t.request.get("offline")]

    def take_turn(self, task: Task) -> None:
        """Tasks of a kind take turns by tenant: raises TurnOver where a tenant waits whose last turn is longer ago.

        It goes first, but is not waited for long: it may be one that is put off.
        """
        mine = self._turns.get(task.tenant_id, -math.inf)
        if any(self._turns.get(other, -math.inf) < mine for other in self.others_wait(task)):
            self._waits[task.id] = self._waits.get(task.id, 0) + 1
            if self._waits[task.id] <= TURN_WAITS:
                raise TurnOver("another tenant's training goes first")
        self._waits.pop(task.id, None)
        self._turns[task.tenant_id] = time.monotonic()

    def give_back(self, task: Task, message: str = "the worker was restarted") -> None:
        """Puts a running task back into its queue; this start does not count."""
        with self.storage.database.write() as connection:
            try:
                attempts = max(0, task_rows.lock_task(connection, task.tenant_id, task.id).attempts - 1)
            except NotFound:
                return
            task_rows.stop_task(connection, task.tenant_id, task.id, message, attempts)

    def pause_if_stopping(self, task: Task | None = None) -> None:
        """Does not return once the worker stops: nothing that waits for it, no clean-up of a failure, must run on then."""
        if self.stopping.is_set():
            if task is not None and self.running.get(task.id) is not None:
                patiently(lambda: self.give_back(task))
                self.running.pop(task.id, None)
            threading.Event().wait()

    def spread(self, task: Task) -> Callable[[Generation, Sequence[Sequence[str]], Tell], None] | None:
        """Embeds chunks of videos as workflows, which all workers take part in, for `adapters.activate`."""
        jobs = self._jobs
        return None if jobs is None else lambda generation, chunks, told: _spread(jobs, task, generation, chunks, told)

    def hand_on(self, tenant: str, task_id: str) -> None:
        """Hands another task to its queue; without queues it waits for whoever runs it."""
        if self._jobs is not None:
            self._jobs.enqueue(self._task(tenant, task_id))

    def _run(self, task: Task, tries: int) -> dict[str, Any] | None:
        report = Report(self, task)
        try:
            result = self.kinds.by_name[task.kind].run(self.parts, self, task, report)
        except Exception as error:
            self.pause_if_stopping(task)
            if isinstance(error, TurnOver):
                patiently(lambda: self.give_back(task, "waiting for its turn"))
                return {"seconds": TURN_WAIT, "tries": tries}
            if isinstance(error, Cancelled):
                self._end(task, "cancelled", CANCELLED)
                return None
            why = self.kinds.explain(error)
            if why.may_pass:
                return self._put_off(task, why, 1 if report.advanced else tries)
            if why.code == "internal":
                log.exception("task_failed", kind=task.kind)
            self._end(task, "failed", {"code": why.code, "detail": str(why)})
        else:
            self._end(task, "succeeded" if result is not None else "cancelled", result=result)
        return None

    def _started(self, tenant: str, task_id: str) -> Task | None:
        """Counts a start; None where there is nothing to be run."""

        def start() -> Task | None:
            with self.storage.database.write() as connection:
                try:
                    task = task_rows.lock_task(connection, tenant, task_id)
                except NotFound:
                    return None
                deadly = task.status == "running" and task.attempts >= self.storage.settings.job_deaths
                if task.status in OPEN and not task.cancel_requested and not deadly:
                    task_rows.start_task(connection, tenant, task_id, attempts=1)
                    return task_rows.task(connection, tenant, task_id)
            if deadly:
                detail = f"the worker has died {task.attempts} times while it ran this task"
                self._end(task, "failed", {"code": "job_killed_worker", "detail": detail})
            else:
                self._end(task, "cancelled", CANCELLED)
            return None

        return patiently(start)

    @contextmanager
    def _one_suspect_at_a_time(self, tenant: str, task_id: str) -> Iterator[None]:
        """A task that was running when its worker died waits for its turn: the next death is the fault of one of them alone,
        or of a task that has none against it yet."""
        try:
            suspect = patiently(lambda: self._task(tenant, task_id)).status == "running"
        except NotFound:
            suspect = False
        if not suspect:
            yield
            return
        with self._turn:
            while self._suspect and time.monotonic() - self._since < PROBATION:
                self._turn.wait(1.0)
            self._suspect, self._since = task_id, time.monotonic()
        self.pause_if_stopping()
        try:
            yield
        finally:
            with self._turn:
                if self._suspect == task_id:
                    self._suspect = ""
                    self._turn.notify_all()

    def _put_off(self, task: Task, why: JobFailed, tries: int) -> dict[str, Any] | None:
        most = self.storage.settings.job_tries
        if tries >= most and not why.lasts:
            code = "worker_failed" if why.code == "internal" else why.code
            self._end(task, "failed", {"code": code, "detail": f"tried {tries} times: {why}"})
            return None
        wait = min(LONGEST_WAIT, FIRST_WAIT * 3 ** (tries - 1)) * random.uniform(0.5, 1.5)
        log.warning("task_put_off", kind=task.kind, seconds=round(wait, 1), error=str(why))

        def put_off() -> None:
            with self.storage.database.write() as connection:
                message = f"to be tried again within {wait:.0f} s: {why}"
                task_rows.stop_task(connection, task.tenant_id, task.id, message[:300], attempts=0)

        patiently(put_off)
        return {"seconds": wait, "tries": min(tries + 1, most)}

    def _end(
        self, task: Task, status: str, error: Mapping[str, str] | None = None, result: Mapping[str, Any] | None = None
    ) -> None:
        """Ends a task, unless it has ended."""
        kind = self.kinds.by_name[task.kind]

        def end() -> str:
            with self.storage.database.write() as connection:
                kind.lock(connection, task)
                try:
                    now = task_rows.lock_task(connection, task.tenant_id, task.id)
                except NotFound:
                    return "deleted"
                if now.status in OPEN:
                    if error is not None:
                        kind.failed(connection, task, error)
                    why = error if status == "failed" else None
                    task_rows.end_task(connection, task.tenant_id, task.id, status, error=why, result=result or now.result)
                return status if now.status in OPEN else now.status

        log.info("task_ended", kind=task.kind, status=patiently(end), **(error or {}))
        kind.discard(self.parts, task)

    def _task(self, tenant: str, task_id: str) -> Task:
        with self.storage.database.read() as connection:
            return task_rows.task(connection, tenant, task_id)


class Report:
    """The progress of a task: shown at most twice a second, and never less than before.

    Raises Cancelled where its owner has asked for it; does not return once the worker stops. `advanced`: whether this start
    has come further than all before; then the task is no longer suspect.
    """

    def __init__(self, runner: Runner, task: Task) -> None:
        self.advanced = False
        self._runner, self._task = runner, task
        self._before = self._best = task.progress
        self._message = task.message
        self._last = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        self._runner.pause_if_stopping(self._task)
        if time.monotonic() - self._last >= REPORT_SECONDS:
            self.check()
            best, message = max(self._best, round(progress.share, 6)), progress.stage
            if (best, message) != (self._best, self._message):
                self._best, self._message = best, message
                cleared = {"attempts": 1} if best > self._before and not self.advanced else {}
                with self._runner.storage.database.write() as connection:
                    values = {"progress": best, "message": message, **cleared}
                    task_rows.set_task(connection, self._task.tenant_id, self._task.id, **values)
                self.advanced = best > self._before
            self._last = time.monotonic()

    def check(self) -> None:
        self._runner.pause_if_stopping(self._task)
        with self._runner.storage.database.read() as connection:
            try:
                task = task_rows.task(connection, self._task.tenant_id, self._task.id)
            except NotFound:
                raise Cancelled from None
        if task.cancel_requested or task.status not in OPEN:
            raise Cancelled


def _request_of(task: Task) -> AbstractContextManager[None]:
    """Binds the id of the task's request to what is logged."""
    return bound_contextvars(**({"request_id": task.request_id} if task.request_id else {}))


def _spread(jobs: Jobs, task: Task, generation: Generation, chunks: Sequence[Sequence[str]], told: Tell) -> None:
    """Returns when every chunk has been tried; those of a worker that died may be missing. Raises JobFailed."""
    jobs.withdraw_chunks(task.id)  # of an earlier start
    together = min(CHUNKS_TOGETHER, 1 + len(chunks) // CHUNKS_AHEAD)
    ahead = deque(chunks[i : i + together] for i in range(0, len(chunks), together))
    out: dict[str, int] = {}
    done, total = 0, sum(map(len, chunks))
    try:
        while ahead or out:
            while ahead and len(out) < CHUNKS_AHEAD:
                batch = ahead.popleft()
                out[jobs.enqueue_chunks(task, generation.id, batch)] = sum(map(len, batch))
            time.sleep(CHUNKS_LOOK)
            for workflow, failure in jobs.ended_chunks(list(out)).items():
                if failure is not None:
                    raise JobFailed(**failure)
                done += out.pop(workflow)
            told(Progress("embedding", done, total))
    finally:
        if out:
            jobs.withdraw_chunks(task.id)


def patiently(write: Callable[[], Result]) -> Result:
    """The result of a transaction, tried until the database answers: what has happened must be written down."""
    wait = 0.5
    while True:
        try:
            return write()
        except (OperationalError, InterfaceError, NoConnectionFree) as error:
            log.warning("database_unavailable", error=str(error), seconds=wait)
            time.sleep(wait)
            wait = min(10.0, 2 * wait)
