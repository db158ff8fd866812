"""Requests to URLs that a client names: to public addresses alone, of the client and of every redirect, within a time.

A host is resolved here, all its addresses are checked, and the connection goes to one that was checked: a name that resolves
otherwise a moment later changes nothing. Proxies of the environment are not asked.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import httpcore
import httpx

from service.jobs.kinds import JobFailed
from service.net import InvalidUrl, PrivateAddress, checked_url, is_public, literal_of

REDIRECTS = 5
CONNECT_SECONDS, READ_SECONDS = 10.0, 30.0
AGAIN = (408, 425, 429)  # and all from 500: statuses that may pass
AGENT = {"User-Agent": "polyclip"}
REDIRECTED = (301, 302, 303, 307, 308)


class FetchFailed(JobFailed):
    """A URL gave no file, or took no call: it was not reached, broke off, was too slow or answered with an error."""

    code, hint = "fetch_failed", "see that the URL answers 200 with the file"

    def __init__(self, detail: str, may_pass: bool = False) -> None:
        super().__init__("fetch_failed", detail, may_pass)


@contextmanager
def get(url: str, seconds: float, private: bool = False) -> Iterator[httpcore.Response]:
    """The answer to GET with status 200, redirects followed, its body unread; all of it must be done within so many seconds.

    Raises InvalidUrl, PrivateAddress, FetchFailed, also out of the reading of the body.
    """
    where = checked_url(url, private)
    with _pool(where.host, seconds, private) as pool:
        for _ in range(REDIRECTS + 1):
            host = where.host
            with _asked(pool, "GET", where, {"Accept": "*/*", "Accept-Encoding": "identity"}) as response:
                told = httpx.Headers(response.headers)
                if response.status not in REDIRECTED or "location" not in told:
                    _check(host, response.status, told)
                    yield response
                    return
            try:
                where = checked_url(str(where.join(told["location"])), private)
            except (httpx.InvalidURL, InvalidUrl) as error:
                raise InvalidUrl(f"{host} redirects to what is not fetched: {error}") from error
        raise FetchFailed(f"{host} redirects more than {REDIRECTS} times")


def post(url: str, headers: Mapping[str, str], body: bytes, seconds: float, private: bool = False) -> int:
    """The status of the answer to POST, whose body is not read; redirects are not followed.

    Raises InvalidUrl, PrivateAddress, FetchFailed.
    """
    where = checked_url(url, private)
    sent = {**headers, "Content-Length": str(len(body))}
    with _pool(where.host, seconds, private) as pool, _asked(pool, "POST", where, sent, body) as response:
        return response.status


@contextmanager
def _pool(host: str, seconds: float, private: bool) -> Iterator[httpcore.ConnectionPool]:
    """One connection at a time, within so many seconds in all; what fails on it is told of the host. Raises FetchFailed."""
    backend = _Backend(private, time.monotonic() + seconds)
    try:
        with httpcore.ConnectionPool(_trust(), max_connections=1, network_backend=backend) as pool:
            yield pool
    except httpcore.UnsupportedProtocol as error:
        raise FetchFailed(f"{host} does not answer with HTTP") from error
    except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError) as error:
        if backend.late:
            raise FetchFailed(f"{host} was not done within {seconds:g} s") from error
        why = f"{error}" or type(error).__name__
        raise FetchFailed(f"{host} cannot be read: {why}"[:300], may_pass="[SSL" not in why) from error


def _asked(
    pool: httpcore.ConnectionPool, method: str, where: httpx.URL, headers: Mapping[str, str], body: bytes | None = None
) -> AbstractContextManager[httpcore.Response]:
    target = httpcore.URL(scheme=where.raw_scheme, host=where.raw_host, port=where.port, target=where.raw_path)
    timeouts = {"connect": CONNECT_SECONDS, "read": READ_SECONDS, "write": READ_SECONDS, "pool": CONNECT_SECONDS}
    sent: Any = {"Host": where.netloc.decode(), **AGENT, **headers}
    return pool.stream(method, target, headers=sent, content=body, extensions={"timeout": timeouts})


def _check(host: str, status: int, headers: httpx.Headers) -> None:
    if status != 200:
        raise FetchFailed(f"{host} answered with status {status}", may_pass=status in AGAIN or status >= 500)
    if (coding := headers.get("content-encoding", "identity").strip().lower()) not in ("", "identity"):
        raise FetchFailed(f"{host} sends the file coded ({coding[:40]}), which was not asked for")


@cache
def _trust() -> ssl.SSLContext:
    return httpx.create_ssl_context()


class _Backend(httpcore.NetworkBackend):
    """Connects to checked addresses, until `deadline` in seconds of `time.monotonic`."""

    def __init__(self, private: bool, deadline: float) -> None:
        self._private, self._deadline, self._sync = private, deadline, httpcore.SyncBackend()

    @property
    def late(self) -> bool:
        return time.monotonic() >= self._deadline

    def left(self, timeout: float | None) -> float:
        rest = self._deadline - time.monotonic()
        if rest <= 0:
            raise httpcore.ReadTimeout("the time is over")
        return rest if timeout is None else min(timeout, rest)

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as error:
            again = getattr(error, "errno", None) == socket.EAI_AGAIN
            raise FetchFailed(f"the name {host} was not found", may_pass=again) from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not addresses:
            raise FetchFailed(f"the name {host} was not found")
        for address in addresses:
            literal = literal_of(address)
            if not self._private and (literal is None or not is_public(literal)):
                raise PrivateAddress(f"{host} is not a public address")
        for address in addresses[:-1]:
            try:
                return _Stream(self, self._connect(address, port, timeout))
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return _Stream(self, self._connect(addresses[-1], port, timeout))

    def _connect(self, address: str, port: int, timeout: float | None) -> httpcore.NetworkStream:
        return self._sync.connect_tcp(address, port, timeout=self.left(timeout))


class _Stream(httpcore.NetworkStream):
    """A connection on which nothing lasts beyond the deadline, however slowly bytes come."""

    def __init__(self, backend: _Backend, inner: httpcore.NetworkStream) -> None:
        self._backend, self._inner = backend, inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, self._backend.left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, self._backend.left(timeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(self._backend, self._inner.start_tls(ssl_context, server_hostname, self._backend.left(timeout)))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)
