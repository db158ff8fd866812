"""What the machine refuses, told apart: a disk that is full or cannot be written to, a database that is locked or crowded."""

from __future__ import annotations

import errno
import sqlite3
from typing import Literal

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnectionFree

Fault = Literal["full", "read_only", "busy", "crowded"]

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


def fault_of(error: BaseException) -> Fault | None:
    """Of an OSError or of a database's error; None for everything else."""
    if isinstance(error, OSError):
        return ERRNO.get(error.errno or 0)
    if isinstance(error, NoConnectionFree):
        return "crowded"
    if isinstance(error, DBAPIError):
        if (code := getattr(error.orig, "sqlite_errorcode", None)) is not None:
            return SQLITE.get(code, SQLITE.get(code & 0xFF))
        return POSTGRESQL.get(getattr(error.orig, "sqlstate", None) or "")
    return None
