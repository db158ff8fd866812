"""Every refusal is a problem document with a stable code, and says what is wrong."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from serving import ROOT, Tenant, clip, new_tenant
from sqlalchemy.exc import OperationalError
from structlog.testing import capture_logs

from service.http import uploads
from service.http.paging import encode
from service.storage.keys import sign


def check_problem(answer: Any, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert {"type", "title", "status", "detail", "code", "request_id"} <= problem.keys()
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["detail"] and problem["title"]
    assert problem["type"] == f"urn:polyclip:problem:{code}"
    assert problem["request_id"] == answer.headers["X-Request-Id"]
    assert ("WWW-Authenticate" in answer.headers) == (status == 401)
    return problem


def ask(tenant: Tenant, **body: Any) -> Any:
    return tenant.post("/search", body, role="search")


# Who asks


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "missing_key"),
        ({"Authorization": "Bearer"}, "missing_key"),
        ({"Authorization": "Basic YTpi"}, "missing_key"),
        ({"Authorization": "Bearer nonsense"}, "invalid_key"),
        ({"Authorization": "Bearer pc_abcdefgh_wrong"}, "invalid_key"),
        ({"X-API-Key": "pc_abcdefgh_wrong"}, "invalid_key"),
        ({"X-API-Key": b"pc_\xe4\xff_wrong"}, "invalid_key"),
    ],
)
def test_a_call_without_a_known_key_is_a_401(client: Any, headers: dict[str, str], code: str) -> None:
    check_problem(client.get("/collections", headers=headers), 401, code)


def test_both_headers_take_the_key(guest: Tenant) -> None:
    for headers in ({"Authorization": f"Bearer {guest.keys['search']}"}, {"X-API-Key": guest.keys["search"]}):
        assert guest.client.get("/collections", headers=headers).status_code == 200


def test_a_key_with_a_wrong_secret_is_invalid(guest: Tenant) -> None:
    headers = {"X-API-Key": guest.keys["admin"][:-1] + "~"}
    check_problem(guest.client.get("/collections", headers=headers), 401, "invalid_key")


def test_a_revoked_key_stops_working_at_once(guest: Tenant) -> None:
    key_id = guest.keys["write"].split("_")[1]
    assert guest.get("/collections", role="write").status_code == 200
    assert guest.call("DELETE", f"/admin/tenants/{guest.name}/keys/{key_id}").status_code == 204
    check_problem(guest.get("/collections", role="write"), 401, "invalid_key")
    check_problem(guest.call("DELETE", f"/admin/tenants/{guest.name}/keys/{key_id}"), 404, "key_not_found")


def test_an_expired_key_is_invalid(guest: Tenant) -> None:
    past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    made = guest.post(f"/admin/tenants/{guest.name}/keys", {"role": "search", "expires_at": past}).json()
    problem = check_problem(guest.client.get("/collections", headers={"X-API-Key": made["key"]}), 401, "invalid_key")
    assert "expired" in problem["detail"]


def test_a_key_that_expires_later_still_works(guest: Tenant) -> None:
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    made = guest.post(f"/admin/tenants/{guest.name}/keys", {"role": "search", "expires_at": later}).json()
    assert guest.client.get("/collections", headers={"X-API-Key": made["key"]}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "role"),
    [
        ("POST", "/collections", "search"),
        ("DELETE", "/collections/films", "search"),
        ("GET", "/tasks", "search"),
        ("POST", "/collections/films/videos", "search"),
        ("POST", "/admin/collections/films/adapters", "write"),
        ("POST", "/admin/collections/films/evaluate", "write"),
        ("POST", "/admin/tenants", "admin"),
    ],
)
def test_a_role_that_is_too_low_is_a_403(guest: Tenant, method: str, path: str, role: str) -> None:
    check_problem(guest.call(method, path, role, json={"name": "x"}), 403, "role_too_low")


def test_a_writer_sees_no_keys(guest: Tenant) -> None:
    check_problem(guest.get(f"/admin/tenants/{guest.name}/keys", role="write"), 403, "role_too_low")


def test_the_operators_key_belongs_to_no_tenant(client: Any) -> None:
    check_problem(client.get("/collections", headers=ROOT), 403, "role_too_low")


# What is asked


@pytest.mark.parametrize("text", ["", "   ", "\n\t\u2003"])
def test_an_empty_text_is_told_so(guest: Tenant, text: str) -> None:
    check_problem(ask(guest, collection=guest.collection(), text=text), 422, "empty_text")


def test_an_unknown_field_is_named_by_its_pointer(guest: Tenant) -> None:
    problem = check_problem(ask(guest, collection="films", text="a", colour="red"), 422, "invalid_request")
    assert [error["pointer"] for error in problem["errors"]] == ["/colour"]
    assert problem["errors"][0]["detail"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("page_limit", 0),
        ("page_limit", 51),
        ("page_limit", "many"),
        ("group_by", "tenant"),
        ("text", 7),
        ("text", "a" * 10_001),
        ("filter", "metadata"),
    ],
)
def test_a_field_out_of_range_is_named_by_its_pointer(guest: Tenant, field: str, value: Any) -> None:
    body = {"collection": guest.collection(), "text": "a", field: value}
    problem = check_problem(ask(guest, **body), 422, "invalid_request")
    assert [error["pointer"] for error in problem["errors"]] == [f"/{field}"]


@pytest.mark.parametrize("limit", [0, 51, "x"])
@pytest.mark.parametrize("path", ["/collections", "/tasks", "/collections/{name}/videos", "/collections/{name}/adapters"])
def test_a_list_gives_one_to_fifty_rows(guest: Tenant, path: str, limit: Any) -> None:
    answer = guest.get(path.format(name=guest.collection()), page_limit=limit)
    assert check_problem(answer, 422, "invalid_request")["errors"][0]["pointer"] == "/page_limit"


@pytest.mark.parametrize("token", ["", "nonsense", "*", "aWQ6eA", "b2Zmc2V0OngK", "b2Zmc2V0Oi01", encode("offset", "9" * 5000)])
def test_a_page_token_that_we_did_not_give_is_refused(guest: Tenant, token: str) -> None:
    """Among them: of another list (`id:x`), no number, a negative one, one of thousands of digits."""
    check_problem(ask(guest, collection=guest.collection(), text="a", page_token=token), 422, "invalid_page_token")


def test_a_page_token_of_a_search_is_none_of_a_list(guest: Tenant) -> None:
    check_problem(guest.get("/collections", page_token="b2Zmc2V0OjEw"), 422, "invalid_page_token")


@pytest.mark.parametrize(
    ("where", "pointer"),
    [
        ({"colour": "red"}, "/filter/colour"),
        ({"duration": {"over": 5}}, "/filter/duration/over"),
        ({"duration": {}}, "/filter/duration"),
        ({"metadata.tag": ["a"]}, "/filter/metadata.tag"),
        ({"metadata.tag": {"in": "a"}}, "/filter/metadata.tag/in"),
        ({"metadata.tag": {"exists": 1}}, "/filter/metadata.tag/exists"),
        ({"duration": {"gte": None}}, "/filter/duration/gte"),
        ({"duration": {"gte": True}}, "/filter/duration/gte"),
    ],
)
def test_a_bad_filter_is_named_by_its_pointer(guest: Tenant, where: Any, pointer: str) -> None:
    problem = check_problem(ask(guest, collection=guest.collection(), text="a", filter=where), 422, "invalid_filter")
    assert [error["pointer"] for error in problem["errors"]] == [pointer]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"text": ', b"\xff\xfe", b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_a_problem(guest: Tenant, body: bytes) -> None:
    answer = guest.call("POST", "/search", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    check_problem(answer, answer.status_code, "invalid_request")


def test_half_a_surrogate_pair_is_a_problem_of_the_client(guest: Tenant) -> None:
    collection = guest.collection()
    for body in (rb'{"collection": "%s", "text": "\ud800"}', rb'{"collection": "\ud800%s", "text": "a"}'):
        content = body % collection.encode()
        answer = guest.call("POST", "/search", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code in (404, 422), answer.text


# What there is not


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/collections/nowhere", "collection_not_found"),
        ("PATCH", "/collections/nowhere", "collection_not_found"),
        ("DELETE", "/collections/nowhere", "collection_not_found"),
        ("GET", "/collections/nowhere/videos", "collection_not_found"),
        ("GET", "/collections/{name}/videos/vid_x", "video_not_found"),
        ("DELETE", "/collections/{name}/videos/vid_x", "video_not_found"),
        ("GET", "/collections/{name}/adapters/adp_x", "adapter_not_found"),
        ("GET", "/collections/{name}/adapters/adp_x/weights", "adapter_not_found"),
        ("GET", "/collections/a%00b", "collection_not_found"),
        ("GET", "/tasks/task_x", "task_not_found"),
        ("GET", "/tasks/task_x/events", "task_not_found"),
        ("POST", "/tasks/task_x/cancel", "task_not_found"),
        ("GET", "/nowhere", "not_found"),
        ("GET", "/collections/a/b/c/d", "not_found"),
    ],
)
def test_what_there_is_not_is_a_404(guest: Tenant, method: str, path: str, code: str) -> None:
    body: dict[str, Any] = {"json": {"settings": {}}} if method == "PATCH" else {}
    check_problem(guest.call(method, path.format(name=guest.collection()), **body), 404, code)


def test_a_body_over_the_limit_is_a_413(guest: Tenant) -> None:
    answer = ask(guest, collection="films", text="a" * 9_000_000)
    check_problem(answer, 413, "body_too_large")


def test_a_search_in_an_unknown_collection_is_a_404(guest: Tenant) -> None:
    check_problem(ask(guest, collection="nowhere", text="a"), 404, "collection_not_found")


def test_an_unknown_adapter_cannot_be_activated(guest: Tenant) -> None:
    answer = guest.post(f"/admin/collections/{guest.collection()}/activate", {"adapter_id": "adp_x"})
    check_problem(answer, 404, "adapter_not_found")


def test_an_unknown_tenant_is_a_404_for_the_operator(client: Any) -> None:
    check_problem(client.get("/admin/tenants/nobody/usage", headers=ROOT), 404, "tenant_not_found")


def test_a_wrong_method_is_a_405(client: Any) -> None:
    check_problem(client.delete("/search"), 405, "method_not_allowed")


def test_our_own_fault_is_a_500_with_its_request_id(guest: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a secret of the house")

    monkeypatch.setattr(guest.client.app.state.services.searcher, "answer", broken)
    with capture_logs() as logs:
        problem = check_problem(ask(guest, collection="films", text="a"), 500, "internal")
    assert "secret" not in str(problem)
    assert [line["request_id"] for line in logs] == [problem["request_id"]]


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/", "/openapi.json", "/docs"])
def test_every_answer_bears_a_request_id(client: Any, path: str) -> None:
    ids = {client.get(path).headers["X-Request-Id"] for _ in range(2)}
    assert len(ids) == 2 and all(ids)


def test_without_a_worker_the_service_is_degraded_and_without_its_database_not_ready(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["status"], answer.json()["missing"]) == (200, "degraded", ["worker"])
    assert answer.json()["checks"] == {"backbone": True, "database": True, "worker": False}

    def gone() -> None:
        raise OperationalError("select 1", {}, Exception("the database is gone"))

    monkeypatch.setattr(client.app.state.services.storage.database, "read", gone)
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (503, "not ready")
    assert answer.json()["missing"] == ["database", "worker"]


# Uploads


def send(tenant: Tenant, **request: Any) -> Any:
    return tenant.call("POST", f"/collections/{tenant.collection()}/videos", **request)


def test_a_file_without_bytes_is_refused(guest: Tenant) -> None:
    check_problem(guest.upload(guest.collection(), b""), 422, "empty_file")


@pytest.mark.parametrize("data", [b"hello", b"hello, I am no video. " * 500, b"\x89PNG\r\n\x1a\n" + bytes(2000), bytes(5000)])
def test_a_file_that_is_no_video_is_refused_whatever_its_name(guest: Tenant, data: bytes) -> None:
    check_problem(guest.upload(guest.collection(), data, "film.mp4"), 415, "unsupported_media")


def test_a_file_over_the_limit_is_refused(guest: Tenant) -> None:
    problem = check_problem(guest.upload(guest.collection(), clip() + bytes(100_000)), 413, "video_too_large")
    assert "100000" in problem["detail"]


def test_a_file_over_the_limit_is_refused_before_it_is_sent(guest: Tenant) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=x", "Content-Length": "99999999999"}
    check_problem(send(guest, content=b"--x--", headers=headers), 413, "video_too_large")


def test_a_body_of_unknown_length_is_cut_off_at_the_limit(guest: Tenant) -> None:
    def body() -> Any:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n' + clip()
        for _ in range(20):
            yield bytes(10_000)
        yield b"\r\n--x--\r\n"

    answer = send(guest, content=body(), headers={"Content-Type": "multipart/form-data; boundary=x"})
    check_problem(answer, 413, "video_too_large")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"{}", "application/x-json"),
        (b"hello", "text/plain"),
        (b"hello", "multipart/form-data"),
        (b"hello", "multipart/form-data; boundary=x"),
        (b"--x\r\nhello", "multipart/form-data; boundary=x"),
        (b'--x\r\nContent-Disposition: form-data; name="other"\r\n\r\na\r\n--x--\r\n', "multipart/form-data; boundary=x"),
        (b"", "multipart/form-data; boundary=x"),
    ],
)
def test_a_body_without_a_multipart_file_is_refused(guest: Tenant, content: bytes, kind: str) -> None:
    check_problem(send(guest, content=content, headers={"Content-Type": kind}), 422, "invalid_upload")


def test_a_file_that_breaks_off_is_refused(guest: Tenant) -> None:
    content = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n' + clip()[:-100]
    answer = send(guest, content=content, headers={"Content-Type": "multipart/form-data; boundary=x"})
    check_problem(answer, 422, "invalid_upload")


def test_two_files_are_refused(guest: Tenant) -> None:
    files = [("file", ("a.mp4", clip(1))), ("file", ("b.mp4", clip(2)))]
    check_problem(send(guest, files=files), 422, "invalid_upload")


DEEP = '{"a":' * 500 + "1" + "}" * 500


@pytest.mark.parametrize(
    "metadata", ["[]", "7", '"a"', "{", "null", "true", '{"a": NaN}', '{"a": 1e999}', '{"a": "\\ud800"}', DEEP]
)
def test_metadata_must_be_a_json_object(guest: Tenant, metadata: str) -> None:
    check_problem(guest.upload(guest.collection(), clip(), metadata=metadata), 422, "invalid_upload")


@pytest.mark.parametrize(
    "captions",
    [
        "a ball",
        {"text": "a ball"},
        [7],
        [""],
        ["  "],
        [{"start": 0}],
        [{"text": ""}],
        [{"text": "a", "start": 2, "end": 1}],
        [{"text": "a", "start": -1}],
        [{"text": "a", "colour": "red"}],
        '[{"text": "a", "end": 1e999}]',
        '["\\ud800"]',
    ],
)
def test_malformed_captions_are_refused(guest: Tenant, captions: Any) -> None:
    check_problem(guest.upload(guest.collection(), clip(), captions=captions), 422, "invalid_upload")


def test_a_refused_upload_leaves_nothing_behind(guest: Tenant) -> None:
    collection = guest.collection()
    for data, metadata in ((b"", None), (b"hello", None), (clip() + bytes(100_000), None), (clip(), "[]")):
        assert guest.upload(collection, data, metadata=metadata).status_code in (413, 415, 422)
    assert guest.get(f"/collections/{collection}/videos").json()["data"] == []
    assert not list(guest.client.app.state.services.storage.settings.scratch.iterdir())


@pytest.mark.parametrize(
    "body", [{"captions": [{"text": "a", "start": 2, "end": 1}]}, {"captions": "a"}, {}, {"captions": [{}]}]
)
def test_put_captions_are_checked(guest: Tenant, body: Any) -> None:
    collection = guest.collection()
    video = guest.upload(collection, clip()).json()["video_id"]
    answer = guest.call("PUT", f"/collections/{collection}/videos/{video}/captions", json=body)
    assert check_problem(answer, 422, "invalid_request")["errors"]


@pytest.mark.parametrize("text", ["   ", "\n"])
def test_a_caption_of_white_space_is_refused_by_put_too(guest: Tenant, text: str) -> None:
    collection = guest.collection()
    video = guest.upload(collection, clip()).json()["video_id"]
    path = f"/collections/{collection}/videos/{video}/captions"
    answer = guest.call("PUT", path, json={"captions": [{"text": text}]})
    assert answer.status_code == 422
    check_problem(answer, 422, answer.json()["code"])


def test_numbers_without_end_are_refused(guest: Tenant) -> None:
    collection = guest.collection()
    video = guest.upload(collection, clip()).json()["video_id"]
    path = f"/collections/{collection}/videos/{video}/captions"
    content, headers = b'{"captions": [{"text": "a", "end": 1e999}]}', {"Content-Type": "application/json"}
    check_problem(guest.call("PUT", path, content=content, headers=headers), 422, "invalid_request")


# Names, keys, quotas


@pytest.mark.parametrize("name", ["", " ", "a b", "../up", "a/b", ".hidden", "ä", "a" * 65, "a\n", "a\0"])
def test_a_bad_name_is_refused(guest: Tenant, name: str) -> None:
    check_problem(guest.post("/collections", {"name": name}), 422, "invalid_name")
    check_problem(guest.client.post("/admin/tenants", json={"name": name}, headers=ROOT), 422, "invalid_name")


def test_a_name_is_given_once(guest: Tenant) -> None:
    collection = guest.collection()
    check_problem(guest.post("/collections", {"name": collection}), 409, "collection_exists")
    check_problem(guest.client.post("/admin/tenants", json={"name": guest.name}, headers=ROOT), 409, "tenant_exists")


def test_the_name_of_a_deleted_collection_is_free_again(guest: Tenant) -> None:
    collection = guest.collection()
    assert guest.call("DELETE", f"/collections/{collection}").status_code == 204
    check_problem(guest.get(f"/collections/{collection}"), 404, "collection_not_found")
    assert guest.post("/collections", {"name": collection}).status_code == 201


@pytest.mark.parametrize("settings", [{"segment_seconds": 0.999}, {"segment_seconds": 1e9}, {"colour": "red"}])
def test_bad_settings_are_refused(guest: Tenant, settings: Any) -> None:
    check_problem(guest.post("/collections", {"name": "x", "settings": settings}), 422, "invalid_request")
    answer = guest.call("PATCH", f"/collections/{guest.collection()}", json={"settings": settings})
    check_problem(answer, 422, "invalid_request")


@pytest.mark.parametrize("body", [{"role": "root"}, {}, {"role": "search", "expires_at": "soon"}])
def test_a_bad_key_request_is_refused(guest: Tenant, body: Any) -> None:
    check_problem(guest.post(f"/admin/tenants/{guest.name}/keys", body), 422, "invalid_request")


@pytest.mark.parametrize("moment", ["9999-12-31T23:59:59-12:00", "0001-01-01T00:00:00+12:00"])
def test_a_time_that_utc_cannot_hold_is_refused(guest: Tenant, moment: str) -> None:
    answer = guest.post(f"/admin/tenants/{guest.name}/keys", {"role": "search", "expires_at": moment})
    assert answer.status_code == 422, answer.text


def test_an_idempotency_key_gives_the_first_answer_again(guest: Tenant) -> None:
    body, headers = {"name": "once"}, {"Idempotency-Key": "k"}
    answers = [guest.post("/collections", body, headers=headers) for _ in range(2)]
    assert answers[0].status_code == answers[1].status_code == 201
    assert answers[0].json() == answers[1].json()


def test_an_idempotency_key_with_another_body_is_refused(guest: Tenant) -> None:
    headers = {"Idempotency-Key": "k"}
    assert guest.post("/collections", {"name": "first"}, headers=headers).status_code == 201
    check_problem(guest.post("/collections", {"name": "second"}, headers=headers), 422, "idempotency_key_reused")
    check_problem(guest.upload(guest.collection(), clip(), headers=headers), 422, "idempotency_key_reused")


def test_an_idempotency_key_of_another_tenant_does_not_meet_mine(guest: Tenant) -> None:
    other = new_tenant(guest.client)
    answers = [t.post("/collections", {"name": n}, headers={"Idempotency-Key": "k"}) for t, n in ((guest, "a"), (other, "b"))]
    assert [answer.status_code for answer in answers] == [201, 201]


def test_an_idempotency_key_of_a_duplicate_upload_is_bound_to_its_body(guest: Tenant) -> None:
    collection = guest.collection()
    guest.upload(collection, clip(1))
    answers = [guest.upload(collection, clip(1), headers={"Idempotency-Key": "k"}) for _ in range(2)]
    assert answers[0].json() == answers[1].json()
    check_problem(guest.upload(collection, clip(2), headers={"Idempotency-Key": "k"}), 422, "idempotency_key_reused")


def test_a_quota_is_kept(client: Any) -> None:
    tenant = new_tenant(client, {"max_collections": 1, "max_videos": 1, "max_bytes": len(clip(1)) + 10})
    collection = tenant.collection()
    check_problem(tenant.post("/collections", {"name": "more"}), 403, "quota_exceeded")
    first = tenant.upload(collection, clip(1))
    assert first.status_code == 202
    check_problem(tenant.upload(collection, clip(2)), 403, "quota_exceeded")
    usage = tenant.get(f"/admin/tenants/{tenant.name}/usage").json()
    assert usage["usage"] == {"collections": 1, "videos": 1, "bytes": len(clip(1)), "adapters": 0}
    assert tenant.call("DELETE", f"/collections/{collection}/videos/{first.json()['video_id']}").status_code == 204
    assert tenant.upload(collection, clip(2, seconds=0.5)).status_code == 202


def test_a_quota_of_bytes_is_kept(client: Any) -> None:
    tenant = new_tenant(client, {"max_bytes": 100})
    collection = tenant.collection()
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        whole = uploads._File.take
        patch.setattr(uploads._File, "take", lambda file, data: taken.append(len(data)) or whole(file, data))  # type: ignore[func-returns-value]
        answer = tenant.upload(collection, clip() + bytes(10_000_000))
    check_problem(answer, 403, "quota_exceeded")
    assert sum(taken) < 1_000_000, "it is refused while the bytes come, not after the last of them"


# Media


def media(tenant: Tenant, path: str, seconds: float = 60, **more: Any) -> Any:
    expires = int(time.time() + seconds)
    signature = sign(tenant.client.app.state.services.signing_secret, path, expires)
    return tenant.client.get(path, params={"exp": expires, "sig": signature, **more})


def test_a_wrong_signature_is_refused(guest: Tenant) -> None:
    for signature in ("0" * 40, "", "é"):
        check_problem(media(guest, "/media/video/vid_x", sig=signature), 403, "invalid_signature")


def test_a_signature_holds_for_its_own_time_only(guest: Tenant) -> None:
    check_problem(media(guest, "/media/video/vid_x", exp=int(time.time()) + 999), 403, "invalid_signature")


def test_an_expired_signature_is_refused(guest: Tenant) -> None:
    problem = check_problem(media(guest, "/media/video/vid_x", seconds=-1), 403, "invalid_signature")
    assert "expired" in problem["detail"]


def test_a_media_url_without_signature_is_refused(client: Any) -> None:
    check_problem(client.get("/media/video/vid_x"), 422, "invalid_request")


def test_an_unknown_kind_of_media_is_a_404(guest: Tenant) -> None:
    check_problem(media(guest, "/media/sound/vid_x"), 404, "media_not_found")


def test_media_of_an_unknown_video_is_a_404(guest: Tenant) -> None:
    check_problem(media(guest, "/media/video/vid_x"), 404, "video_not_found")


def test_a_thumbnail_that_is_not_made_yet_is_a_404(guest: Tenant) -> None:
    video = guest.upload(guest.collection(), clip()).json()["video_id"]
    check_problem(media(guest, f"/media/thumbnail/{video}-0"), 404, "file_missing")


# Adapters


@pytest.mark.parametrize("recipe", [{"colour": 1}, {"steps": 0}, {"rank": "x"}, {"learning_rate": 1e9}, {"frames": True}])
def test_a_bad_recipe_is_refused_at_once(guest: Tenant, recipe: Any) -> None:
    answer = guest.post(f"/admin/collections/{guest.collection()}/adapters", {"recipe": recipe})
    check_problem(answer, 422, "invalid_recipe")


@pytest.mark.parametrize("body", [{"activate": "perhaps"}, {"scope": "none"}, {"colour": 1}])
def test_a_bad_training_request_is_refused(guest: Tenant, body: Any) -> None:
    answer = guest.post(f"/admin/collections/{guest.collection()}/adapters", body)
    check_problem(answer, 422, "invalid_request")


def test_an_adapter_cannot_be_trained_on_too_few_captions(guest: Tenant) -> None:
    problem = check_problem(guest.post(f"/admin/collections/{guest.collection()}/adapters"), 409, "too_few_captions")
    assert "10" in problem["detail"]


@pytest.mark.parametrize("data", [b"garbage", b"\xff" * 100, b"\x10\0\0\0\0\0\0\0{}              "])
def test_a_file_that_is_no_adapter_is_refused(guest: Tenant, data: bytes) -> None:
    path = f"/admin/collections/{guest.collection()}/adapters/import"
    check_problem(guest.call("POST", path, files={"file": ("a.safetensors", data)}), 422, "invalid_adapter")


def test_an_upload_to_an_unknown_collection_is_a_404(guest: Tenant) -> None:
    check_problem(guest.upload("nowhere", clip()), 404, "collection_not_found")
