"""Videos by URL: fetched by a task, under an upload's limits, from public addresses alone."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from serving import Tenant, clip, new_tenant
from sqlalchemy import select
from workshop import Workshop, application, runner

from service.jobs import outward
from service.net import is_public
from service.storage.tables import idempotency, tasks


class Site:
    """A web server on this machine: what each path answers, and which paths were asked for."""

    def __init__(self) -> None:
        self.pages: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.asked: list[str] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                site.asked.append(path)
                status, headers, body = site.pages.get(path, (404, {}, b""))
                self.send_response(status)
                sized = {} if "Transfer-Encoding" in headers else {"Content-Length": str(len(body))}
                for name, value in {**sized, **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture(scope="module")
def open_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An application that fetches from this machine too."""
    with application(tmp_path_factory.mktemp("open") / "data", private_urls=True, fetch_seconds=5, job_tries=1) as running:
        yield running


@pytest.fixture
def shop(open_client: Any) -> Workshop:
    return Workshop(new_tenant(open_client))


def ask(guest: Tenant, films: str, url: str, **more: Any) -> Any:
    headers = more.pop("headers", {})
    return guest.post(f"/collections/{films}/videos", {"url": url, **more}, role="write", headers=headers)


def error(shop: Workshop, answer: Any) -> dict[str, Any]:
    """Of the task that an answer names, run here."""
    assert answer.status_code == 202, answer.text
    runner(shop).run(shop.tenant, answer.json()["task_id"])
    task = shop.guest.get(f"/tasks/{answer.json()['task_id']}").json()
    assert task["status"] == "failed", task
    return dict(task["error"])


def test_a_video_by_url_ends_as_an_uploaded_one(shop: Workshop, site: Site) -> None:
    guest, films = shop.guest, shop.guest.collection()
    site.pages["/a/b/first%20one.mp4"] = (200, {}, clip(1))
    site.pages["/moved"] = (302, {"Location": "/a/b/first%20one.mp4"}, b"")
    wish = {"captions": ["a red ball", {"text": "late", "start": 0.5}], "metadata": {"camera": "north"}}
    answer = ask(guest, films, site.url("/a/b/first%20one.mp4?token=x"), **wish, headers={"Idempotency-Key": "one"})
    assert answer.status_code == 202 and answer.json()["video_id"] is None and answer.json()["status"] == "pending"
    assert ask(guest, films, site.url("/a/b/first%20one.mp4?token=x"), **wish, headers={"Idempotency-Key": "one"}).json() == (
        answer.json()
    )
    found = shop.done(answer)
    shop.work()  # the video's own task
    video = guest.get(f"/collections/{films}/videos/{found['video_id']}").json()
    assert (video["status"], video["filename"], video["task_id"]) == ("ready", "first one.mp4", found["task_id"])
    assert [c["text"] for c in video["captions"]] == ["a red ball", "late"] and video["metadata"] == {"camera": "north"}
    twin = shop.done(ask(guest, films, site.url("/moved"), filename="../other.mp4", captions=["another"]))
    assert (twin["duplicate_of"], twin["updated"]) == (found["video_id"], ["captions"])
    assert not list(shop.storage.settings.scratch.glob("fetch-*"))

    again = shop.task(answer)  # a start that was broken off after the file was taken in
    with shop.storage.database.write() as connection:
        connection.execute(tasks.update().where(tasks.c.id == again.id).values(status="queued", result=None))
    asked = len(site.asked)
    assert shop.done(answer) == found and len(site.asked) == asked

    assert guest.call("DELETE", f"/collections/{films}/videos/{found['video_id']}").status_code == 204
    shop.work()
    with shop.storage.database.read() as connection:
        left = connection.scalars(select(tasks.c.kind).where(tasks.c.tenant_id == shop.tenant)).all()
        answers = connection.scalars(select(idempotency.c.answer).where(idempotency.c.tenant_id == shop.tenant)).all()
    assert (set(left), list(answers)) == ({"purge"}, [])


def test_a_fetch_has_the_limits_of_an_upload(shop: Workshop, site: Site) -> None:
    guest, films = shop.guest, shop.guest.collection()
    site.pages |= {
        "/large": (200, {}, clip(1) + bytes(100_000)),
        "/unsized": (200, {"Transfer-Encoding": "chunked"}, b"%x\r\n" % 200_000 + clip(1) + bytes(200_000)),
        "/text": (200, {}, b"<html>not here</html>" * 400),
        "/empty": (200, {}, b""),
        "/short": (200, {"Content-Length": "90000"}, clip(1)),
        "/packed": (200, {"Content-Encoding": "gzip"}, clip(1)),
        "/round": (302, {"Location": "/round"}, b""),
        "/file": (302, {"Location": "file:///etc/passwd"}, b""),
        "/down": (503, {}, b""),
    }
    told = {path: error(shop, ask(guest, films, site.url(path)))["code"] for path in site.pages if path in WHY}
    assert told == WHY
    assert error(shop, ask(guest, films, "http://nowhere.invalid/a.mp4"))["code"] == "fetch_failed"
    closed = socket.socket()
    closed.bind(("127.0.0.1", 0))
    assert error(shop, ask(guest, films, f"http://127.0.0.1:{closed.getsockname()[1]}/"))["code"] == "fetch_failed"
    closed.close()
    assert not guest.get(f"/collections/{films}/videos").json()["data"]
    assert not list(shop.storage.settings.scratch.glob("fetch-*"))


WHY = {
    "/large": "video_too_large",
    "/unsized": "video_too_large",
    "/text": "unsupported_media",
    "/empty": "empty_file",
    "/short": "fetch_failed",
    "/packed": "fetch_failed",
    "/round": "fetch_failed",
    "/file": "invalid_url",
    "/down": "fetch_failed",
}


def test_a_server_that_sends_drop_by_drop_is_left_when_the_time_is_over() -> None:
    def drip() -> None:
        connection, _ = listening.accept()
        with connection, suppress(OSError):
            for letter in b"HTTP/1.1 200 OK\r\nX-Long: " + b"a" * 200:
                connection.sendall(bytes([letter]))
                time.sleep(0.05)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=drip, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        with pytest.raises(outward.FetchFailed, match="within"), outward.get(url, 1.0, private=True):
            pass


def test_a_name_is_checked_by_the_address_that_is_connected_to(
    guest: Tenant, workshop: Workshop, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each redirect too; a second look at the name, which a hostile server would answer otherwise, is not taken."""
    films = guest.collection()
    looked: list[str] = []
    real = socket.getaddrinfo

    def resolve(host: Any, port: Any, *rest: Any, **more: Any) -> Any:
        looked.append(str(host))
        to = {"public.test": "127.0.0.1", "inside.test": "169.254.169.254", "2130706433": "127.0.0.1"}.get(str(host), host)
        return real(to, port, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    for url in ("http://inside.test/latest/meta-data", f"http://public.test:{site.port}/x", "http://2130706433/"):
        assert error(workshop, ask(guest, films, url))["code"] == "private_address"
    assert "/x" not in site.asked
    public = is_public
    monkeypatch.setattr(outward, "is_public", lambda a: str(a) == "127.0.0.1" or public(a))  # as if this machine were public
    site.pages["/clip.mp4"] = (200, {}, clip(3))
    for number, target in enumerate(("http://169.254.169.254/", "http://inside.test/", "http://[::ffff:10.0.0.1]/")):
        site.pages[f"/to{number}"] = (302, {"Location": target}, b"")
        assert error(workshop, ask(guest, films, f"http://public.test:{site.port}/to{number}"))["code"] == "private_address"
    looked.clear()
    assert workshop.done(ask(guest, films, f"http://public.test:{site.port}/clip.mp4"))["video_id"]
    assert looked == ["public.test", "127.0.0.1"]  # the second is no name: the connection


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"url": "http://169.254.169.254/"}', "private_address"),
        (b'{"url": "ftp://example.org/a.mp4"}', "invalid_url"),
        (b'{"url": "s3://bucket/a.mp4"}', "invalid_url"),
        (b'{"url": "file:///etc/passwd"}', "invalid_url"),
        (b'{"url": "http://me:secret@example.org/a.mp4"}', "invalid_url"),
        (b'{"url": "http://"}', "invalid_url"),
        (b'{"url": "https://example.org:99999/"}', "invalid_url"),
        (b'{"url": ""}', "invalid_url"),
        (b'{"url": "https://example.org/\\u0000"}', "invalid_request"),
        (b'{"url": 7}', "invalid_request"),
        (b'{"url": "https://example.org/", "captions": [" "]}', "invalid_request"),
        (b'{"url": "https://example.org/", "metadata": {"a": NaN}}', "invalid_request"),
        (b'{"url": "https://example.org/", "more": 1}', "invalid_request"),
        (b"[]", "invalid_request"),
        (b"{", "invalid_request"),
        (b"\xff", "invalid_request"),
        (b'{"url": "https://example.org/", "metadata": ' + b'{"a":' * 40 + b"1" + b"}" * 40 + b"}", "invalid_request"),
    ],
)
def test_a_wrong_wish_is_refused_at_once(guest: Tenant, workshop: Workshop, body: bytes, code: str) -> None:
    films = guest.collection()
    headers = {"Content-Type": "application/json"}
    answer = guest.call("POST", f"/collections/{films}/videos", "write", content=body, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (422, code)
    assert not workshop.open_tasks()


def test_each_bad_line_of_a_manifest_is_told_and_the_others_are_queued(guest: Tenant, workshop: Workshop) -> None:
    films = guest.collection()
    path = f"/collections/{films}/videos/manifest"
    lines = [
        b'\xef\xbb\xbf{"url": "https://example.org/1.mp4", "captions": ["a ball"]}',
        b"",
        b"{not json}",
        b'{"url": "http://10.0.0.1/2.mp4"}\r',
        b'{"filename": "a.mp4"}',
        '{"url": "https://example.org/5.mp4", "metadata": {"ort": "Köln\u2028"}}'.encode(),
    ]
    headers = {"Content-Type": "application/x-ndjson", "Idempotency-Key": "m"}
    answer = guest.call("POST", path, "write", content=b"\n".join(lines), headers=headers)
    assert answer.status_code == 202, answer.text
    body = answer.json()
    assert [row["line"] for row in body["queued"]] == [1, 6]
    told = [(row["line"], row["code"]) for row in body["refused"]]
    assert told == [(3, "invalid_request"), (4, "private_address"), (5, "invalid_request")]
    assert guest.call("POST", path, "write", content=b"\n".join(lines), headers=headers).json() == body
    waiting = workshop.open_tasks()
    assert [task.id for task in waiting] == [row["task_id"] for row in body["queued"]]
    assert [task.request["url"][-5:] for task in waiting] == ["1.mp4", "5.mp4"]
    listed = guest.call("POST", path, "write", json=[{"url": "https://example.org/9"}, 7, {"url": "x"}]).json()
    assert [row["line"] for row in listed["queued"]] == [1] and [row["line"] for row in listed["refused"]] == [2, 3]
    for bad in (b"", b"\n \n", b"[", b'{"url":1}\n' * 10_001):
        assert guest.call("POST", path, "write", content=bad).json()["code"] == "invalid_manifest"
    assert guest.call("POST", path, "search", content=b"{}").status_code == 403
    assert guest.call("POST", "/collections/none/videos/manifest", "write", content=b"{}").status_code == 404

    assert guest.call("DELETE", f"/collections/{films}").status_code == 204
    workshop.work()
    with workshop.storage.database.read() as connection:
        kinds = connection.scalars(select(tasks.c.kind).where(tasks.c.tenant_id == workshop.tenant)).all()
        answers = connection.scalars(select(idempotency.c.answer).where(idempotency.c.tenant_id == workshop.tenant)).all()
    assert (set(kinds), list(answers)) == ({"purge"}, [])


def test_a_manifest_beyond_the_tenant_s_quota_queues_nothing(client: Any) -> None:
    guest = new_tenant(client, {"max_videos": 2, "max_bytes": 10})
    films = guest.collection()
    rows = [{"url": f"https://example.org/{n}"} for n in range(3)]
    answer = guest.call("POST", f"/collections/{films}/videos/manifest", "write", json=rows)
    assert (answer.status_code, answer.json()["code"]) == (403, "quota_exceeded")
    assert not guest.get("/tasks").json()["data"]
