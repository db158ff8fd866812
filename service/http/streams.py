"""Streams of server-sent events: counted by key."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.errors import PolyclipError
from service.http.auth import Services
from service.storage.keys import Caller

RETRY_SECONDS = 2  # after which a client that was cut off comes back


class TooManyStreams(PolyclipError):
    """This key holds as many event streams as a key may."""

    code, status, hint = "too_many_streams", 429, "close a stream first"


class EventStream(StreamingResponse):
    """Counts as one of its key's streams until it ends."""

    def __init__(self, content: AsyncIterator[str], services: Services, who: Caller) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self._streams, self._key = services.streams, who.key_id
        self._streams[self._key] += 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._streams[self._key] -= 1
            if not self._streams[self._key]:
                del self._streams[self._key]


def check_streams(services: Services, who: Caller) -> None:
    """Raises TooManyStreams."""
    if services.streams[who.key_id] >= (most := services.storage.settings.event_streams):
        raise TooManyStreams(f"this key holds {most} event streams open, as many as a key may")


def last_told(header: str | None) -> int | None:
    """The number in `Last-Event-ID`; None without one."""
    return int(header) if header is not None and re.fullmatch("[0-9]{1,18}", header) else None
