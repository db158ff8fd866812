"""A video's way in: upload, facts, pictures, search, deletion, over a real server with its worker."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from serving import Server, Tenant, broken_clip, clip, colour, wait_for

from service.adapters.backbones import BackboneChoice


def test_an_uploaded_video_becomes_ready_and_is_found(server: Server, tenant: Tenant) -> None:
    collection = tenant.collection()
    data = clip(1, seconds=2.0)
    answer = tenant.upload(collection, data, "one.mp4", {"camera": "north"}, ["a plain picture"]).json()
    assert answer["status"] == "pending" and answer["duplicate_of"] is None
    assert tenant.task(answer["task_id"])["status"] == "succeeded"
    video = tenant.video(collection, answer["video_id"])
    facts = video["system_metadata"]
    assert facts["duration"] == pytest.approx(2.0, abs=0.15)
    assert (facts["width"], facts["height"], facts["codec"], facts["frames"]) == (96, 64, "h264", 20)
    assert facts["fps"] == pytest.approx(10)
    assert (facts["sha256"], facts["size"]) == (hashlib.sha256(data).hexdigest(), len(data))
    assert video["user_metadata"] == {"camera": "north"}
    assert [c["text"] for c in video["captions"]] == ["a plain picture"]
    (hit,) = tenant.search(collection)["data"]
    assert hit["rank"] == 1 and hit["video_id"] == answer["video_id"] and hit["metadata"] == {"camera": "north"}
    assert 0 <= hit["start"] < hit["end"] <= facts["duration"] + 1e-6
    assert -1 <= hit["score"] <= 1


def test_thumbnail_and_video_come_by_signed_url_and_in_ranges(server: Server, tenant: Tenant) -> None:
    collection, _ = tenant.filled([5])
    (hit,) = tenant.search(collection)["data"]
    picture = server.client.get(hit["thumbnail_url"])
    assert picture.headers["content-type"] == "image/jpeg"
    pixels = np.asarray(Image.open(BytesIO(picture.content)), float)
    np.testing.assert_allclose(pixels.mean(axis=(0, 1)), colour(5), atol=12)
    data, url = clip(5), hit["video_url"]
    assert server.client.get(url).content == data
    part = server.client.get(url, headers={"Range": "bytes=10-29"})
    assert (part.status_code, part.content) == (206, data[10:30])
    assert part.headers["content-range"] == f"bytes 10-29/{len(data)}"
    assert server.client.get(url, headers={"Range": "bytes=-7"}).content == data[-7:]
    assert server.client.get(url, headers={"Range": "bytes=50-"}).content == data[50:]
    assert server.client.get(url, headers={"Range": f"bytes={len(data)}-"}).status_code == 416
    assert server.client.get(url.replace("/video/", "/thumbnail/")).status_code == 403


def test_the_same_bytes_are_stored_once_and_told(tenant: Tenant) -> None:
    collection, (first,) = tenant.filled([6])
    again = tenant.upload(collection, clip(6), "other-name.mp4").json()
    assert again["duplicate_of"] == again["video_id"] == first
    with ThreadPoolExecutor(4) as pool:
        answers = [a.json() for a in pool.map(lambda _: tenant.upload(collection, clip(60)), range(4))]
    assert len({answer["video_id"] for answer in answers}) == 1
    assert tenant.get(f"/collections/{collection}/videos").json()["page_info"]["total_results"] == 2


def test_a_broken_file_ends_failed_with_a_reason_and_may_come_again(tenant: Tenant) -> None:
    collection = tenant.collection()
    answer = tenant.upload(collection, broken_clip()).json()
    video, task = tenant.video(collection, answer["video_id"]), tenant.task(answer["task_id"])
    assert (video["status"], task["status"]) == ("failed", "failed")
    assert video["error"] == task["error"]
    assert video["error"]["code"] == "unsupported_media" and video["error"]["detail"]
    assert tenant.upload(collection, broken_clip()).json()["video_id"] != answer["video_id"]
    assert tenant.search(collection)["data"] == []


def test_a_deleted_video_is_gone_from_lists_searches_and_the_disk(server: Server, tenant: Tenant) -> None:
    collection, (kept, gone) = tenant.filled([7, 8])
    url = next(hit for hit in tenant.search(collection)["data"] if hit["video_id"] == gone)["video_url"]
    assert tenant.call("DELETE", f"/collections/{collection}/videos/{gone}").status_code == 204
    assert tenant.found(collection) == [kept]
    assert tenant.get(f"/collections/{collection}/videos/{gone}").status_code == 404
    assert tenant.call("DELETE", f"/collections/{collection}/videos/{gone}").status_code == 404
    assert server.client.get(url).status_code == 404
    wait_for("the purge", lambda: not server.files_of(gone))
    assert server.files_of(kept)
    again = tenant.upload(collection, clip(8)).json()
    assert again["duplicate_of"] is None
    tenant.all_ready(collection, [again["video_id"]])
    assert set(tenant.found(collection)) == {kept, again["video_id"]}


def test_a_deleted_collection_leaves_nothing_on_disk_and_its_name_is_free(server: Server, tenant: Tenant) -> None:
    collection, _ = tenant.filled([9, 10])
    id_ = tenant.get(f"/collections/{collection}").json()["id"]
    assert list((server.data / "blobs").glob(f"*/{id_}/*"))
    assert tenant.call("DELETE", f"/collections/{collection}").status_code == 204
    assert tenant.post("/search", {"collection": collection, "text": "x"}).status_code == 404
    wait_for("the purge", lambda: not [p for p in (server.data / "blobs").glob(f"*/{id_}/**/*") if p.is_file()])
    tenant.collection(collection)
    assert tenant.search(collection)["data"] == []


def test_captions_are_replaced_and_checked(tenant: Tenant) -> None:
    collection, (video,) = tenant.filled([11])
    path = f"/collections/{collection}/videos/{video}/captions"
    texts = [{"text": "first", "start": 0.0, "end": 0.5}, {"text": "second"}]
    assert tenant.call("PUT", path, json={"captions": texts}).status_code == 200
    found = tenant.video(collection, video)["captions"]
    assert [(c["text"], c["start"], c["end"]) for c in found] == [("first", 0.0, 0.5), ("second", None, None)]
    assert tenant.call("PUT", path, json={"captions": []}).json()["captions"] == []


def test_filters_pages_and_groups(tenant: Tenant) -> None:
    collection, videos = tenant.filled(range(20, 27))
    assert set(tenant.found(collection, page_limit=3)) == set(videos)
    assert len(tenant.found(collection, page_limit=3)) == 7
    only = tenant.search(collection, filter={"metadata.number": {"in": [21, 25]}})["data"]
    assert {hit["metadata"]["number"] for hit in only} == {21, 25}
    assert tenant.search(collection, filter={"duration": {"gt": 3600}})["data"] == []
    assert len(tenant.search(collection, filter={"metadata.number": 22})["data"]) == 1
    assert set(tenant.found(collection, group_by="segment")) == set(videos)
    listed, token = [], None
    while True:
        page = tenant.get(f"/collections/{collection}/videos", page_limit=3, **({"page_token": token} if token else {})).json()
        listed += [row["video_id"] for row in page["data"]]
        assert page["page_info"]["total_results"] == 7
        if (token := page["page_info"]["next_page_token"]) is None:
            break
    assert sorted(listed) == sorted(videos) and len(listed) == 7


def test_a_long_video_is_found_by_segment_inside_its_duration(tenant: Tenant) -> None:
    collection = tenant.collection(segment_seconds=1.0)
    video = tenant.upload(collection, clip(30, seconds=3.0)).json()["video_id"]
    tenant.all_ready(collection, [video])
    hits = tenant.search(collection, group_by="segment")["data"]
    assert sorted((hit["start"], hit["end"]) for hit in hits) == [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)]
    assert len(tenant.search(collection)["data"]) == 1


def test_a_text_over_the_context_length_is_cut_and_told(tenant: Tenant) -> None:
    collection, _ = tenant.filled([31])
    assert "text_truncated" not in {warning["code"] for warning in tenant.search(collection, "ball " * 60)["warnings"]}
    told = {warning["code"]: warning["detail"] for warning in tenant.search(collection, "ball " * 200)["warnings"]}
    assert "77" in told["text_truncated"]


def test_a_backbone_that_knows_no_real_pictures_is_told_with_every_search(tenant: Tenant, server: Server) -> None:
    collection = tenant.collection()
    (warning,) = tenant.search(collection)["warnings"]
    assert warning["code"] == "backbone_knows_no_real_pictures" and "--backbone ViT-B-32" in warning["detail"]
    assert warning["detail"] in server.log


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        (BackboneChoice("builtin", None), True),
        (BackboneChoice("ViT-B-32", "random"), True),
        (BackboneChoice("ViT-B-32", "openai"), False),
        (BackboneChoice("builtin", "own.safetensors"), False),
    ],
)
def test_only_weights_without_real_pictures_are_warned_of(choice: BackboneChoice, told: bool) -> None:
    assert (choice.caution is not None) is told


def test_an_idempotency_key_gives_the_first_answer_again(tenant: Tenant) -> None:
    collection = tenant.collection()
    first, again = (tenant.upload(collection, clip(32), headers={"Idempotency-Key": "k1"}) for _ in range(2))
    assert first.json() == again.json() and again.json()["duplicate_of"] is None
    other = tenant.upload(collection, clip(33), headers={"Idempotency-Key": "k1"})
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


def test_a_task_tells_its_end_by_server_sent_events(server: Server, tenant: Tenant) -> None:
    collection = tenant.collection()
    task = tenant.upload(collection, clip(34)).json()["task_id"]
    body = tenant.get(f"/tasks/{task}/events").text
    assert body.count("event: task") >= 1
    assert '"status": "succeeded"' in body.strip().split("\n\n")[-1]
