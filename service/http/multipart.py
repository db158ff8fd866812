"""multipart/form-data (RFC 7578, RFC 2046 section 5.1) as it streams in: parts to their targets, heads and number bounded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Protocol
from urllib.parse import unquote_to_bytes

PARTS = 64
HEAD_BYTES = 8192  # of one part
PREAMBLE_BYTES = 65536
PADDING_BYTES = 1024  # after a boundary, on its line
# By regular expression: the standard library's parser takes seconds for 8 KiB of parameters.
PARAMETER = re.compile(r""";[ \t]*([^\s;="]+)[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^\s;"]*))""")


class Malformed(ValueError):
    """The body is no multipart/form-data, or over a limit of it."""


class Target(Protocol):
    """What takes the part of a name."""

    def begin(self, filename: str | None) -> None: ...
    def take(self, data: bytes) -> None: ...
    def end(self) -> None: ...


class Multipart:
    """`feed` takes the body piece by piece, calls the targets by the names of parts, and passes over other parts.

    Raises Malformed, and what a target raises.
    """

    def __init__(self, content_type: str, targets: Mapping[str, Target]) -> None:
        if len(content_type) > HEAD_BYTES:
            raise Malformed(f"the content type is over {HEAD_BYTES} bytes")
        kind, parameters = _parsed(content_type)
        boundary = parameters.get("boundary")
        if kind != "multipart/form-data" or not boundary:
            raise Malformed("the content type is not multipart/form-data with a boundary")
        self._mark = b"\r\n--" + boundary.encode()
        self._targets = targets
        self._target: Target | None = None
        self._read = self._content
        self._kept = b"\r\n"  # a body may begin with its first boundary
        self._started, self._parts, self._preamble = False, 0, 0

    def feed(self, data: bytes) -> None:
        self._kept += data
        while self._read():
            pass

    def _content(self) -> bool:
        """What stands before the next boundary: of a part, or before the first one."""
        at = self._kept.find(self._mark)
        end = at if at >= 0 else max(0, len(self._kept) - len(self._mark) + 1)
        self._give(self._kept[:end])
        self._kept = self._kept[end + len(self._mark) if at >= 0 else end :]
        if at >= 0:
            self._read = self._boundary
        return at >= 0

    def _boundary(self) -> bool:
        """The rest of a boundary's line; content, if it is none."""
        if self._kept.startswith(b"--"):
            self._finish()
            self._read = self._epilogue
            return True
        end = self._kept.find(b"\r\n")
        if end < 0 and len(self._kept) <= PADDING_BYTES:
            return False
        if end < 0 or self._kept[:end].strip(b" \t"):
            self._give(self._mark)
            self._read = self._content
            return True
        self._finish()
        self._started, self._parts = True, self._parts + 1
        if self._parts > PARTS:
            raise Malformed(f"there are more than {PARTS} parts")
        self._kept = self._kept[end:]
        self._read = self._head
        return True

    def _head(self) -> bool:
        end = self._kept.find(b"\r\n\r\n")
        if max(end, 0) > HEAD_BYTES or (end < 0 and len(self._kept) > HEAD_BYTES):
            raise Malformed(f"the headers of a part are over {HEAD_BYTES} bytes")
        if end < 0:
            return False
        try:
            text = self._kept[2:end].decode()
        except UnicodeDecodeError:
            text = self._kept[2:end].decode("latin-1")
        self._kept = self._kept[end + 4 :]
        lines = re.sub(r"\r\n[ \t]+", " ", text).split("\r\n")
        value = next((line[20:] for line in lines if line[:20].lower() == "content-disposition:"), "")
        kind, parameters = _parsed(value)
        if kind not in ("form-data", ""):
            raise Malformed("a part is no form-data")
        self._target = self._targets.get(parameters.get("name", ""))
        if self._target is not None:
            self._target.begin(parameters.get("filename"))
        self._read = self._content
        return True

    def _epilogue(self) -> bool:
        self._kept = b""
        return False

    def _give(self, data: bytes) -> None:
        if not self._started:
            self._preamble += len(data)
            if self._preamble > PREAMBLE_BYTES:
                raise Malformed("the body does not begin with its boundary")
        elif self._target is not None and data:
            self._target.take(data)

    def _finish(self) -> None:
        if self._target is not None:
            self._target.end()
            self._target = None


def _parsed(header: str) -> tuple[str, dict[str, str]]:
    """What stands before the parameters, in small letters, and they; of a name that is given twice, the first."""
    parameters: dict[str, str] = {}
    for name, quoted, token in PARAMETER.findall(header):
        parameters.setdefault(name.lower(), re.sub(r'\\(["\\])', r"\1", quoted) or token)
    charset, _, coded = parameters.get("filename*", "").partition("'")
    with suppress(LookupError, ValueError):  # RFC 5987; what cannot be read leaves the plain name
        if coded:
            parameters["filename"] = unquote_to_bytes(coded.partition("'")[2]).decode(charset)
    return header.partition(";")[0].strip().lower(), parameters
