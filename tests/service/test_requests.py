"""What odd clients send: ranges, HEAD, numbers of thousands of digits, tokens of their own making, thousands of faults."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from serving import Tenant, clip
from test_errors import check_problem

from service.http.media import media_type
from service.http.paging import MAX_OFFSET

NINES = "9" * 5000


@pytest.fixture(scope="module")
def film(client: Any) -> tuple[str, bytes]:
    """The signed URL of a video, and its bytes."""
    from serving import new_tenant

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
