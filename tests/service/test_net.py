"""Addresses that tenants name: what is private is not called, whichever way it is written or looked up."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from typing import Any

import pytest

from service.jobs import outward
from service.net import InvalidUrl, PrivateAddress, checked_url, is_public

PRIVATE = [
    "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "240.0.0.1",
    "255.255.255.255", "192.0.2.1", "198.18.0.1", "::", "::1", "fe80::1", "fc00::1", "fec0::1", "ff02::1", "2001:db8::1",
    "::ffff:127.0.0.1", "::ffff:a9fe:a9fe", "2002:7f00:1::", "2001:0:0:0:0:0:f5ff:fffe",
    "64:ff9b::10.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1",
]  # fmt: skip
PUBLIC = ["8.8.8.8", "93.184.215.14", "2606:4700:4700::1111", "::ffff:8.8.8.8", "2002:808:808::", "64:ff9b::8.8.8.8"]


@pytest.mark.parametrize("address", PRIVATE)
def test_a_private_address_is_none_of_the_internet(address: str) -> None:
    assert not is_public(ip_address(address))
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(PrivateAddress):
        checked_url(f"https://{host}:8443/hook", private=False)
    checked_url(f"https://{host}:8443/hook", private=True)


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_one(address: str) -> None:
    assert is_public(ip_address(address))
    checked_url(f"http://[{address}]/" if ":" in address else f"http://{address}/", private=False)


@pytest.mark.parametrize(
    "url",
    ["", "hook", "ftp://example.com/", "file:///etc/passwd", "http://", "https://user:secret@example.com/", "http://a b/",
     "http://example.com:0/", "http://example.com:99999/", "http://[::1/", "gopher://x", "http://\0"],
)  # fmt: skip
def test_what_is_no_plain_web_address_is_refused(url: str) -> None:
    with pytest.raises(InvalidUrl):
        checked_url(url, private=True)


@pytest.fixture
def server() -> Iterator[Any]:
    """A web server on 127.0.0.1 that notes the requests it gets."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            running.heard.append(self.headers["Host"])  # type: ignore[attr-defined]
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1/")
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.heard = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=running.serve_forever, args=(0.05,))
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def post(url: str, private: bool, names: dict[str, list[str]]) -> int:
    """The status of the answer; `names` are looked up here."""
    real = socket.getaddrinfo

    def lookup(host: Any, port: Any, *rest: Any, **more: Any) -> list[Any]:
        if host not in names:
            return real(host, port, *rest, **more)
        return [(0, 0, 0, "", (address, port)) for address in names[host]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", lookup)
        return outward.post(url, {}, b"body", 5.0, private)


def test_the_address_that_was_looked_at_is_the_one_that_is_called(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every address of a name, however it is written; no proxy of the environment stands between, no redirect is followed."""
    port = server.server_port
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    for names in (["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["::ffff:127.0.0.1"], ["fe80::1%lo"]):
        with pytest.raises(PrivateAddress, match=r"hook\.example is not a public address"):
            post(f"http://hook.example:{port}/", False, {"hook.example": names})
    for odd in ("2130706433", "0x7f.1", "localhost"):
        with pytest.raises(PrivateAddress):
            post(f"http://{odd}:{port}/", False, {odd: ["127.0.0.1"]})
    assert server.heard == []
    assert post(f"http://hook.example:{port}/", True, {"hook.example": ["127.0.0.1"]}) == 302
    assert server.heard == [f"hook.example:{port}"], "the name stays in the request"
    with pytest.raises(outward.FetchFailed, match="was not found"):
        post("http://hook.example/", True, {"hook.example": []})


def test_a_certificate_must_be_that_of_the_name(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though an address is called, TLS asks for the name, and checks its certificate."""
    seen: list[Any] = []
    handshake = ssl.SSLContext.wrap_socket

    def wrap(self: ssl.SSLContext, *arguments: Any, **named: Any) -> Any:
        seen.append((named.get("server_hostname"), self.check_hostname, self.verify_mode))
        return handshake(self, *arguments, **named)

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", wrap)
    with pytest.raises(outward.FetchFailed):  # it speaks no TLS
        post(f"https://hook.example:{server.server_port}/", True, {"hook.example": ["127.0.0.1"]})
    assert seen == [("hook.example", True, ssl.CERT_REQUIRED)]
