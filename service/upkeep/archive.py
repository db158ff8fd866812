"""The file that carries a collection: a plain tar, written as a stream and read without trust.

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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from service.storage.rows import parse_json

FORMAT = "polyclip-archive/1"
BLOCK, CHUNK = tarfile.BLOCKSIZE, 1 << 20
JSON_BYTES = 16 << 20  # of one JSON member
FIRST, LAST, CONTENTS = "manifest.json", "SHA256SUMS", "contents.json"
NAMES = re.compile(
    rf"{re.escape(FIRST)}|{re.escape(CONTENTS)}|{LAST}|adapters/[0-9a-f]{{64}}\.(json|safetensors)"
    r"|videos/vid_[a-z0-9_]{1,32}/(video\.json|frames\.zip|file|thumbnails/[0-9]{4,6}\.jpg"
    r"|vectors/gen_[a-z0-9]{1,32}\.safetensors)"
)


class InvalidArchive(ValueError):
    """The file is no archive of ours, or torn, or changed; nothing of it has been taken in."""


class Writer:
    """The bytes of an archive, member by member; holds no more of one than a chunk."""

    def __init__(self, sums: BinaryIO, modified: float) -> None:
        """`sums` is an empty file for the checksums to grow in; `modified` is every member's Unix time."""
        self._sums, self._modified = sums, modified

    def member(self, name: str, size: int, data: Iterable[bytes]) -> Iterator[bytes]:
        """A member of `size` bytes, which `data` gives."""
        info = tarfile.TarInfo(name)
        info.size, info.mtime, info.mode = size, int(self._modified), 0o644
        yield info.tobuf(tarfile.GNU_FORMAT)
        digest, left = hashlib.sha256(), size
        for chunk in data:
            digest.update(chunk)
            left -= len(chunk)
            yield chunk
        if left:
            raise OSError(f"{name} had {size} bytes, and gave {size - left}")
        yield bytes(-size % BLOCK)
        self._sums.write(f"{digest.hexdigest()}  {name}\n".encode())

    def whole(self, name: str, data: bytes) -> Iterator[bytes]:
        return self.member(name, len(data), [data])

    def end(self) -> Iterator[bytes]:
        """The checksums, which say that the archive is whole, and the end of the tar."""
        size = self._sums.tell()
        self._sums.seek(0)
        yield from self.member(LAST, size, iter(lambda: self._sums.read(CHUNK), b""))
        yield bytes(2 * BLOCK)


@dataclass(frozen=True, slots=True)
class Member:
    name: str
    size: int
    offset: int  # of its bytes in the file

    @property
    def folder(self) -> str:
        """`videos/ID` of all that belongs to one video, else `adapters`, or the name itself."""
        parts = self.name.split("/")
        return "/".join(parts[:2]) if parts[0] == "videos" else parts[0]


class Archive:
    """An archive file, open for reading. Raises InvalidArchive wherever it is not what `Writer` writes."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self.size = os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def members(self) -> Iterator[Member]:
        """Every member in order, from header to header; the reader may seek in between."""
        position = 0
        while True:
            self._file.seek(position)
            header = self._file.read(BLOCK)
            if not header.strip(b"\0") and len(header) == BLOCK:
                if position + 2 * BLOCK != self.size or self._file.read(BLOCK).strip(b"\0"):
                    raise InvalidArchive("the archive is torn, or goes on after its end")
                return
            try:
                info = tarfile.TarInfo.frombuf(header, "ascii", "strict")
            except (tarfile.HeaderError, ValueError) as error:
                raise InvalidArchive(f"no archive of polyclip, or a torn one: {error} at byte {position}") from error
            if info.type != tarfile.REGTYPE or not NAMES.fullmatch(info.name) or info.linkname or info.size < 0:
                raise InvalidArchive(f"an archive of polyclip has no member {info.name!r:.100} of type {info.type!r}")
            member = Member(info.name, info.size, position + BLOCK)
            position = member.offset + member.size + -member.size % BLOCK
            if position > self.size:
                raise InvalidArchive(f"the archive is torn: {member.name} claims {member.size} bytes")
            yield member

    def chunks(self, member: Member) -> Iterator[bytes]:
        self._file.seek(member.offset)
        left = member.size
        while left:
            chunk = self._file.read(min(left, CHUNK))
            if not chunk:
                raise InvalidArchive(f"the archive is torn in {member.name}")
            left -= len(chunk)
            yield chunk

    def read(self, member: Member, limit: int) -> bytes:
        """A member's bytes, if they are not more than `limit`."""
        if member.size > limit:
            raise InvalidArchive(f"{member.name} may have {limit} bytes, it has {member.size}")
        return b"".join(self.chunks(member))

    def json(self, member: Member) -> dict[str, Any]:
        try:
            value = parse_json(self.read(member, JSON_BYTES).decode())
        except ValueError as error:
            raise InvalidArchive(f"{member.name}: {error}"[:300]) from error
        if not isinstance(value, dict):
            raise InvalidArchive(f"{member.name} is no JSON object")
        return value

    def manifest(self) -> dict[str, Any]:
        """The first member, for an archive of this format."""
        first = next(self.members(), None)
        if first is None or first.name != FIRST:
            raise InvalidArchive("no archive of polyclip: it does not begin with its manifest")
        manifest = self.json(first)
        if manifest.get("format") != FORMAT:
            raise InvalidArchive(f"an archive of the format {manifest.get('format')!r:.60}; this version reads {FORMAT}")
        return manifest

    def verify(self, progress: Callable[[float], None]) -> dict[str, Any]:
        """Reads everything against the checksums; returns `contents.json`. `progress` is told the share that is done."""
        self.manifest()
        sums, last, contents, reached = hashlib.sha256(), "", None, 0
        for member in self.members():
            if last == LAST:
                raise InvalidArchive("the archive goes on after its checksums")
            digest = hashlib.sha256()
            for chunk in self.chunks(member):
                digest.update(chunk)
                reached += len(chunk)
                progress(reached / self.size)
            last = member.name
            if last == LAST:
                if digest.digest() != sums.digest():
                    raise InvalidArchive(f"the archive is damaged: {self._damaged(member)} is not what was written")
            else:
                sums.update(f"{digest.hexdigest()}  {member.name}\n".encode())
            if last == CONTENTS:
                contents = self.json(member)
        if last != LAST or contents is None:
            raise InvalidArchive("the archive is torn: its end is not there")
        return contents

    def _damaged(self, sums: Member) -> str:
        """The first member that differs from its line in the checksums."""
        position, end = sums.offset, sums.offset + sums.size
        for member in self.members():
            digest = hashlib.sha256()
            for chunk in self.chunks(member):
                digest.update(chunk)
            self._file.seek(position)
            line = self._file.readline(min(4 * BLOCK, max(0, end - position)))
            position += len(line)
            if line != f"{digest.hexdigest()}  {member.name}\n".encode():
                return member.name
        return LAST


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
