"""The file of an exported collection: a plain tar, written as a stream and read without trust.

    manifest.json                         format, backbone, collection, adapters, generations
    adapters/DIGEST.json, .safetensors    each adapter version: its manifest, its tensors
    videos/ID/video.json                  name, sha256, facts, metadata, captions
    videos/ID/frames.zip                  the cached frames that every embedding reads
    videos/ID/thumbnails/0000.jpg
    videos/ID/vectors/GENERATION.safetensors
    videos/ID/file                        the uploaded file, if files go along
    contents.json                         how many videos there are, and what was left out
    SHA256SUMS                            of every other member, in their order: `sha256sum -c` reads it

Only regular files of these names are members; nothing in an archive is ever used as a path.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path
from tarfile import TarInfo
from typing import BinaryIO, TypeVar

from service.errors import PolyclipError
from service.upkeep.archive_json import Contents, Manifest, Part
from training.progress import Progress, Tell

BLOCK, CHUNK = tarfile.BLOCKSIZE, 1 << 20
JSON_BYTES = 16 << 20  # of one JSON member
FIRST, LAST, CONTENTS = "manifest.json", "SHA256SUMS", "contents.json"
NAMES = re.compile(
    rf"{re.escape(FIRST)}|{re.escape(CONTENTS)}|{LAST}|adapters/[0-9a-f]{{64}}\.(json|safetensors)"
    r"|videos/vid_[a-z0-9_]{1,32}/(video\.json|frames\.zip|file|thumbnails/[0-9]{4,6}\.jpg"
    r"|vectors/gen_[a-z0-9]{1,32}\.safetensors)"
)
Json = TypeVar("Json", bound=Part)


class InvalidArchive(PolyclipError, ValueError):
    """The file is no archive of this format, or damaged; nothing of it has been taken in."""

    code, status, hint = "invalid_archive", 422, "export the collection anew"


class Writer:
    """The bytes of an archive, member by member, in chunks."""

    def __init__(self, sums: BinaryIO, modified: float) -> None:
        """`sums` is an empty file for the checksums; `modified` is every member's Unix time."""
        self._sums, self._modified = sums, modified

    def member(self, name: str, size: int, data: Iterable[bytes]) -> Iterator[bytes]:
        """A member of `size` bytes, which `data` gives. Raises OSError if it gives more or fewer."""
        info = TarInfo(name)
        info.size, info.mtime = size, int(self._modified)
        yield info.tobuf(tarfile.GNU_FORMAT)
        digest, left = hashlib.sha256(), size
        for chunk in data:
            digest.update(chunk)
            left -= len(chunk)
            yield chunk
        if left:
            raise OSError(f"{name} had {size} bytes, and gave {size - left}")
        yield bytes(-size % BLOCK)
        self._sums.write(_sum(digest.hexdigest(), name))

    def whole(self, name: str, data: bytes) -> Iterator[bytes]:
        return self.member(name, len(data), [data])

    def end(self) -> Iterator[bytes]:
        """The checksums, by which a reader knows that nothing is missing, and the end of the tar."""
        size = self._sums.tell()
        self._sums.seek(0)
        yield from self.member(LAST, size, iter(lambda: self._sums.read(CHUNK), b""))
        yield bytes(2 * BLOCK)


class Archive:
    """An archive file, open for reading. Raises InvalidArchive wherever it is not what `Writer` writes.

    `tarfile.open` would follow headers that rename or resize a member, and read such a header whole whatever its size. So each
    header is taken alone, as `TarInfo` reads it, and only that of a plain file passes.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self.size = os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def members(self) -> Iterator[TarInfo]:
        """Every member in order; the caller may read others in between."""
        position = 0
        while True:
            self._file.seek(position)
            header = self._file.read(BLOCK)
            if header == bytes(BLOCK):
                if self._file.read(BLOCK + 1) != bytes(BLOCK):
                    raise InvalidArchive("the archive is cut off, or goes on after its end")
                return
            try:
                info = TarInfo.frombuf(header, "ascii", "strict")
            except (tarfile.HeaderError, ValueError) as error:
                raise InvalidArchive(f"no archive of polyclip, or cut off: {error} at byte {position}") from error
            if info.type != tarfile.REGTYPE or not NAMES.fullmatch(info.name) or info.linkname or info.size < 0:
                raise InvalidArchive(f"an archive of polyclip has no member {info.name!r:.100} of type {info.type!r}")
            info.offset_data = position + BLOCK
            position = info.offset_data + info.size + -info.size % BLOCK
            if position > self.size:
                raise InvalidArchive(f"the archive is cut off: {info.name} claims {info.size} bytes")
            yield info

    def chunks(self, info: TarInfo) -> Iterator[bytes]:
        self._file.seek(info.offset_data)
        left = info.size
        while left:
            chunk = self._file.read(min(left, CHUNK))
            if not chunk:
                raise InvalidArchive(f"the archive is cut off in {info.name}")
            left -= len(chunk)
            yield chunk

    def read(self, info: TarInfo, limit: int) -> bytes:
        """A member's bytes, if they are not more than `limit`."""
        if info.size > limit:
            raise InvalidArchive(f"{info.name} may have {limit} bytes, it has {info.size}")
        return b"".join(self.chunks(info))

    def json(self, info: TarInfo, kind: type[Json]) -> Json:
        try:
            return kind.of(self.read(info, JSON_BYTES))
        except ValueError as error:
            raise InvalidArchive(f"{info.name}: {error}"[:300]) from error

    def manifest(self) -> Manifest:
        """The first member."""
        first = next(self.members(), None)
        if first is None or first.name != FIRST:
            raise InvalidArchive("no archive of polyclip: it does not begin with its manifest")
        return self.json(first, Manifest)

    def verify(self, progress: Tell) -> Contents:
        """Reads everything against the checksums."""
        last, contents = max(self.members(), key=lambda info: info.offset_data, default=None), None
        if last is None or last.name != LAST:
            raise InvalidArchive("the archive is cut off: its end is not there")
        with open(self._file.name, "rb") as sums:
            sums.seek(last.offset_data)
            for info in takewhile(lambda info: info.offset_data != last.offset_data, self.members()):
                digest = hashlib.sha256()
                for chunk in self.chunks(info):
                    digest.update(chunk)
                    progress(Progress("checking the archive", self._file.tell(), self.size))
                line = _sum(digest.hexdigest(), info.name)
                if sums.read(len(line)) != line:
                    raise InvalidArchive(f"the archive is damaged: {info.name} is not what was written")
                if info.name == CONTENTS:
                    contents = self.json(info, Contents)
            if contents is None or sums.tell() != last.offset_data + last.size:
                raise InvalidArchive("the archive is damaged: members are missing")
        return contents


def gathered(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of about a megabyte: headers and paddings are not sent one by one."""
    held: list[bytes] = []
    size = 0
    for chunk in chunks:
        held.append(chunk)
        size += len(chunk)
        if size >= CHUNK:
            yield b"".join(held)
            held, size = [], 0
    yield b"".join(held)


def _sum(digest: str, name: str) -> bytes:
    """A line of the checksums."""
    return f"{digest}  {name}\n".encode()
