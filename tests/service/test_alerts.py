"""Standing queries: each newly ready video is compared with them once, as a search would see it; events, stream, webhooks."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from serving import ROOT, clip, wait_for
from test_cleanup import tables_naming, writes
from workshop import Workshop, runner

from service.alerts import alert_rows, deliver, match
from service.http import alerts as routes
from service.jobs.task_rows import Task
from service.storage.tables import now
from training.progress import unheard

TEXT = "a red ball"


def alert(workshop: Workshop, collection: str, text: str = TEXT, **more: Any) -> dict[str, Any]:
    answer = workshop.guest.post(f"/collections/{collection}/alerts", {"text": text, **more}, role="write")
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def events(workshop: Workshop, collection: str, of: dict[str, Any], **page: Any) -> list[dict[str, Any]]:
    """Newest first."""
    return list(workshop.guest.get(f"/collections/{collection}/alerts/{of['id']}/events", **page).json()["data"])


def arrives(workshop: Workshop, collection: str, number: int) -> str:
    """A new video, ready and compared."""
    video = workshop.video(collection, number)
    compare(workshop)
    return video


def compare(workshop: Workshop) -> None:
    for task in workshop.open_tasks():
        if task.kind == "match_alerts":
            runner(workshop).run(workshop.tenant, task.id)


def match_task(workshop: Workshop) -> Task:
    (task,) = [task for task in workshop.open_tasks() if task.kind == "match_alerts"]
    return task


def test_a_newly_ready_video_is_an_event_as_a_search_would_find_it(workshop: Workshop) -> None:
    collection, (before,) = workshop.filled([1])
    every = alert(workshop, collection, f"  {TEXT}  ", name="all")
    assert (every["text"], every["name"], every["secret"]) == (TEXT, "all", None)
    none, some = (alert(workshop, collection, min_score=score) for score in (1, -1))
    video = arrives(workshop, collection, 2)
    hit = next(hit for hit in workshop.guest.search(collection, TEXT)["data"] if hit["video_id"] == video)
    (event,) = events(workshop, collection, every)
    assert event["score"] == pytest.approx(hit["score"], abs=1e-4)
    told = {name: event[name] for name in ("video_id", "start", "end", "number", "delivery")}
    assert told == {"video_id": video, "start": hit["start"], "end": hit["end"], "number": 1, "delivery": None}
    assert events(workshop, collection, none) == [] and len(events(workshop, collection, some)) == 1
    late = alert(workshop, collection)
    compare(workshop)
    assert events(workshop, collection, late) == [], "it was ready before"
    workshop.guest.call("DELETE", f"/collections/{collection}/videos/{video}")
    assert events(workshop, collection, every) == [] and before


def test_a_long_video_is_one_event_at_its_best_segment(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    collection = workshop.guest.collection(segment_seconds=1.0)
    made = alert(workshop, collection, min_score=0.5)
    monkeypatch.setattr(match, "rescore_all", lambda *_: np.array([[0.6, 0.9, 0.1]], np.float32))  # it has one colour
    workshop.done(workshop.guest.upload(collection, clip(7, 3.0)))
    compare(workshop)
    (event,) = events(workshop, collection, made)
    assert (event["start"], event["end"], event["score"]) == (1.0, 2.0, 0.9)


def test_an_adapter_that_is_switched_to_counts_for_the_next_video(workshop: Workshop) -> None:
    collection, _ = workshop.filled([1])
    made = alert(workshop, collection)
    arrives(workshop, collection, 2)
    workshop.activate(collection, workshop.adapter(collection, 5))
    encoded: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        keep = alert_rows.keep_vectors
        patch.setattr(alert_rows, "keep_vectors", lambda *of: encoded.append(len(of[3])) or keep(*of))  # type: ignore[func-returns-value]
        videos = [arrives(workshop, collection, number) for number in (3, 4)]
    hits = {hit["video_id"]: hit["score"] for hit in workshop.guest.search(collection, TEXT)["data"]}
    found = {event["video_id"]: event["score"] for event in events(workshop, collection, made)}
    for video in videos:
        assert found[video] == pytest.approx(hits[video], abs=1e-4)
    assert encoded == [1], "once for each adapter"


def test_a_match_that_dies_anywhere_makes_each_event_once(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(match, "TOGETHER", 1)
    collection = workshop.guest.collection()
    made = [alert(workshop, collection, f"{TEXT} {n}", webhook="https://hook.example/") for n in range(3)]
    video = workshop.video(collection, 1)
    task, handed = match_task(workshop), list[Any]()
    run = partial(match.match_alerts, workshop.storage, workshop.encoder, workshop.tenant, task, unheard, handed.append)
    for allowed in range(100):
        try:
            with writes(workshop.storage, allowed):
                run()
            break
        except KeyboardInterrupt:
            continue
    assert allowed > 3
    run()
    for each in made:
        (event,) = events(workshop, collection, each)
        assert (event["video_id"], event["number"], event["delivery"]) == (video, 1, "pending")
    waiting = [task for task in workshop.open_tasks() if task.kind == "deliver_event"]
    assert len(waiting) == 3 and {task.id for task in handed} <= {task.id for task in waiting}


def test_events_are_streamed_from_where_the_client_left_off(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(routes, "QUIET_SECONDS", 0.05)
    monkeypatch.setattr(routes, "AT_ONCE", 1)
    collection = workshop.guest.collection()
    made = alert(workshop, collection)
    videos = [arrives(workshop, collection, number) for number in (1, 2)]
    path, stream = f"/collections/{collection}/alerts/{made['id']}", {"Accept": "text/event-stream"}

    def follow(**headers: str) -> list[tuple[int, str]]:
        """What is streamed until the alert is gone, or the server drains."""
        answer = workshop.guest.call("GET", f"{path}/events", role="write", headers={**stream, **headers})
        assert answer.headers["Content-Type"].startswith("text/event-stream"), answer.text
        blocks = [dict(line.split(": ", 1) for line in b.split("\n")) for b in answer.text.split("\n\n") if "data: " in b]
        return [(int(block["id"]), json.loads(block["data"])["video_id"]) for block in blocks]

    draining = workshop.guest.client.app.state.draining
    draining.set()
    try:
        assert follow(**{"Last-Event-ID": "2"}) == [] and follow(**{"Last-Event-ID": "1"}) == [(2, videos[1])]
    finally:
        draining.clear()
    heard: list[Any] = []
    listener = threading.Thread(target=lambda: heard.extend(follow()))
    listener.start()
    time.sleep(0.2)
    videos.append(arrives(workshop, collection, 3))
    time.sleep(0.3)
    assert workshop.guest.call("DELETE", path, role="write").status_code == 204
    listener.join(30)
    assert heard == list(enumerate(videos, start=1)), "those so far, and the one that came meanwhile; then the alert went"
    assert workshop.guest.get(path).status_code == 404
    monkeypatch.setitem(workshop.storage.settings.__dict__, "event_streams", 0)
    again = alert(workshop, collection)
    refused = workshop.guest.call("GET", f"/collections/{collection}/alerts/{again['id']}/events", headers=stream)
    assert (refused.status_code, refused.json()["code"]) == (429, "too_many_streams")


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"text": " "}, "empty_text"),
        ({"min_score": 2}, "invalid_request"),
        ({"min_confidence": 0.9}, "invalid_request"),
        ({"webhook": "ftp://example.com/"}, "invalid_url"),
        ({"webhook": "http://169.254.169.254/latest"}, "private_address"),
        ({"webhook": "https://user:secret@example.com/"}, "invalid_url"),
    ],
)
def test_an_alert_that_cannot_be_is_refused(workshop: Workshop, more: dict[str, Any], code: str) -> None:
    path = f"/collections/{workshop.guest.collection()}/alerts"
    answer = workshop.guest.post(path, {"text": TEXT, **more})
    assert (answer.status_code, answer.json()["code"]) == (422, code)


def test_a_tenant_has_so_many_alerts_and_writers_alone_see_them(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(workshop.storage.settings.__dict__, "alerts", 2)
    guest, collections = workshop.guest, [workshop.guest.collection() for _ in range(2)]
    body = {"text": TEXT, "webhook": "https://hook.example/"}
    path = f"/collections/{collections[0]}/alerts"
    first, again = (guest.post(path, body, headers={"Idempotency-Key": "made"}).json() for _ in range(2))
    assert first == again and first["secret"].startswith("whsec_")
    second = alert(workshop, collections[1])
    refused = guest.post(path, {"text": TEXT})
    assert (refused.status_code, refused.json()["code"]) == (409, "too_many_alerts")
    assert guest.get(path, role="search").status_code == 403
    (row,) = guest.get(path, role="write").json()["data"]
    assert row == guest.get(f"{path}/{first['id']}").json() == {k: v for k, v in first.items() if k != "secret"}
    assert tables_naming(workshop.storage, first["secret"]) == set(), "no row holds it"
    assert guest.call("DELETE", f"/collections/{collections[1]}/alerts/{second['id']}").status_code == 204
    assert guest.post(path, {"text": TEXT}).status_code == 201


# --- webhooks


class Hook(ThreadingHTTPServer):
    """A receiver; `answers`: the status of each call in turn, 200 after them, or what is done instead."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.calls: list[tuple[dict[str, str], bytes]] = []
        self.answers: list[Any] = []
        self.url = f"http://localhost:{self.server_port}/hook"


class _Receiver(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        self.server.calls.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
        answer = self.server.answers.pop(0) if self.server.answers else 200
        if callable(answer):
            answer(self)
            return
        self.send_response(answer)
        self.send_header("Location", self.server.url)
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def hook() -> Iterator[Hook]:
    server = Hook()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def called(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Receivers on this machine are allowed."""
    monkeypatch.setitem(workshop.storage.settings.__dict__, "private_urls", True)


def deliveries(workshop: Workshop) -> list[Task]:
    return [task for task in workshop.open_tasks() if task.kind == "deliver_event"]


def attempt(workshop: Workshop, task: Task, tries: int = 1) -> int:
    """One run of a delivery; which try comes next, 0: it has ended."""
    again = runner(workshop).run(workshop.tenant, task.id, tries)
    return 0 if again is None else int(again["tries"])


def test_a_webhook_gets_each_event_signed(workshop: Workshop, hook: Hook, called: None) -> None:
    collection = workshop.guest.collection()
    made = alert(workshop, collection, name="balls", webhook=hook.url)
    video = arrives(workshop, collection, 1)
    (task,) = deliveries(workshop)
    hook.answers = [503]
    assert attempt(workshop, task) == 2 and events(workshop, collection, made)[0]["delivery"] == "pending"
    assert attempt(workshop, task, 2) == 0
    (event,) = events(workshop, collection, made)
    assert event["delivery"] == "delivered" and event["delivered_at"] and event["error"] is None
    headers, body = hook.calls[-1]
    moment, signature = (part.split("=", 1)[1] for part in headers["X-Polyclip-Signature"].split(","))
    expected = hmac.new(made["secret"].encode(), moment.encode() + b"." + body, hashlib.sha256).hexdigest()
    assert hmac.compare_digest(signature, expected) and abs(time.time() - int(moment)) < 60
    told = json.loads(body)
    assert (told["event_id"], told["video_id"], told["score"]) == (event["id"], video, event["score"])
    assert (told["alert"]["name"], told["collection"], headers["X-Polyclip-Event"]) == ("balls", collection, event["id"])
    with workshop.storage.database.write() as connection:  # the worker died before its task had ended
        connection.exec_driver_sql(f"UPDATE tasks SET status = 'running' WHERE id = '{task.id}'")
    assert attempt(workshop, task) == 0 and len(hook.calls) == 2, "what has been delivered is not called for again"


def test_a_webhook_that_never_answers_fails_in_the_end_and_holds_up_nothing(
    workshop: Workshop, hook: Hook, called: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers nothing, or byte by byte, or elsewhere: each try ends in time; its other events wait."""
    monkeypatch.setattr(deliver, "SECONDS", 2.0)
    monkeypatch.setitem(workshop.storage.settings.__dict__, "job_tries", 3)
    ended = threading.Event()

    def drip(receiver: _Receiver) -> None:
        while not ended.wait(0.1):
            try:
                receiver.wfile.write(b"H")
            except OSError:
                return

    collection = workshop.guest.collection()
    made = alert(workshop, collection, webhook=hook.url)
    arrives(workshop, collection, 1)
    arrives(workshop, collection, 2)
    first, second = deliveries(workshop)
    hook.answers = [lambda _: ended.wait(120), drip, 302]
    try:
        started, tries = time.monotonic(), attempt(workshop, first)
        assert tries == 2 and attempt(workshop, second) == 2
        wait_for("one call", lambda: len(hook.calls) == 1)
        while tries:
            tries = attempt(workshop, first, tries)
        assert time.monotonic() - started < 60 and len(hook.calls) == 3, "a redirect is not followed"
    finally:
        ended.set()
    newer, older = events(workshop, collection, made)
    assert (older["delivery"], older["error"]["code"]) == ("failed", "webhook_failed") and "302" in older["error"]["detail"]
    assert newer["delivery"] == "pending" and attempt(workshop, second, 2) == 0
    assert events(workshop, collection, made)[0]["delivery"] == "delivered"


def test_a_name_that_leads_to_this_machine_is_not_called(workshop: Workshop, hook: Hook) -> None:
    collection = workshop.guest.collection()
    made = alert(workshop, collection, webhook=hook.url)
    arrives(workshop, collection, 1)
    assert attempt(workshop, deliveries(workshop)[0]) == 0 and hook.calls == []
    (event,) = events(workshop, collection, made)
    assert (event["delivery"], event["error"]["code"]) == ("failed", "private_address")


@pytest.mark.parametrize("what", ["alert", "video", "collection", "tenant"])
def test_nothing_is_left_of_alerts(workshop: Workshop, what: str) -> None:
    guest, collection = workshop.guest, workshop.guest.collection()
    headers = {"Idempotency-Key": "made"}
    body = {"text": f"a lonely zeppelin, {what}", "webhook": "https://hook.example/"}
    made = guest.post(f"/collections/{collection}/alerts", body, headers=headers).json()
    video = arrives(workshop, collection, 1)
    (event,) = events(workshop, collection, made)
    (delivery,) = deliveries(workshop)
    paths = {"alert": f"/alerts/{made['id']}", "video": f"/videos/{video}", "collection": ""}
    if what == "tenant":
        assert guest.client.delete(f"/admin/tenants/{guest.name}", headers=ROOT).status_code == 204
    else:
        assert guest.call("DELETE", f"/collections/{collection}{paths[what]}").status_code == 204
    assert attempt(workshop, delivery) == 0
    workshop.work()
    assert tables_naming(workshop.storage, event["id"], delivery.id) == set()
    if what == "video":
        assert events(workshop, collection, made) == [] and tables_naming(workshop.storage, f"zeppelin, {what}") == {
            "alerts",
            "idempotency",
        }
    else:
        assert tables_naming(workshop.storage, f"zeppelin, {what}", made["id"]) == set()


def test_old_events_are_forgotten_unless_their_delivery_waits(workshop: Workshop) -> None:
    collection = workshop.guest.collection()
    plain, waiting = alert(workshop, collection), alert(workshop, collection, webhook="https://hook.example/")
    arrives(workshop, collection, 1)
    with workshop.storage.database.write() as connection:
        alert_rows.forget_events(connection, "2020")
        assert alert_rows.list_events(connection, workshop.tenant, plain["id"], 10, None).total == 1
        alert_rows.forget_events(connection, now(60))
    assert events(workshop, collection, plain) == [] and len(events(workshop, collection, waiting)) == 1
