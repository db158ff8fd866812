"""What happens to every request: an id, a count, a time, and a limit on bodies that are read into memory."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.records import new_id

BODY_BYTES = 8 * 1024 * 1024  # of a body that is not multipart; uploads have their own limit


class BodyTooLarge(HTTPException):  # FastAPI calls every other exception out of a body's stream a syntax error
    """A body that is not an upload is over the limit."""

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


class Observe:
    """ASGI middleware: `X-Request-Id` on every answer, metrics by route, BodyTooLarge while a too large body is read."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, request_id, status, taken = time.perf_counter(), new_id("req"), 500, 0
        scope.setdefault("state", {})["request_id"] = request_id
        limited = not Headers(scope=scope).get("content-type", "").lower().startswith("multipart/")

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if limited and taken > BODY_BYTES:
                raise BodyTooLarge(f"the body is over the limit of {BODY_BYTES} bytes")
            return message

        async def labelled(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, counted, labelled)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self._metrics.requests.labels(scope["method"], route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - started)
