"""A file on its way in, from an upload or a URL: written to disk under a limit, hashed and looked at as it comes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from indexer.formats import HEAD_BYTES, looks_like_video
from service.errors import PolyclipError
from service.settings import Settings
from service.storage.rows import QuotaExceeded
from service.storage.tenant_rows import Tenant

SNIFF_BYTES = HEAD_BYTES


class EmptyFile(PolyclipError):
    """The file has no bytes."""

    code, status, hint = "empty_file", 422, "send a file that has bytes"


class FileTooLarge(PolyclipError):
    """The file is over the limit."""

    code, status, hint = "video_too_large", 413, "send less; `POLYCLIP_MAX_VIDEO_BYTES` is the limit"


class UnsupportedMedia(PolyclipError):
    """The bytes do not begin like any video container that the decoders know."""

    code, status, hint = "unsupported_media", 415, "send a container of docs/formats.md"


class Incoming:
    """Writes to disk and hashes; refuses what is over the limit, and what is no video as soon as that can be told.

    Raises FileTooLarge, UnsupportedMedia.
    """

    def __init__(self, path: Path, limit: int, video: bool = True) -> None:
        self._path, self._limit, self._video = path, limit, video
        self.size = 0
        self.opened = False
        self._hash = hashlib.sha256()
        self._head = b""

    def open(self) -> None:
        self._out = self._path.open("wb")
        self.opened = True

    def expect(self, size: int) -> None:
        """What is known before the bytes come."""
        if size > self._limit:
            raise FileTooLarge(f"the file is over the limit of {self._limit} bytes")

    def take(self, chunk: bytes) -> None:
        self.size += len(chunk)
        self.expect(self.size)
        if self._video and len(self._head) < SNIFF_BYTES:
            self._head += chunk[:SNIFF_BYTES]
            if len(self._head) >= SNIFF_BYTES:
                check_container(self._head)
        self._hash.update(chunk)
        self._out.write(chunk)

    def finish(self) -> None:
        self._out.close()
        if self._video and 0 < len(self._head) < SNIFF_BYTES:
            check_container(self._head)

    def close(self) -> None:
        if self.opened:
            self._out.close()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def check_container(head: bytes) -> None:
    """Raises UnsupportedMedia unless `head`, the first bytes of a file, begins like a video container."""
    if not looks_like_video(head):
        raise UnsupportedMedia("this file is no video: it does not begin like any video container")


@contextmanager
def room(settings: Settings, tenant: Tenant) -> Iterator[int]:
    """The most bytes that a video of the tenant may have; FileTooLarge becomes QuotaExceeded where that is its quota."""
    quota = tenant.quotas.get("max_bytes")
    limit = settings.max_video_bytes if quota is None else min(settings.max_video_bytes, quota)
    try:
        yield limit
    except FileTooLarge as error:
        if limit == settings.max_video_bytes:
            raise
        raise QuotaExceeded(f"the tenant may have {quota} bytes: this file alone has more") from error
