"""What happens to every request: an id, a count, a time, and a limit on bodies that are read into memory."""

from __future__ import annotations

import asyncio
import re
import time

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from service.errors import PolyclipError
from service.storage.tables import new_id

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")  # that a client may choose; another one is passed over


class BodyTooLarge(PolyclipError, HTTPException):  # FastAPI calls every other exception out of a body's stream a syntax error
    """A body is over the limit of its route."""

    code, status, hint = "body_too_large", 413, "send less in one request"

    def __init__(self, detail: str) -> None:
        super().__init__(413, detail)

    def __str__(self) -> str:
        return self.detail


class Metrics:
    """Prometheus metrics of one application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("method", "route", "status")
        self.requests = Counter("polyclip_requests", "Answered HTTP requests.", labels, registry=self.registry)
        self.seconds = Histogram("polyclip_request_seconds", "Time to answer.", ("route",), registry=self.registry)


def content_length(headers: Headers) -> int:
    """What the client says; 0 where it says nothing, or no number."""
    told = headers.get("content-length", "")
    return int(told) if len(told) < 20 and told.isascii() and told.isdigit() else 0


class Head:
    """ASGI middleware: HEAD is answered as GET is, without the body; what would make the body is ended."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        answered = asyncio.Event()

        async def bodiless(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b""})
                answered.set()

        answer = asyncio.ensure_future(self._app({**scope, "method": "GET"}, receive, bodiless))
        head = asyncio.ensure_future(answered.wait())
        try:
            await asyncio.wait((answer, head), return_when=asyncio.FIRST_COMPLETED)
        finally:
            head.cancel()
            if answered.is_set():
                answer.cancel()
            await asyncio.wait((answer,))
        if not answered.is_set():
            answer.result()


class Observe:
    """ASGI middleware: `X-Request-Id` on every answer, metrics by route, BodyTooLarge while a too large body is read.

    The id is the client's, or a new one; every log line of the request bears it.
    The limit is `body_bytes` in the request's state. A route that takes more says so there before it reads.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, body_bytes: int) -> None:
        self._app = app
        self._metrics = metrics
        self._body_bytes = body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, taken = time.perf_counter(), 500, 0
        asked = Headers(scope=scope).get("x-request-id", "")
        request_id = asked if REQUEST_ID.fullmatch(asked) else new_id("req")
        state = scope.setdefault("state", {})
        state["request_id"], state["body_bytes"] = request_id, self._body_bytes

        async def counted() -> Message:
            nonlocal taken
            limit = state["body_bytes"]
            if not taken and content_length(Headers(scope=scope)) > limit:
                raise BodyTooLarge(f"the body is over the limit of {limit} bytes")
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > limit:
                raise BodyTooLarge(f"the body is over the limit of {limit} bytes")
            return message

        async def labelled(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            with bound_contextvars(request_id=request_id):
                await self._app(scope, counted, labelled)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self._metrics.requests.labels(scope["method"], route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - started)
