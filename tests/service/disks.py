"""Disks that are full or broken, and machines that lose their power. A disk of its own needs the right to mount."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, megabytes: int = 24) -> Iterator[Path]:
    """An ext4 file system, mounted in `folder`; it takes no writes after its first error. Skips the test without root."""
    image, mount = folder / "image", folder / "disk"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    for command in (f"mkfs.ext4 -q -m0 {image}", f"mount -o loop,errors=remount-ro {image} {mount}"):
        try:
            subprocess.run(command.split(), check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a disk of its own cannot be had here: {error}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


@contextmanager
def full(disk: Path, spare: int = 0) -> Iterator[None]:
    """No more than `spare` bytes are free on the disk for the length of the block."""
    filler = disk / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                try:
                    while file.write(b"\1" * size):
                        pass
                except OSError:
                    os.fsync(file.fileno())
            file.truncate(file.tell() - spare)
            os.fsync(file.fileno())
        yield
    finally:
        filler.unlink()


def break_disk(disk: Path) -> None:
    """The file system finds an error and refuses writes from now on; what is open stays open."""
    device = os.stat(disk).st_dev
    name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
    Path(f"/sys/fs/ext4/{name}/trigger_fs_error").write_text("1")


class Power:
    """What a power failure would leave of the folder `root`, whose own name is safe: each file's bytes, and the names in each
    folder, as they were when it was last given to `os.fsync`. SQLite syncs by itself, unseen here: its files are taken as they
    are. While the block runs, `os.fsync` is watched.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._root, self._fsync = root, os.fsync
        self._bytes: dict[int, bytes] = {}  # by inode
        self._names: dict[int, dict[str, os.DirEntry[str]]] = {}
        self._held: list[int] = []  # as long as a file is open, no other one gets its inode
        monkeypatch.setattr(os, "fsync", self._watch)

    def _watch(self, descriptor: int) -> None:
        self._fsync(descriptor)
        self._held.append(os.dup(descriptor))
        inode, path = os.fstat(descriptor).st_ino, f"/proc/self/fd/{descriptor}"
        if os.path.isdir(path):
            with os.scandir(path) as entries:
                self._names[inode] = {entry.name: entry for entry in entries}
        else:
            self._bytes[inode] = Path(path).read_bytes()

    def fail(self, to: Path) -> Path:
        """Copies what is left into the new folder `to`."""
        self._leave(self._root.stat().st_ino, to)
        for file in self._root.rglob("*.sqlite*"):
            if (folder := to / file.relative_to(self._root).parent).is_dir():
                shutil.copy(file, folder)
        return to

    def _leave(self, inode: int, to: Path) -> None:
        to.mkdir()
        for name, entry in self._names.get(inode, {}).items():
            if entry.is_dir(follow_symlinks=False):
                self._leave(entry.inode(), to / name)
            else:
                (to / name).write_bytes(self._bytes.get(entry.inode(), b""))
