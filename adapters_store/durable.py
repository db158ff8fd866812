"""Files that are whole or not there, also after the power has failed: written aside, synced, renamed, the folder synced. And
who may write them: one process at a time, by a lock on a file that ends with its holder.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def aside(target: Path) -> Iterator[Path]:
    """The path of a file to write; at the end of the block it takes the place of `target` in one step.

    After an error (a full disk, say) it is gone, and what was at `target` is still there.
    """
    part = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.part")
    try:
        yield part
        put_in_place(part, target)
    finally:
        part.unlink(missing_ok=True)


def write(target: Path, data: bytes) -> None:
    with aside(target) as part:
        part.write_bytes(data)


def put_in_place(part: Path, target: Path) -> None:
    """Moves a written file to `target`, on the same file system: its bytes first, then its name."""
    sync(part)
    os.replace(part, target)
    sync(target.parent)


def sync(path: Path) -> None:
    """The bytes of a file, or the names in a folder, are on disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, each synced into its parent, unless they are there."""
    for folder in reversed([p for p in (path, *path.parents) if not p.exists()]):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def lock(file: IO[Any], seconds: float) -> None:
    """Holds an open file until it is closed. Raises TimeoutError if another process holds it so long."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{file.name} is held by another process") from None
            time.sleep(0.2)
