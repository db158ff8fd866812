"""Files that are whole or not there, also after the power has failed: written aside, synced, renamed, the folder synced."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
