"""Every error that has a name: its code, its HTTP status, and what whoever meets it can do.

The classes of `service` bear these themselves (`PolyclipError`); here are those of the lower packages, which know no HTTP, and
what the machine refuses. HTTP, the jobs and the command line ask `describe`; what it does not know is our own fault.
"""

from __future__ import annotations

import errno
import importlib
import os
import pkgutil
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnectionFree


class PolyclipError(Exception):
    """What a caller can mend; the message says what is wrong, in words that he may read."""

    code: str = "internal"
    status: ClassVar[int | None] = None  # None: does not happen over HTTP
    task_code: ClassVar[str | None] = None  # of a task that fails with it, where that is not `code`
    hint: ClassVar[str] = ""


class Kind(NamedTuple):
    code: str
    status: int | None  # as above
    task_code: str | None  # None: by the worker's own rules
    hint: str


_AGAIN = "try again after `Retry-After` seconds"
_UPLOAD_ANEW = "train or import the adapter anew"
OTHERS = {  # by module and class; a subclass without an entry has its parent's
    "adapters_store.artifact:AdapterMismatch": Kind(
        "adapter_mismatch", 422, "adapter_unusable", "take an adapter that was made for this backbone"
    ),
    "adapters_store.artifact:InvalidAdapter": Kind("invalid_adapter", 422, "adapter_unusable", "send a whole adapter file"),
    "adapters_store.artifact:DamagedAdapter": Kind("adapter_damaged", 503, "adapter_unusable", _UPLOAD_ANEW),
    "adapters_store.residency:LeaseTimeout": Kind("overloaded", 503, None, _AGAIN),
    "backbone.batcher:BatcherFull": Kind("overloaded", 503, None, _AGAIN),
    "backbone.batcher:DeadlinePassed": Kind("overloaded", 503, None, _AGAIN),
    "builtins:TimeoutError": Kind("overloaded", 503, None, _AGAIN),
    "backbone.batcher:BatcherClosed": Kind("shutting_down", 503, None, _AGAIN),
    "backbone.load:BackboneNotFound": Kind("backbone_not_found", 503, "backbone_not_found", "mend --backbone and --pretrained"),
    "backbone.towers.tower:UnsupportedBackbone": Kind(
        "unsupported_backbone", 503, "unsupported_backbone", "take another backbone"
    ),
    "indexer.pictures:InvalidImage": Kind(
        "invalid_image", 422, None, "send JPEG, PNG, WebP, GIF or BMP of at most 20 megapixels"
    ),
    "indexer.frames:DamagedFrames": Kind("frames_damaged", 503, "frames_damaged", "`polyclip fsck --deep --repair`"),
    "training.recipe:InvalidRecipe": Kind("invalid_recipe", 422, "invalid_recipe", "mend the field (docs/training.md)"),
    "training.dataset:InvalidDataset": Kind("invalid_dataset", None, "invalid_dataset", "mend the file (docs/datasets.md)"),
    "training.published:InvalidCorpus": Kind("invalid_dataset", None, "invalid_dataset", "mend the folder (docs/datasets.md)"),
}

Fault = Literal["full", "read_only", "busy", "crowded"]
FAULTS: dict[Fault, tuple[str, int, str, int, str]] = {  # code, status, detail, seconds to wait, what to do
    "full": ("insufficient_storage", 507, "the disk is full: nothing was stored; searches go on", 60, "free space"),
    "read_only": (
        "storage_read_only", 503, "the disk cannot be written to: nothing was stored; searches go on", 60,
        "make the data folder writable",
    ),
    "busy": ("database_busy", 503, "another process has held the database's write lock for too long", 5, _AGAIN),
    "crowded": ("overloaded", 503, "all connections to the database are in use", 2, _AGAIN),
}  # fmt: skip
ERRNO: dict[int, Fault] = {
    errno.ENOSPC: "full",
    errno.EDQUOT: "full",
    errno.EFBIG: "full",
    errno.EROFS: "read_only",
    errno.EACCES: "read_only",
}
SQLITE: dict[int, Fault] = {  # extended result codes, or the primary ones in their last byte
    sqlite3.SQLITE_FULL: "full",
    sqlite3.SQLITE_IOERR_SHMSIZE: "full",
    sqlite3.SQLITE_READONLY: "read_only",
    sqlite3.SQLITE_IOERR_WRITE: "read_only",
    sqlite3.SQLITE_IOERR_FSYNC: "read_only",
    sqlite3.SQLITE_IOERR_TRUNCATE: "read_only",
    sqlite3.SQLITE_BUSY: "busy",
}
POSTGRESQL: dict[str, Fault] = {
    "53100": "full",
    "25006": "read_only",
    "55P03": "busy",  # lock_timeout
    "40P01": "busy",  # deadlock
    "40001": "busy",  # serialization failure
    "53300": "crowded",  # too many connections
}


@dataclass(frozen=True, slots=True)
class Described:
    """An error as it is told: `status` over HTTP, None where it does not happen there; `task_code` of a task that it fails,
    None where the worker decides; `retry_after` in seconds."""

    code: str
    status: int | None
    detail: str
    task_code: str | None = None
    retry_after: float | None = None


def describe(error: BaseException) -> Described | None:
    """What to tell of an error; None for a fault of ours."""
    wait: float | None = getattr(error, "retry_after", None)
    if isinstance(error, PolyclipError):
        return Described(error.code, error.status, str(error), error.task_code or error.code, wait)
    if (fault := fault_of(error)) is not None:
        code, status, detail, seconds, _ = FAULTS[fault]
        return Described(code, status, detail, retry_after=seconds)
    for cls in type(error).__mro__:
        if (kind := OTHERS.get(f"{cls.__module__}:{cls.__qualname__}")) is not None:
            return Described(kind.code, kind.status, str(error) or "the answer took too long", kind.task_code, wait)
    if isinstance(error, OperationalError):
        return Described("database_unavailable", 503, "the database does not answer")
    return None


def line(error: Exception) -> str | None:
    """What the command line says of an error, which may name files of this machine; None for a fault of ours."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"setting POLYCLIP_{str(first['loc'][0]).upper()}: {first['msg']}" if first["loc"] else first["msg"]
    if isinstance(error, OperationalError):
        return f"the database does not answer: {error.orig}"
    if isinstance(error, OSError):
        where = f": {os.fspath(error.filename)}" if error.filename else ""
        return f"{error.strerror or error}{where}"
    told = describe(error)
    return None if told is None else " ".join(told.detail.split())


def fault_of(error: BaseException) -> Fault | None:
    """What the machine has refused, of an OSError or a database's error; None for everything else."""
    if isinstance(error, OSError):
        return ERRNO.get(error.errno or 0)
    if isinstance(error, NoConnectionFree):
        return "crowded"
    if isinstance(error, DBAPIError):
        if (code := getattr(error.orig, "sqlite_errorcode", None)) is not None:
            return SQLITE.get(code, SQLITE.get(code & 0xFF))
        return POSTGRESQL.get(getattr(error.orig, "sqlstate", None) or "")
    return None


def as_markdown() -> str:
    """The table of docs/errors.md."""
    rows = [(cls.__name__, Kind(cls.code, cls.status, cls.task_code, cls.hint)) for cls in _classes()]
    rows += [(name.split(":")[1], kind) for name, kind in OTHERS.items()]
    rows += [(f"(machine: {fault})", Kind(code, status, None, hint)) for fault, (code, status, _, _, hint) in FAULTS.items()]
    rows.append(("(machine: no database)", Kind("database_unavailable", 503, None, _AGAIN)))
    head = "| error | code | HTTP | of a task | what to do |\n| --- | --- | --- | --- | --- |\n"
    told = ((name, kind, "" if kind.task_code in (None, kind.code) else f"`{kind.task_code}`") for name, kind in sorted(rows))
    return head + "".join(f"| {n} | `{k.code}` | {k.status or '–'} | {task} | {k.hint} |\n" for n, k, task in told)


def _classes() -> Iterator[type[PolyclipError]]:
    import service

    for module in pkgutil.walk_packages(service.__path__, "service."):
        if "__main__" not in module.name and "migrations" not in module.name:
            importlib.import_module(module.name)
    found = list(PolyclipError.__subclasses__())
    while found:
        cls = found.pop()
        found += cls.__subclasses__()
        if cls.__module__.startswith("service."):
            yield cls
