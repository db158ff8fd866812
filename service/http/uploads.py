"""Receiving a file: streamed to disk under a limit, hashed on the way; the client's file name is only a label."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from anyio import to_thread
from starlette.requests import Request

from service.http.middleware import content_length
from service.http.multipart import Malformed, Multipart, Target
from service.storage.rows import parse_json
from service.videos.accept import InvalidUpload, label
from service.videos.incoming import EmptyFile, FileTooLarge, Incoming

FIELD_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Upload:
    """A received file in the scratch folder, and the other parts' text."""

    path: Path
    filename: str
    sha256: str
    size: int
    fields: dict[str, str] = field(default_factory=dict)

    def json_field(self, name: str, kind: type) -> Any:
        """A part that holds JSON of this type; None where it was not sent. Raises InvalidUpload."""
        if name not in self.fields:
            return None
        try:
            value = parse_json(self.fields[name])
        except ValueError as error:
            raise InvalidUpload(f"the part {name!r} is {error}") from error
        if not isinstance(value, kind):
            raise InvalidUpload(f"the part {name!r} must be a JSON {'object' if kind is dict else 'list'}")
        return value


class _Text:
    """Keeps a small part in memory."""

    def __init__(self, name: str, limit: int = FIELD_BYTES) -> None:
        self._name, self._limit = name, limit
        self.value = bytearray()
        self.seen = self.whole = False

    def begin(self, filename: str | None) -> None:
        if self.seen:
            raise InvalidUpload("there is more than one part of a name")
        self.seen = True

    def take(self, data: bytes) -> None:
        self.value += data
        if len(self.value) > self._limit:
            raise InvalidUpload(f"the part {self._name!r} is over {self._limit} bytes")

    def end(self) -> None:
        self.whole = True


class _File(Incoming):
    """The part `file`."""

    def __init__(self, path: Path, limit: int, video: bool) -> None:
        super().__init__(path, limit, video)
        self.filename: str | None = None
        self.whole = False

    def begin(self, filename: str | None) -> None:
        if self.opened:
            raise InvalidUpload("there is more than one part 'file'")
        self.filename = filename
        self.open()

    def end(self) -> None:
        self.finish()
        self.whole = True


async def receive(request: Request, scratch: Path, limit: int, fields: tuple[str, ...] = (), video: bool = True) -> Upload:
    """The part `file` of a multipart body, in a new file of `scratch` that the caller must move or remove.

    Raises InvalidUpload, EmptyFile, FileTooLarge and, for a `video`, UnsupportedMedia; nothing is left behind then.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise InvalidUpload("send multipart/form-data with a part 'file'")
    request.state.body_bytes = limit + len(fields) * FIELD_BYTES + 65536
    if content_length(request.headers) > request.state.body_bytes:
        raise FileTooLarge(f"the file is over the limit of {limit} bytes")
    with NamedTemporaryFile(dir=scratch, prefix="upload-", delete=False) as handle:
        path = Path(handle.name)
    target = _File(path, limit, video)
    try:
        values = {name: _Text(name) for name in fields}
        try:
            parser = Multipart(request.headers["content-type"], {**values, "file": target})
            async for chunk in request.stream():
                await to_thread.run_sync(parser.feed, chunk, limiter=request.app.state.services.receiving)
        except Malformed as error:
            raise InvalidUpload(f"the multipart body is broken: {error}") from error
        if not target.opened:
            raise InvalidUpload("there is no part 'file'")
        if not target.whole:
            raise InvalidUpload("the multipart body breaks off within the part 'file'")
        if target.size == 0:
            raise EmptyFile("the file is empty")
        texts = {name: _decoded(name, value.value) for name, value in values.items() if value.value}
        return Upload(path, label(target.filename), target.sha256, target.size, texts)
    except BaseException:
        path.unlink(missing_ok=True)
        with suppress(OSError):  # the disk may be full: what is buffered cannot be written
            target.close()
        raise


class _Parts(dict[str, Target]):
    """The parts that a form may have; any other is refused."""

    def get(self, name: str, default: Any = None) -> Any:
        if name not in self:
            raise InvalidUpload(f"there is no field {name!r:.80}")
        return self[name]


async def receive_form(request: Request, file: str, limit: int, fields: Collection[str]) -> tuple[bytes, dict[str, str]]:
    """The bytes of the part `file` of a multipart body, kept in memory, and the text of the other parts, none but `fields`.

    Raises InvalidUpload, BodyTooLarge.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise InvalidUpload(f"send multipart/form-data with a part {file!r}")
    request.state.body_bytes = limit + request.state.body_bytes
    parts = {name: _Text(name, limit if name == file else FIELD_BYTES) for name in (file, *fields)}
    try:
        parser = Multipart(request.headers["content-type"], _Parts(parts))
        async for chunk in request.stream():
            parser.feed(chunk)
    except Malformed as error:
        raise InvalidUpload(f"the multipart body is broken: {error}") from error
    if not parts[file].whole:
        raise InvalidUpload(f"there is no whole part {file!r}")
    data = bytes(parts.pop(file).value)
    return data, {name: _decoded(name, part.value) for name, part in parts.items() if part.whole}


def _decoded(name: str, data: bytes | bytearray) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidUpload(f"the part {name!r} is not UTF-8 text (byte {error.start})") from error
