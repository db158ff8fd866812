"""Videos, frames, thumbnails and adapters under one root URL: local files by default, an object store by URL.

Keys are made of ids and digests, never of what a client sent. `put` and `put_file` return when the bytes are on disk:
on local files by fsync of the file and its folder, in an object store by the store's own word.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import NamedTemporaryFile, mkstemp
from threading import Lock
from typing import Any
from urllib.parse import unquote, urlsplit

import obstore
from obstore.store import from_url

from adapters_store import durable
from service.errors import PolyclipError

CHUNK = 1024 * 1024
CHUNK_KEYS = 1000
SCRATCH_SECONDS = 24 * 3600


class BlobMissing(PolyclipError):
    """There is no blob of this key."""

    code, status, hint = "file_missing", 404, "`polyclip fsck`; upload the video again"


def video_key(collection: str, video: str) -> str:
    return f"videos/{collection}/{video}"


def frames_key(collection: str, video: str) -> str:
    return f"frames/{collection}/{video}.zip"


def thumbnail_key(collection: str, video: str, ordinal: int) -> str:
    return f"thumbnails/{collection}/{video}/{ordinal:04d}.jpg"


def adapter_key(collection: str, digest: str) -> str:
    return f"adapters/{collection}/{digest}.safetensors"


def archive_key(archive: str) -> str:
    return f"imports/{archive}.tar"


class Blobs:
    """One root; `scratch` must be on the same file system as a local root."""

    def __init__(self, root: str, scratch: Path) -> None:
        self.root = root
        self._scratch = scratch
        parts = urlsplit(root)
        self._folder = Path(unquote(parts.path)) if parts.scheme == "file" else None
        self._making = Lock()
        durable.make_folder(scratch)
        if self._folder is not None:
            durable.make_folder(self._folder)
        self._store: Any = from_url(root)

    def put(self, key: str, data: bytes) -> None:
        descriptor, name = mkstemp(dir=self._scratch)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
            self.put_file(key, Path(name))
        finally:
            Path(name).unlink(missing_ok=True)

    def put_file(self, key: str, path: Path) -> None:
        """Moves a file of the scratch folder in; it replaces a blob of the same key in one step."""
        if self._folder is None:
            with path.open("rb") as file:
                obstore.put(self._store, key, file)
            path.unlink()
            return
        target = self._folder / key
        with self._making:  # who finds a folder here finds it synced
            durable.make_folder(target.parent)
        durable.put_in_place(path, target)

    def get(self, key: str) -> bytes:
        """Raises BlobMissing."""
        try:
            return bytes(obstore.get(self._store, key).bytes())
        except (FileNotFoundError, obstore.exceptions.NotFoundError) as error:
            raise BlobMissing(key) from error

    def size(self, key: str) -> int:
        """Bytes of a blob. Raises BlobMissing."""
        try:
            return int(obstore.head(self._store, key)["size"])
        except (FileNotFoundError, obstore.exceptions.NotFoundError) as error:
            raise BlobMissing(key) from error

    def exists(self, key: str) -> bool:
        try:
            self.size(key)
        except BlobMissing:
            return False
        return True

    def stream(self, key: str, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` up to `end`, in chunks."""
        for position in range(start, end, CHUNK):
            yield bytes(obstore.get_range(self._store, key, start=position, end=min(end, position + CHUNK)))

    def delete(self, key: str) -> None:
        """A missing blob is no error: deleting twice is harmless."""
        try:
            obstore.delete(self._store, key)
        except (FileNotFoundError, obstore.exceptions.NotFoundError):
            return

    def delete_all(self, prefix: str) -> None:
        """Every blob under `prefix`, which ends with a slash; of local files the folder too."""
        if self._folder is not None:
            with suppress(FileNotFoundError):
                shutil.rmtree(self._folder / prefix)
            return
        for batch in obstore.list(self._store, prefix, chunk_size=CHUNK_KEYS):
            obstore.delete(self._store, [item["path"] for item in batch])

    def older(self, prefix: str, seconds: float) -> Iterator[list[str]]:
        """Keys under `prefix` of blobs that were written at least so long ago, some at a time."""
        before = datetime.now(UTC) - timedelta(seconds=seconds)
        for batch in obstore.list(self._store, prefix, chunk_size=CHUNK_KEYS):
            yield [item["path"] for item in batch if item["last_modified"] <= before]

    def folders(self, prefix: str) -> list[str]:
        """What stands between `prefix` and the next slash of the keys; on local files empty folders too."""
        found = obstore.list_with_delimiter(self._store, prefix)["common_prefixes"]
        return [path.rstrip("/").rsplit("/", 1)[-1] for path in found]

    def keys(self, prefix: str) -> list[str]:
        """Keys under `prefix`, which ends with a slash."""
        return [item["path"] for batch in obstore.list(self._store, prefix) for item in batch]

    @contextmanager
    def local(self, key: str) -> Iterator[Path]:
        """A local file with the blob's bytes, for the length of the block. Raises BlobMissing."""
        if self._folder is not None:
            path = self._folder / key
            if not path.is_file():
                raise BlobMissing(key)
            yield path
            return
        with NamedTemporaryFile(dir=self._scratch, delete=False) as file:
            path = Path(file.name)
            try:
                for chunk in self.stream(key, 0, self.size(key)):
                    file.write(chunk)
                file.flush()
                yield path
            finally:
                path.unlink(missing_ok=True)

    def sweep_scratch(self) -> None:
        """Removes what a process that died left half-way: everything that nobody has touched for a day."""
        for path in self._scratch.iterdir():
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > SCRATCH_SECONDS:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
