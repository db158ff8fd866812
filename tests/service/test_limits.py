"""What a client may cost before it has shown a key, and after: heads, bodies, time and connections have their limits."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from serving import Server, Tenant, clip, new_tenant, wait_for

from service.http.multipart import Multipart
from service.settings import Settings

MOST = Settings()
LIMITS = {"HEADER_SECONDS": "1", "BODY_SECONDS": "1", "CONNECTIONS_PER_ADDRESS": "20"}


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with small limits."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LIMITS.items():
            patch.setenv(f"POLYCLIP_{name}", value)
        running = Server(tmp_path_factory.mktemp("strict") / "data").start()
    yield running
    running.stop()


def connect(server: Server) -> socket.socket:
    url = server.client.base_url
    return socket.create_connection((url.host, url.port), timeout=30)


def head(path: str = "/search", method: str = "POST", *lines: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *lines, "", ""]).encode()


def answer(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    """Status, headers, and the JSON of the next answer, read as it comes."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65536)
        assert more, f"closed after {data!r}"
        data += more
    top, _, body = data.partition(b"\r\n\r\n")
    first, *lines = top.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    while len(body) < int(headers["content-length"]):
        body += connection.recv(65536)
    return int(first.split()[1]), headers, json.loads(body)


def check_refusal(connection: socket.socket, status: int, code: str) -> None:
    told, headers, problem = answer(connection)
    assert (told, problem["status"], problem["code"]) == (status, status, code)
    assert headers["content-type"] == "application/problem+json"
    assert problem["request_id"] == headers["x-request-id"] != ""


def pour(connection: socket.socket, data: bytes) -> None:
    """Sends what the server takes."""
    with suppress(OSError):
        connection.sendall(data)


ROUTES = ["/search", "/collections", "/collections/none/videos", "/admin/tenants", "/admin/collections/none/adapters/import"]


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x", "multipart/x"])
@pytest.mark.parametrize("path", ROUTES)
def test_the_key_is_checked_before_a_byte_of_the_body_has_come(server: Server, path: str, kind: str) -> None:
    with connect(server) as connection:
        connection.sendall(head(path, "POST", f"Content-Type: {kind}", "Content-Length: 1000000"))
        check_refusal(connection, 401, "missing_key")


def test_every_route_that_needs_a_key_checks_it_first(client: Any) -> None:
    operations = [
        (method, path)
        for path, methods in client.get("/openapi.json").json()["paths"].items()
        for method, operation in methods.items()
        if operation.get("security")
    ]
    assert len(operations) > 25
    for method, path in operations:  # a body that would be refused otherwise
        answer = client.request(method, path, content=b"{", headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["code"]) == (401, "missing_key"), (method, path)


@pytest.mark.parametrize("kind", ["application/json", "multipart/x", "multipart/form-data; boundary=x", "text/plain"])
def test_a_body_is_bounded_while_it_streams_whatever_it_calls_itself(server: Server, tenant: Tenant, kind: str) -> None:
    key = f"X-API-Key: {tenant.keys['admin']}"
    with connect(server) as connection:
        connection.sendall(head("/search", "POST", key, f"Content-Type: {kind}", "Transfer-Encoding: chunked"))
        for _ in range(MOST.body_bytes // 2**20 + 1):
            pour(connection, b"100000\r\n" + b" " * 2**20 + b"\r\n")
        check_refusal(connection, 413, "body_too_large")
    with connect(server) as connection:  # and is refused by its length alone
        length = f"Content-Length: {MOST.body_bytes + 1}"
        connection.sendall(head("/search", "POST", key, f"Content-Type: {kind}", length))
        check_refusal(connection, 413, "body_too_large")


def test_captions_may_be_larger_than_other_bodies(guest: Tenant) -> None:
    path = f"/collections/{guest.collection()}/videos/vid_x/captions"
    body = {"captions": [{"text": "a"}], "more": "a" * (MOST.body_bytes + 1000)}
    assert guest.call("PUT", path, json=body).json()["code"] == "invalid_request"
    assert guest.call("PUT", path, json={"more": "a" * 4 * MOST.body_bytes}).json()["code"] == "body_too_large"


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "1e9", "٣", "0x10", ""])
def test_a_length_that_is_no_number_is_no_fault_of_ours(guest: Tenant, length: str) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=x", "Content-Length": length.encode()}
    answer = guest.call("POST", f"/collections/{guest.collection()}/videos", content=b"--x--\r\n", headers=headers)
    assert answer.status_code == 422


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Big: " + b"a" * 2**20, 431, "headers_too_large"),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"a" * 70_000 + b"\r\n\r\n", 431, "headers_too_large"),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"X-A: 1\r\n" * 300 + b"\r\n", 431, "headers_too_large"),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"X-A: b\r\n" * 200_000, 431, "headers_too_large"),
        (b"GET /" + b"a" * 2**20, 414, "url_too_long"),
        (b"GET /" + b"a" * 16_500 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414, "url_too_long"),
        (b"GET /?q=" + b"a" * 16_500 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414, "url_too_long"),
        (b"nonsense\r\n\r\n", 400, "invalid_request"),
    ],
    ids=["one header", "whole", "many", "many bytes", "URL", "whole URL", "query", "no HTTP"],
)
def test_heads_have_their_limits(server: Server, sent: bytes, status: int, code: str) -> None:
    with connect(server) as connection:
        pour(connection, sent)
        check_refusal(connection, status, code)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""  # and nothing of it is kept


def test_heads_just_within_their_limits_are_read(server: Server) -> None:
    with connect(server) as connection:
        for _ in range(2):  # the limits are a request's, not a connection's
            connection.sendall(head("/healthz?q=" + "a" * 16_000, "GET", "X-Big: " + "a" * 65_000))
            assert answer(connection)[0] == 200


def test_the_end_of_a_chunked_body_has_its_limit(server: Server, tenant: Tenant) -> None:
    lines = (f"X-API-Key: {tenant.keys['search']}", "Content-Type: application/json", "Transfer-Encoding: chunked")
    for end in (b"0\r\nX-Trailer: " + b"a" * 2**20, b"5;" + b"a" * 2**20):
        with connect(server) as connection:
            connection.sendall(head("/search", "POST", *lines))
            pour(connection, end)
            check_refusal(connection, 431, "headers_too_large")


def test_requests_that_wait_for_earlier_ones_have_their_limit(server: Server) -> None:
    with connect(server) as connection:
        pour(connection, head("/readyz", "GET") * 2000)
        told = b""
        while more := connection.recv(65536):
            told += more
    assert told.count(b"HTTP/1.1 200") < 2000


def test_a_head_and_a_body_that_stand_still_are_ended(strict: Server) -> None:
    tenant = new_tenant(strict.client)
    lines = (f"X-API-Key: {tenant.keys['admin']}", "Content-Length: 1000")
    body = head("/collections", "POST", "Content-Type: application/json", *lines)
    upload = head(f"/collections/{tenant.collection()}/videos", "POST", "Content-Type: multipart/form-data; boundary=x", *lines)
    for half in (b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-A: ", body, body + b"{", upload + b"--x\r\n"):
        with connect(strict) as connection:
            connection.sendall(half)
            check_refusal(connection, 408, "request_timeout")
            assert connection.recv(1) == b""
    scratch = Path(strict.data) / "scratch"
    wait_for("an empty scratch folder", lambda: not list(scratch.glob("upload-*")))


def test_a_connection_that_asks_nothing_is_closed(strict: Server) -> None:
    with connect(strict) as connection:
        assert connection.recv(1) == b""


def test_one_address_has_so_many_connections_and_no_more(strict: Server) -> None:
    def served(connection: socket.socket) -> bool:
        pour(connection, head("/healthz", "GET"))
        return answer(connection)[0] == 200

    assert strict.client.get("/healthz").status_code == 200  # its connection stays
    with ExitStack() as stack:
        for _ in range(19):
            assert served(stack.enter_context(connect(strict)))
        check_refusal(stack.enter_context(connect(strict)), 429, "too_many_connections")
        assert strict.client.get("/healthz").status_code == 200

    def free() -> bool:
        with connect(strict) as connection:
            return served(connection)

    wait_for("a free place", free)


def test_uploads_that_stand_still_hold_up_nobody_else(guest: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than the server has threads, each in the middle of a write that does not end."""
    collection, go_on, standing = guest.collection(), threading.Event(), []
    write = Multipart.feed

    def stand_still(parser: Multipart, data: bytes) -> None:
        standing.append(parser)
        go_on.wait(200)
        write(parser, data)

    monkeypatch.setattr(Multipart, "feed", stand_still)
    asked: list[tuple[str, str, dict[str, str] | None, int]] = [
        ("GET", "/healthz", None, 200),
        ("GET", "/readyz", None, 200),
        ("GET", "/collections", None, 200),
        ("POST", "/search", {"collection": collection, "text": "a ball"}, 200),
        ("POST", "/search", {"collection": "nothing", "text": "a ball"}, 404),
    ]
    with ThreadPoolExecutor(60) as clients, ThreadPoolExecutor(len(asked)) as others:
        uploads = [clients.submit(guest.upload, collection, clip(1)) for _ in range(60)]
        try:
            most = guest.client.app.state.services.receiving.total_tokens
            wait_for("as many as are written at once", lambda: len(standing) == most)
            answers = [others.submit(guest.call, method, path, json=body) for method, path, body, _ in asked]
            assert [answer.result(100).status_code for answer in answers] == [status for *_, status in asked]
            assert len(standing) == most
        finally:
            go_on.set()
        assert {upload.result().status_code for upload in uploads} == {202}
