"""What odd clients send: ranges, HEAD, numbers of thousands of digits, tokens of their own making, thousands of faults."""

from __future__ import annotations

import base64
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from serving import ROOT, Tenant, clip, new_tenant
from test_errors import check_problem
from workshop import Workshop, application

from service.http.media import media_type
from service.http.paging import MAX_OFFSET
from service.upkeep import import_collection

NINES = "9" * 5000


@pytest.fixture(scope="module")
def film(client: Any) -> tuple[str, bytes]:
    """The signed URL of a video, and its bytes."""
    guest = new_tenant(client)
    collection = guest.collection()
    guest.upload(collection, clip(3))
    return guest.call("GET", f"/collections/{collection}/videos").json()["data"][0]["video_url"], clip(3)


@pytest.mark.parametrize(
    ("asked", "first", "end"),
    [
        ("bytes=0-1", 0, 2), ("BYTES=0-1", 0, 2), ("bytes= 0-1", 0, 2), ("bytes=-5", -5, None), ("bytes=0-" + NINES, 0, None),
        ("bytes=-" + NINES, 0, None), ("bytes=5-", 5, None), (f"bytes={'0' * 5000}5-7", 5, 8),
    ],
)  # fmt: skip
def test_a_range_is_answered_with_its_part(client: Any, film: Any, asked: str, first: int, end: int | None) -> None:
    url, data = film
    answer = client.get(url, headers={"Range": asked})
    assert (answer.status_code, answer.content) == (206, data[first:end])


@pytest.mark.parametrize("asked", ["bytes=0-1,4-5", "items=0-1", "bytes=--1", "bytes=-", "bytes=a-b", "bytes=٣-٤", ""])
def test_ranges_that_are_not_one_are_answered_with_the_whole(client: Any, film: Any, asked: str) -> None:
    url, data = film
    answer = client.get(url, headers={"Range": asked.encode()})
    assert (answer.status_code, answer.content) == (200, data)


@pytest.mark.parametrize("asked", ["bytes=" + NINES + "-", "bytes=-0", "bytes=5-2", "bytes=99999999-,-0"])
def test_a_range_that_is_nowhere_is_a_416_with_the_size(client: Any, film: Any, asked: str) -> None:
    url, data = film
    answer = client.get(url, headers={"Range": asked})
    check_problem(answer, 416, "invalid_range")
    assert answer.headers["Content-Range"] == f"bytes */{len(data)}"


def test_a_range_of_another_version_is_answered_with_the_whole(client: Any, film: Any) -> None:
    url, _ = film
    etag = client.get(url).headers["ETag"]
    for told, status in ((etag, 206), ('"other"', 200), (f"W/{etag}", 200), ("Wed, 21 Oct 2015 07:28:00 GMT", 200)):
        assert client.get(url, headers={"Range": "bytes=0-1", "If-Range": told}).status_code == status


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/", "/openapi.json"])
def test_head_is_answered_as_get_without_the_body(client: Any, path: str) -> None:
    get, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers["Content-Length"] == get.headers["Content-Length"]


def test_head_of_a_video_tells_its_size_and_of_a_post_route_nothing(client: Any, film: Any) -> None:
    url, data = film
    head = client.head(url, headers={"Range": "bytes=0-1"})
    assert (head.status_code, head.content) == (206, b"")
    assert client.head(url).headers["Content-Length"] == str(len(data))
    assert client.head("/search").status_code == 405


def test_head_of_a_stream_ends(guest: Tenant) -> None:
    task = guest.upload(guest.collection(), clip(1)).json()["task_id"]
    answer = guest.call("HEAD", f"/tasks/{task}/events")
    assert (answer.status_code, answer.content) == (200, b"")


def test_numbers_of_thousands_of_digits_are_no_fault_of_ours(guest: Tenant, film: Any) -> None:
    url, _ = film
    task = guest.upload(guest.collection(), clip(1)).json()["task_id"]
    guest.call("POST", f"/tasks/{task}/cancel")
    answers = [
        guest.call("GET", f"/tasks/{task}/events", headers={"Last-Event-ID": NINES}),
        guest.call("GET", f"/collections?page_limit={NINES}"),
        guest.client.get(f"{url.split('?')[0]}?exp={NINES}&sig=a"),
        guest.call("POST", "/search", content=f'{{"collection": "films", "text": "a", "page_limit": {NINES}}}'),
    ]
    assert [answer.status_code < 500 for answer in answers] == [True] * 4


@pytest.mark.parametrize(
    ("container", "head", "expected"),
    [
        ("mov,mp4,m4a,3gp,3g2,mj2", b"\0\0\0\x20ftypisom", "video/mp4"),
        ("mov,mp4,m4a,3gp,3g2,mj2", b"\0\0\0\x14ftypqt  ", "video/quicktime"),
        ("mov,mp4,m4a,3gp,3g2,mj2", b"\0\0\0\x08wide", "video/quicktime"),
        ("matroska,webm", b"\x1aE\xdf\xa3\x9fB\x86\x81\x01B\x82\x84webm", "video/webm"),
        ("matroska,webm", b"\x1aE\xdf\xa3\x9fB\x86\x81\x01B\x82\x88matroska", "video/x-matroska"),
        ("avi", b"RIFF", "video/x-msvideo"),
        ("mpegts", b"\x47", "video/mp2t"),
        ("mpeg", b"\0\0\1\xba", "video/mpeg"),
        ("flv", b"FLV", "video/x-flv"),
        ("asf", b"\x30\x26\xb2\x75", "video/x-ms-asf"),
        ("ogg", b"OggS", "video/ogg"),
        ("gif", b"GIF89a", "image/gif"),
        ("yuv4mpegpipe", b"YUV4MPEG2", "application/octet-stream"),
        ("", b"\0\0\0\x20ftypmp42", "video/mp4"),
    ],
)
def test_a_video_is_sent_as_what_it_is(container: str, head: bytes, expected: str) -> None:
    assert media_type(container, head) == expected


def forged(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


@pytest.mark.parametrize("token", [f"offset:{MAX_OFFSET + 1}", "offset:" + "9" * 15, "offset:" + NINES, "id:vid_1", "offset:٣"])
def test_an_offset_that_no_list_gives_is_refused(guest: Tenant, token: str) -> None:
    collection = guest.collection()
    body = {"collection": collection, "text": "a", "page_token": forged(token)}
    check_problem(guest.call("POST", "/search", json=body), 422, "invalid_page_token")


@pytest.mark.parametrize("token", ["id:", "id:x\0", "id:" + NINES, "offset:10"])
@pytest.mark.parametrize("path", ["/collections", "/tasks", "/collections/{}/videos", "/collections/{}/adapters"])
def test_an_id_that_no_list_gives_is_refused(guest: Tenant, path: str, token: str) -> None:
    answer = guest.call("GET", path.format(guest.collection()), params={"page_token": forged(token)})
    check_problem(answer, 422, "invalid_page_token")


def test_of_thousands_of_faults_some_are_listed_and_the_rest_is_counted(guest: Tenant) -> None:
    body = {"collection": "films", "text": "a", **{f"unknown{i}": i for i in range(30_000)}, "x" * 100_000: 1}
    answer = guest.call("POST", "/search", content=json.dumps(body), headers={"Content-Type": "application/json"})
    problem = check_problem(answer, 422, "invalid_request")
    assert len(problem["errors"]) == 20 and problem["errors_left_out"] == 30_001 - 20
    assert len(answer.content) < 20_000


def test_what_a_fault_quotes_is_bounded(guest: Tenant) -> None:
    bodies: list[dict[str, Any]] = [
        {"collection": "x" * 100_000, "text": "a"},
        {"collection": "films", "text": "a", "filter": {"x" * 100_000: {"huh": 1}}},
        {"collection": "films", "text": "a", "x" * 100_000: 1},
    ]
    for body in bodies:
        assert len(guest.call("POST", "/search", json=body).content) < 10_000


def test_a_video_that_is_not_indexed_yet_is_told_and_things_bear_one_name(guest: Tenant) -> None:
    collection = guest.collection()
    sent = guest.upload(collection, clip(1)).json()
    answer = guest.call("POST", "/search", json={"collection": collection, "text": "a"}).json()
    assert answer["search_pool"]["pending_videos"] == 1
    assert "videos_pending" in [warning["code"] for warning in answer["warnings"]]
    assert guest.call("GET", f"/tasks/{sent['task_id']}").json()["collection"] == collection
    assert guest.call("GET", "/tasks").json()["data"][0]["collection"] == collection
    path = f"/collections/{collection}/videos/{sent['video_id']}"
    video = guest.call("PUT", f"{path}/captions", json={"captions": ["a ball", {"text": "a cup", "start": 1}]}).json()
    assert [caption["text"] for caption in video["captions"]] == ["a ball", "a cup"]
    assert video["id"] == video["video_id"] and video["metadata"] == video["user_metadata"]
    check_problem(guest.call("PUT", f"{path}/captions", json={"captions": [" "]}), 422, "invalid_request")
    fields = guest.client.get("/openapi.json").json()["components"]["schemas"]["VideoOut"]["properties"]
    assert {name for name, field in fields.items() if field.get("deprecated")} == {"video_id", "user_metadata"}


ODD = ["a\0b", "\ud800"]  # NUL, and half of a surrogate pair


@pytest.mark.parametrize("text", ODD, ids=["nul", "surrogate"])
def test_a_text_that_cannot_be_stored_is_refused_wherever_it_comes(guest: Tenant, text: str) -> None:
    collection = guest.collection()
    video = guest.upload(collection, clip(1)).json()["video_id"]
    json_headers = {"Content-Type": "application/json"}

    def send(method: str, path: str, body: Any) -> Any:
        return guest.call(method, path, content=json.dumps(body), headers=json_headers)

    refused = [
        send("POST", "/collections", {"name": text}),
        send("POST", "/collections", {"name": "described", "settings": {"description": text}}),
        send("PATCH", f"/collections/{collection}", {"settings": {"description": text}}),
        send("PUT", f"/collections/{collection}/videos/{video}/captions", {"captions": [f"a {text}"]}),
        send("PUT", f"/collections/{collection}/videos/{video}/captions", {"captions": [{"text": f"a {text}"}]}),
        send("POST", f"/admin/collections/{collection}/adapters", {"recipe": {text: 1}}),
        send("POST", f"/admin/collections/{collection}/adapters", {"recipe": {"preset": text}}),
        guest.upload(collection, clip(2), metadata=json.dumps({"k": [text]})),
        guest.upload(collection, clip(2), metadata=json.dumps({text: 1})),
        guest.upload(collection, clip(2), captions=json.dumps([text])),
        guest.upload(collection, clip(1), metadata=json.dumps({"k": text})),
    ]
    assert [answer.status_code for answer in refused] == [422] * len(refused)
    absent = [
        send("POST", f"/admin/collections/{collection}/activate", {"adapter_id": text}),
        send("POST", "/search", {"collection": text, "text": "a"}),
    ]
    assert {answer.status_code for answer in absent} <= {404, 422}
    body = {"collection": collection, "text": f"a {text} b", "filter": {"metadata.k": text, f"metadata.{text}": 1}}
    assert send("POST", "/search", body).status_code in (200, 422)
    assert guest.get(f"/collections/{collection}/videos").json()["page_info"]["total_results"] == 1


@pytest.mark.parametrize(
    "path",
    [
        "/collections/{0}", "/collections/{0}/videos", "/collections/films/videos/{0}", "/tasks/{0}", "/tasks/{0}/events",
        "/collections/films/adapters/{0}", "/collections/films/adapters/{0}/weights", "/admin/collections/{0}/export",
        "/tasks?collection={0}", "/admin/tenants/{0}/usage",
    ],
)  # fmt: skip
def test_an_id_with_a_nul_names_nothing(guest: Tenant, path: str) -> None:
    guest.collection("films")
    for odd in ("%00", "a%00b", "%ED%A0%80"):
        answer = guest.call("GET", path.format(odd))
        assert answer.status_code == 404 and answer.json()["code"].endswith("not_found"), answer.text


def test_the_operator_too_may_send_odd_names(client: Any) -> None:
    for method, path in (("GET", "/usage"), ("GET", "/keys"), ("DELETE", ""), ("DELETE", "/keys/%00")):
        assert client.request(method, f"/admin/tenants/a%00b{path}", headers=ROOT).status_code == 404
    check_problem(client.post("/admin/tenants", json={"name": "a\0b"}, headers=ROOT), 422, "invalid_name")


@pytest.mark.parametrize("key", [b"pc_a\0b_secret", b"pc_\0_", b"\0", b"pc_\xed\xa0\x80_x"])
def test_a_key_that_cannot_be_one_is_invalid(client: Any, key: bytes) -> None:
    check_problem(client.get("/collections", headers={"X-API-Key": key}), 401, "invalid_key")


def test_a_file_name_is_stored_without_what_cannot_be_printed(guest: Tenant) -> None:
    collection = guest.collection()
    guest.upload(collection, clip(1), "a\0b.mp4")
    (video,) = guest.get(f"/collections/{collection}/videos").json()["data"]
    assert "\0" not in video["filename"]


# A key that a request is sent again with


@pytest.mark.parametrize("key", ["", "a\0b"])
def test_an_empty_idempotency_key_or_an_odd_one_is_refused(guest: Tenant, key: str) -> None:
    answer = guest.post("/collections", {"name": "films"}, headers={"Idempotency-Key": key})
    check_problem(answer, 422, "invalid_request")
    assert guest.get("/collections").json()["data"] == []


def test_of_requests_at_once_with_one_key_one_is_done(guest: Tenant) -> None:
    """Each is let in before the other has been answered."""
    collection = guest.collection()
    headers = {"Idempotency-Key": "k"}
    asks = {
        "collection": lambda: guest.post("/collections", {"name": "made"}, headers={"Idempotency-Key": "c"}),
        "task": lambda: guest.post(f"/admin/collections/{collection}/activate", {"adapter_id": None}, headers=headers),
        "upload": lambda: guest.upload(collection, clip(1), headers={"Idempotency-Key": "u"}),
    }
    for what, ask in asks.items():
        with ThreadPoolExecutor(6) as pool:
            answers = [future.result() for future in [pool.submit(ask) for _ in range(6)]]
        assert {answer.status_code for answer in answers} == {201 if what == "collection" else 202}, what
        assert len({answer.text for answer in answers}) == 1, what
    assert [task["kind"] for task in guest.get("/tasks").json()["data"]] == ["index_video", "activate"]


def test_of_two_imports_at_once_with_one_key_one_is_done(workshop: Workshop) -> None:
    guest, together = workshop.guest, threading.Barrier(2, timeout=60)
    collection, _ = workshop.filled([1])
    archive = guest.call("GET", f"/admin/collections/{collection}/export").content
    look = import_collection.look

    def looked(*of: Any) -> str:
        """Both requests come so far before either has been answered."""
        found = look(*of)
        together.wait()
        return found

    def ask() -> Any:
        path, headers = "/admin/collections/import?collection=copy", {"Idempotency-Key": "k"}
        return guest.call("POST", path, files={"file": ("a.tar", archive)}, headers=headers)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(import_collection, "look", looked)
        answers = [future.result() for future in [pool.submit(ask) for _ in range(2)]]
    assert [answer.status_code for answer in answers] == [202, 202], [answer.text for answer in answers]
    assert answers[0].text == answers[1].text
    (task,) = workshop.open_tasks()
    assert workshop.storage.blobs.exists(task.request["archive"])
    workshop.work()


def test_when_every_connection_to_the_database_is_in_use_the_answer_is_a_503(tmp_path: Path) -> None:
    with application(tmp_path / "data", database_connections=4, database_seconds=0.05) as client:
        guest = new_tenant(client)
        with ExitStack() as held:
            for _ in range(4):
                held.enter_context(client.app.state.services.storage.database.read())  # type: ignore[attr-defined]
            answer = guest.call("GET", "/collections")
        problem = check_problem(answer, 503, "overloaded")
        assert answer.headers["Retry-After"] and "database" in problem["detail"]
        assert guest.call("GET", "/collections").status_code == 200
