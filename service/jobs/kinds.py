"""What a worker must be told: what to do for each kind of task, and which errors may pass."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import obstore
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnectionFree

from service.errors import PolyclipError, describe, fault_of
from service.jobs.task_rows import Task

if TYPE_CHECKING:
    from service.jobs.run import Report, Runner

PASSING = (OSError, OperationalError, InterfaceError, NoConnectionFree, obstore.exceptions.GenericError, MemoryError)
LASTING = (errno.ENOENT, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
CANCELLED = {"code": "cancelled", "detail": "indexing was cancelled"}  # of the video


class Cancelled(RuntimeError):
    """The task was cancelled by its owner."""


class TurnOver(RuntimeError):
    """The task gives way to another tenant's that waits, and goes on later."""


class JobFailed(PolyclipError):
    """A task cannot be done; the message says why. If it `may_pass`, the task is tried again: a limited number of times, or,
    if it `lasts` like a full disk, as often as it takes."""

    def __init__(self, code: str, detail: str, may_pass: bool = False, lasts: bool = False) -> None:
        super().__init__(detail)
        self.code, self.may_pass, self.lasts = code, may_pass, lasts

    def to_json(self) -> dict[str, Any]:
        return {"code": self.code, "detail": str(self), "may_pass": self.may_pass, "lasts": self.lasts}


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of task. `parts` is what the table's maker works with, handed through as it is.

    `run(parts, runner, task, report)` returns the task's result; None where it has ended the task itself, or the task was
    cancelled. `lock(connection, task)`: rows to be locked before the task's, in the transaction that ends it;
    `failed(connection, task, error)`: in it, without success. `discard(parts, task)`: after its end.
    """

    run: Callable[[Any, Runner, Task, Report], dict[str, Any] | None]
    lock: Callable[[Connection, Task], object] = lambda *_: None
    failed: Callable[[Connection, Task, Mapping[str, str]], object] = lambda *_: None
    discard: Callable[[Any, Task], None] = lambda *_: None


@dataclass(frozen=True, slots=True)
class Kinds:
    """All that a worker can do. `fill(parts, tenant, generation, videos)` embeds a chunk of videos for another task.

    `passing`: errors that may pass, beside those of disk, network, database, object store and memory.
    """

    by_name: dict[str, Kind]
    fill: Callable[[Any, str, str, Sequence[str]], object]
    passing: tuple[type[Exception], ...]

    def explain(self, error: Exception) -> JobFailed:
        """An error as a reason to end a task, or to try it again."""
        if isinstance(error, JobFailed):
            return error
        if (told := describe(error)) is not None and told.task_code is not None:
            return JobFailed(told.task_code, told.detail)
        stays = isinstance(error, OSError) and error.errno in LASTING
        words = str(error.orig) if isinstance(error, DBAPIError) else str(error)
        code = "worker_failed" if isinstance(error, OSError | obstore.exceptions.BaseError) else "internal"
        may_pass = isinstance(error, (*PASSING, *self.passing)) and not stays
        return JobFailed(code, f"{type(error).__name__}: {words}", may_pass, fault_of(error) is not None)
