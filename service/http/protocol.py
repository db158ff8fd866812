"""What a connection may cost before anything is known of its client: limits on bytes, on time, and on how many there are."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from ipaddress import ip_address, ip_network
from typing import NoReturn

from starlette.requests import Request
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.http.problems import problem
from service.settings import Settings
from service.storage.tables import new_id

HEADER_LINES = 256
PIPELINED = 32  # requests of one connection that wait for the answer to an earlier one
LEAST_RATE = 1024  # bytes a second of a body, beyond the seconds of grace
LINGER_SECONDS, LINGER_BYTES = 5.0, 16 * 1024 * 1024  # of a body that is answered already; a close at once may lose the answer


class LimitedProtocol(HttpToolsProtocol):
    """HTTP/1.1 as uvicorn speaks it, with limits; `limited` gives it the settings, and `sweep` is to be called every second."""

    settings: Settings
    addresses: Counter[str]  # open connections of each

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.logger = logging.getLogger("uvicorn.error.request")
        self.logger.setLevel(logging.ERROR)  # a stranger's broken request is answered, and writes no line
        self._why: tuple[int, str, str] | None = None
        self._heading, self._refused = True, False
        self._unread = 0  # bytes since a head began, or since the last of a body
        self._began: float | None = self.loop.time()  # when the head did
        self._due = 0.0  # when the next of a body is
        self._leave: float | None = None  # when a connection is closed whose body nobody wants
        self._spare = LINGER_BYTES
        self._address = _neighbourhood(self.client[0]) if self.client else ""
        self.addresses[self._address] += 1
        most = self.settings.connections_per_address
        if self._address and 0 < most < self.addresses[self._address]:
            self._refuse(429, "too_many_connections", f"this address has {most} connections open, and may have no more")
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.addresses[self._address] -= 1
        if not self.addresses[self._address]:
            del self.addresses[self._address]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused or self._leave is not None:
            self._spare -= len(data)
            if self._spare < 0:
                self.transport.close()
            if self._refused or self._spare < 0:
                return
        most = self.settings.header_bytes + self.settings.url_bytes
        room = most - self._unread
        self._unread += len(data)
        if not self._heading:
            now = self.loop.time()
            self._due = min(now + self.settings.body_seconds, self._due + len(data) / LEAST_RATE)
        elif self._began is None:
            self._began = self.loop.time()
        if self._heading and len(data) > room:
            super().data_received(data[:room])
            data = data[room:]
            if self._heading and self._unread > most and not self._refused:
                self._too_long()
        if not self._refused and self.parser is not None:
            super().data_received(data)
            if not self._heading and self._unread > most and not self._refused:
                self._too_long()  # the ends of a chunk, or of a chunked body

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self.settings.url_bytes:
            self._fail(414, "url_too_long", f"the URL is over the limit of {self.settings.url_bytes} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._heading:  # what follows a chunked body is nobody's header
            super().on_header(name, value)
            if len(self.headers) > HEADER_LINES:
                self._fail(431, "headers_too_large", f"there are more than {HEADER_LINES} headers")

    def on_headers_complete(self) -> None:
        if sum(len(name) + len(value) + 4 for name, value in self.headers) > self.settings.header_bytes:
            self._fail(431, "headers_too_large", f"the headers are over the limit of {self.settings.header_bytes} bytes")
        if len(self.pipeline) >= PIPELINED:
            self._fail(400, "invalid_request", f"more than {PIPELINED} requests wait for an answer on this connection")
        super().on_headers_complete()
        self._heading, self._began, self._unread = False, None, 0
        self._due = self.loop.time() + self.settings.body_seconds

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._heading, self._unread, self._leave, self._spare = True, 0, None, LINGER_BYTES

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._heading and self.cycle.response_complete:
            self._leave = self.loop.time() + LINGER_SECONDS

    def send_400_response(self, msg: str) -> None:
        self._refuse(*(self._why or (400, "invalid_request", msg)))

    def sweep(self, now: float) -> None:
        """Ends the connection if its client has let the time pass; `now` is the event loop's."""
        if self._leave is not None:
            if now > self._leave:
                self.transport.close()
        elif self.flow.read_paused:  # it waits for us
            self._began, self._due = self._began and now, now + self.settings.body_seconds
        elif self._heading:
            if self._began is not None and now - self._began > self.settings.header_seconds:
                if not self._unread:  # a client may connect before it has anything to ask
                    self.transport.close()
                else:
                    self._refuse(408, "request_timeout", f"the headers took more than {self.settings.header_seconds:g} s")
        elif now > self._due and not self.cycle.waiting_for_100_continue and not self.cycle.response_complete:
            self._refuse(408, "request_timeout", f"the body stood still for {self.settings.body_seconds:g} s, or nearly so")

    def _too_long(self) -> None:
        self._refuse(431, "headers_too_large", f"the headers are over the limit of {self.settings.header_bytes} bytes")

    def _fail(self, status: int, code: str, detail: str) -> NoReturn:
        """The way out of the parser's callbacks, to `send_400_response`."""
        self._why = status, code, detail
        raise ValueError(detail)

    def _refuse(self, status: int, code: str, detail: str) -> None:
        """Answers, if no other answer has begun, and reads no more of the connection."""
        busy = self.cycle is not None and not self.cycle.response_complete
        begun = busy and (self.cycle.response_started or bool(self.pipeline))
        if busy:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._refused, self._leave = True, self.loop.time() + LINGER_SECONDS
        if begun or self.transport.is_closing():
            self.transport.close()
            return
        request = Request({"type": "http", "state": {"request_id": new_id("req")}})
        answer = problem(request, status, code, detail, headers={"Connection": "close"})
        lines = b"".join(b"%s: %s\r\n" % header for header in answer.raw_headers)
        self.transport.write(STATUS_LINE[status] + lines + b"\r\n" + bytes(answer.body))
        if self.transport.can_write_eof():
            self.transport.write_eof()


def limited(settings: Settings) -> type[LimitedProtocol]:
    """The protocol of one server."""
    return type("Protocol", (LimitedProtocol,), {"settings": settings, "addresses": Counter()})


def _neighbourhood(host: str) -> str:
    """An IPv4 address, or the network of an IPv6 address that one client can take any address of."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.version == 6:
        return str(address.ipv4_mapped or ip_network((address, 64), strict=False))
    return str(address)
