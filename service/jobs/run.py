"""What a worker does with a task: runs it to its end, or puts it back to be tried again.

Errors that may pass are tried again later, by a new workflow, so that no place in a queue is held meanwhile. A task that was
running when its worker died is under suspicion: of such tasks one at a time is started, and one through which the worker has
died again and again fails. A worker that is told to stop lets nothing go on beyond its next report: the task goes back into
its queue as if it had not been started, and what has been done of it is in the rows, as after a crash.
"""

from __future__ import annotations

import errno
import math
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import obstore
import structlog
import torch
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnectionFree

from adapters_store import AdapterMismatch, DamagedAdapter, InvalidAdapter, LeaseTimeout
from backbone import BackboneNotFound, UnsupportedBackbone
from backbone.batcher import BatcherFull
from indexer.frames import DamagedFrames
from service.adapters import activate, train
from service.adapters.activate import Progress, Spread
from service.adapters.encoder import Encoder, OtherBackbone
from service.adapters.train import Cancelled, TooFewCaptions, Trainers, TrainingFailed, TurnOver
from service.jobs import task_rows
from service.jobs.queue import Jobs
from service.jobs.task_rows import OPEN, Task
from service.storage import collection_rows
from service.storage.blobs import BlobMissing
from service.storage.faults import ERRNO, fault_of
from service.storage.generation_rows import Generation
from service.storage.rows import NotFound
from service.storage.storage import Storage
from service.upkeep import delete, import_collection
from service.upkeep.import_collection import ImportFailed
from service.videos import index, video_rows
from service.videos.decoders import Decoders
from service.videos.video_rows import Video
from training.recipe import InvalidRecipe

CODES: dict[type[Exception], str] = {  # what will not pass
    NotFound: "not_found",
    TooFewCaptions: "too_few_captions",
    InvalidRecipe: "invalid_recipe",
    AdapterMismatch: "adapter_unusable",
    InvalidAdapter: "adapter_unusable",
    DamagedAdapter: "adapter_unusable",
    OtherBackbone: "adapter_unusable",
    BlobMissing: "file_missing",
    DamagedFrames: "frames_damaged",
    BackboneNotFound: "worker_failed",
    UnsupportedBackbone: "worker_failed",
}
MAY_PASS = (  # disk and network, database, object store, memory, what waits for a device
    OSError,
    OperationalError,
    InterfaceError,
    NoConnectionFree,
    obstore.exceptions.GenericError,
    MemoryError,
    torch.OutOfMemoryError,
    LeaseTimeout,
    BatcherFull,
)
LASTING = (errno.ENOENT, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
CANCELLED = {"code": "cancelled", "detail": "indexing was cancelled"}  # of the video
TRAINING_MAY_PASS = ("io_error", "in_use", "stopped")
FIRST_WAIT, LONGEST_WAIT = 5.0, 300.0  # seconds before a task is tried again; three times as long after each try
PROBATION = 60.0  # seconds after which a suspect that still runs does not hold up the next one
REPORT_SECONDS = 0.5
TURN_WAIT, TURN_WAITS = 2.0, 5  # seconds for another tenant's training to start in, and how often it is let go first
CHUNKS_AHEAD = 32  # workflows of a job that are handed out at once
CHUNKS_TOGETHER = 8  # of a large collection, in one workflow
CHUNKS_LOOK = 0.25  # seconds

Result = TypeVar("Result")

log = structlog.get_logger()


class ChunkFailed(RuntimeError):
    """A chunk of videos could not be embedded; without a code it may pass, if it `lasts` as soon as the machine lets it."""

    def __init__(self, code: str | None, detail: str, lasts: bool = False) -> None:
        super().__init__(detail)
        self.code, self.lasts = code, lasts


class Shift:
    """The tasks that one worker runs, until it is told to stop. Without `jobs`, a task embeds its chunks by itself."""

    def __init__(self, storage: Storage, encoder: Encoder, decoders: Decoders, jobs: Jobs | None = None) -> None:
        self.storage, self.encoder, self.decoders = storage, encoder, decoders
        self.trainers: Trainers = set()
        self._jobs = jobs
        self.stopping = threading.Event()
        self.running: dict[str, Task] = {}
        self._turn = threading.Condition()
        self._suspect, self._since = "", 0.0
        self._turns: dict[str, float] = {}  # when each tenant's last training had its turn
        self._waits: dict[str, int] = {}  # how often in a row a training has let others go first

    def run(self, tenant: str, task_id: str, tries: int = 1) -> dict[str, Any] | None:
        """Runs a task to its end and returns None; or returns after how many seconds to try again, and which try that is."""
        self.pause_if_stopping()
        with self._one_suspect_at_a_time(tenant, task_id):
            task = self._started(tenant, task_id)
            if task is None:
                return None
            self.running[task_id] = task
            again = self._run(task, tries)
            self.running.pop(task_id, None)
            return again

    def fill(self, tenant: str, task_id: str, generation: str, chunks: Sequence[Sequence[str]]) -> dict[str, Any] | None:
        """Embeds some chunks for a task that another job runs, as long as it is wanted; returns what went wrong."""
        for chunk in chunks:
            self.pause_if_stopping()
            try:
                with self.storage.database.read() as connection:
                    task = task_rows.task(connection, tenant, task_id)
                if task.status not in OPEN or task.cancel_requested:
                    return None
                activate.fill_chunk(self.storage, self.encoder, self.decoders, tenant, generation, chunk)
            except Exception as error:
                self.pause_if_stopping()
                code, detail = _reason(error)
                return {"code": None if _may_pass(error) else code, "detail": detail, "lasts": _lasts(error)}
        return None

    def stop(self) -> None:
        """Nothing new is started; what runs stops at its next report, training processes after a checkpoint."""
        self.stopping.set()
        for child in self.trainers.copy():
            child.terminate()

    def at_rest(self) -> bool:
        return not self.running and all(child.poll() is not None for child in self.trainers.copy())

    def others_wait_for_training(self, task: Task) -> list[str]:
        """Other tenants with a training that waits in the queue."""
        with self.storage.database.read() as connection:
            waiting = [other for other in task_rows.open_tasks(connection) if other.kind == task.kind]
        mine = task.tenant_id
        return [t.tenant_id for t in waiting if t.status == "queued" and t.tenant_id != mine and not t.request.get("offline")]

    def take_turn(self, task: Task) -> None:
        """Trainings take turns by tenant: raises TurnOver where a tenant waits whose last turn is longer ago.

        It goes first, but is not waited for long: it may be one that is put off.
        """
        mine = self._turns.get(task.tenant_id, -math.inf)
        if any(self._turns.get(other, -math.inf) < mine for other in self.others_wait_for_training(task)):
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

    def spread(self, task: Task) -> Spread | None:
        """For `generations.activate`: chunks as workflows, which all workers take part in."""
        return None if self._jobs is None else _Spread(self._jobs, task)

    def start_indexing(self, video: Video) -> None:
        """Hands the video's task to its queue; without queues it waits for whoever runs it."""
        if self._jobs is not None:
            with self.storage.database.read() as connection:
                task = task_rows.task(connection, video.tenant_id, video.task_id)
            self._jobs.enqueue(task)

    def _run(self, task: Task, tries: int) -> dict[str, Any] | None:
        report = Report(self, task)
        try:
            result = KINDS[task.kind](self, task, report)
        except Exception as error:
            self.pause_if_stopping(task)
            if isinstance(error, TurnOver):
                patiently(lambda: self.give_back(task, "waiting for its turn"))
                return {"seconds": TURN_WAIT, "tries": tries}
            if _may_pass(error):
                return self._put_off(task, error, 1 if report.advanced else tries)
            if isinstance(error, Cancelled):
                self._end(task, "cancelled", CANCELLED)
            else:
                code, detail = _reason(error)
                if code == "internal":
                    log.exception("task_failed", task=task.id, kind=task.kind)
                self._end(task, "failed", {"code": code, "detail": detail})
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
                if task.status in OPEN and not task.cancel_requested and not self._is_deadly(task):
                    task_rows.start_task(connection, tenant, task_id, attempts=1)
                    return task_rows.task(connection, tenant, task_id)
            if self._is_deadly(task):
                detail = f"the worker has died {task.attempts} times while it ran this task"
                self._end(task, "failed", {"code": "job_killed_worker", "detail": detail})
            else:
                self._end(task, "cancelled", CANCELLED)
            return None

        return patiently(start)

    def _is_deadly(self, task: Task) -> bool:
        return task.status == "running" and task.attempts >= self.storage.settings.job_deaths

    @contextmanager
    def _one_suspect_at_a_time(self, tenant: str, task_id: str) -> Iterator[None]:
        """A task that was running when its worker died waits for its turn: the next death is the fault of one of them alone,
        or of a task that has none against it yet."""
        if not self._is_suspect(tenant, task_id):
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

    def _is_suspect(self, tenant: str, task_id: str) -> bool:
        def look() -> bool:
            with self.storage.database.read() as connection:
                return task_rows.task(connection, tenant, task_id).status == "running"

        try:
            return patiently(look)
        except NotFound:
            return False

    def _put_off(self, task: Task, error: Exception, tries: int) -> dict[str, Any] | None:
        detail = _reason(error)[1]
        if tries >= self.storage.settings.job_tries and not _lasts(error):
            self._end(task, "failed", {"code": "worker_failed", "detail": f"tried {tries} times: {detail}"})
            return None
        wait = min(LONGEST_WAIT, FIRST_WAIT * 3 ** (tries - 1)) * random.uniform(0.5, 1.5)
        log.warning("task_put_off", task=task.id, kind=task.kind, seconds=round(wait, 1), error=detail)

        def put_off() -> None:
            with self.storage.database.write() as connection:
                message = f"to be tried again within {wait:.0f} s: {detail}"
                task_rows.stop_task(connection, task.tenant_id, task.id, message[:300], attempts=0)

        patiently(put_off)
        return {"seconds": wait, "tries": min(tries + 1, self.storage.settings.job_tries)}

    def _end(
        self, task: Task, status: str, error: Mapping[str, str] | None = None, result: Mapping[str, Any] | None = None
    ) -> None:
        """Ends a task, unless it has ended; the video of an indexing task that did not succeed fails with the same reason."""

        def end() -> None:
            with self.storage.database.write() as connection:
                if task.kind == "index_video":
                    video_rows.lock_video(connection, task.tenant_id, task.request["video_id"])
                try:
                    now = task_rows.lock_task(connection, task.tenant_id, task.id)
                except NotFound:
                    return
                if now.status in OPEN:
                    if task.kind == "index_video" and error is not None:
                        video_rows.set_video(connection, task.tenant_id, task.request["video_id"], status="failed", error=error)
                    why = error if status == "failed" else None
                    task_rows.end_task(connection, task.tenant_id, task.id, status, error=why, result=result or now.result)

        patiently(end)
        if task.kind == "train_adapter":
            train.discard(self.storage, task)
        elif task.kind == "import_collection":
            import_collection.discard(self.storage, task)


class Report:
    """The progress of a task: shown at most twice a second, and never less than before.

    Raises Cancelled where its owner has asked for it; does not return once the worker stops. `advanced`: whether this start
    has come further than all before, which clears the task of suspicion.
    """

    def __init__(self, shift: Shift, task: Task) -> None:
        self.advanced = False
        self._shift, self._task = shift, task
        self._before = self._best = task.progress
        self._message = task.message
        self._last = time.monotonic()

    def __call__(self, progress: float, message: str) -> None:
        self._shift.pause_if_stopping(self._task)
        if time.monotonic() - self._last >= REPORT_SECONDS:
            self.check()
            best = max(self._best, round(progress, 6))
            if (best, message) != (self._best, self._message):
                self._best, self._message = best, message
                cleared = {"attempts": 1} if best > self._before and not self.advanced else {}
                with self._shift.storage.database.write() as connection:
                    values = {"progress": best, "message": message, **cleared}
                    task_rows.set_task(connection, self._task.tenant_id, self._task.id, **values)
                self.advanced = best > self._before
            self._last = time.monotonic()

    def check(self) -> None:
        self._shift.pause_if_stopping(self._task)
        with self._shift.storage.database.read() as connection:
            try:
                task = task_rows.task(connection, self._task.tenant_id, self._task.id)
            except NotFound:
                raise Cancelled from None
        if task.cancel_requested or task.status not in OPEN:
            raise Cancelled


class _Spread:
    def __init__(self, jobs: Jobs, task: Task) -> None:
        self._jobs, self._task = jobs, task

    def __call__(self, generation: Generation, chunks: Sequence[Sequence[str]], progress: Progress) -> None:
        """Returns when every chunk has been tried; those of a worker that died may be missing. Raises ChunkFailed."""
        jobs, task = self._jobs, self._task
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
                        raise ChunkFailed(**failure)
                    done += out.pop(workflow)
                progress(done, total)
        finally:
            if out:
                jobs.withdraw_chunks(task.id)


def _index_video(shift: Shift, task: Task, report: Report) -> None:
    def tell(share: float | None) -> None:
        report(0.0 if share is None else 0.5 + 0.5 * share, "decoding" if share is None else "embedding")

    index.index_video(
        shift.storage, shift.encoder, shift.decoders, task.tenant_id, task.request["video_id"], tell
    )  # ends its task itself, with the video


def _train_adapter(shift: Shift, task: Task, report: Report) -> dict[str, Any]:
    def waited_for() -> bool:
        return bool(shift.others_wait_for_training(task))

    shift.take_turn(task)
    return train.train_adapter(
        shift.storage,
        shift.encoder,
        shift.decoders,
        shift.trainers,
        task.tenant_id,
        task,
        report,
        shift.spread(task),
        waited_for,
    )


def _activate(shift: Shift, task: Task, report: Report) -> dict[str, Any]:
    return train.activate_adapter(
        shift.storage, shift.encoder, shift.decoders, task.tenant_id, task, report, shift.spread(task)
    )


def _evaluate(shift: Shift, task: Task, report: Report) -> dict[str, Any]:
    with shift.storage.database.read() as connection:
        name = collection_rows.collection_name(connection, task.tenant_id, str(task.collection_id))
    found = train.evaluate(shift.storage, shift.encoder, task.tenant_id, name, task.request["split"]).found
    report.check()
    return found.to_json(intervals=True)


def _purge(shift: Shift, task: Task, report: Report) -> dict[str, Any]:
    return delete.purge(shift.storage, task)


def _import_collection(shift: Shift, task: Task, report: Report) -> dict[str, Any]:
    return import_collection.import_for_task(shift.storage, shift.encoder, shift.decoders, task, report, shift.start_indexing)


KINDS: dict[str, Callable[[Shift, Task, Report], dict[str, Any] | None]] = {
    "index_video": _index_video,
    "train_adapter": _train_adapter,
    "activate": _activate,
    "evaluate": _evaluate,
    "purge": _purge,
    "import_collection": _import_collection,
}


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


def _may_pass(error: Exception) -> bool:
    if isinstance(error, TrainingFailed):
        return error.code in TRAINING_MAY_PASS
    if isinstance(error, ChunkFailed):
        return error.code is None
    lasting = isinstance(error, OSError) and error.errno in LASTING
    return isinstance(error, MAY_PASS) and not isinstance(error, tuple(CODES)) and not lasting


def _lasts(error: Exception) -> bool:
    """Whether it is a fault of the machine, such as a full disk, for whose end a task waits as long as it takes."""
    if isinstance(error, TrainingFailed):  # another process's words
        return error.code == "io_error" and any(os.strerror(number) in str(error) for number in ERRNO)
    return error.lasts if isinstance(error, ChunkFailed) else fault_of(error) is not None


def _reason(error: Exception) -> tuple[str, str]:
    """The code and the words of a failure."""
    if isinstance(error, TrainingFailed | ImportFailed | ChunkFailed):
        return error.code or "worker_failed", str(error)
    known = next((code for kind, code in CODES.items() if isinstance(error, kind)), None)
    if known is not None:
        return known, str(error)
    words = str(error.orig) if isinstance(error, DBAPIError) else str(error)
    code = "worker_failed" if isinstance(error, OSError | obstore.exceptions.BaseError) else "internal"
    return code, f"{type(error).__name__}: {words}"
