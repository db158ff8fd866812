"""Every kind of query against what it is by its definition, computed from the stored vectors; and what is refused."""

from __future__ import annotations

import json
import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from serving import new_tenant
from sqlalchemy import insert
from workshop import Workshop

import adapters_store
from backbone import Adapter, AdapterShape, q_score, to_pixels
from indexer.pictures import MAX_SCANS, InvalidImage, read_picture
from service.adapters.publish import publish
from service.search.question import TEXT_WEIGHT
from service.storage import collection_rows, generation_rows
from service.storage.tables import new_id, now, videos
from service.storage.tables import segments as segment_table
from service.videos import video_rows

FRAMES, SECONDS = 4, 8.0
Vectors = NDArray[np.float32]


class Shelf:
    """A collection of videos of two segments whose vectors the test knows: the frozen backbone's, and an adapter's."""

    def __init__(self, workshop: Workshop, count: int, segments: int = 2) -> None:
        self.workshop, self.backbone, self.name = workshop, workshop.encoder.backbone, workshop.guest.collection()
        self.id, self.tenant = workshop.id(self.name), workshop.tenant
        self._rng = np.random.default_rng(0)
        self.adapters: dict[str, Adapter | None] = {"none": None}
        self.frames: dict[str, dict[str, Vectors]] = {"none": {}}  # by adapter and video: (segments, FRAMES, D)
        with workshop.storage.database.write() as connection:
            self.first = generation_rows.active_of(connection, self.tenant, self.id)
            self.videos = [new_id("vid") for _ in range(count)]
            same = {"tenant_id": self.tenant, "collection_id": self.id, "task_id": "task", "size": 1, "status": "ready"}
            rows = [
                {
                    **same, "id": video, "sha256": str(i), "filename": f"{i * 7 % count:03d}.mp4",
                    "media": {"duration": float(i * 3 % count)} if i else None,
                    "metadata": {"number": i, "even": i % 2 == 0}, "created_at": now(), "updated_at": now(),
                }
                for i, video in enumerate(self.videos)
            ]  # fmt: skip
            connection.execute(insert(videos), rows)
            self.fill(connection, "none", self.first.id, self.videos, segments)

    def fill(self, connection: Any, adapter: str, generation: str, of: list[str], segments: int = 2) -> None:
        rows, length = [], SECONDS / segments
        for video in of:
            frames = self._rng.normal(size=(segments, FRAMES, self.backbone.embed_dim)).astype(np.float16)
            self.frames[adapter][video] = frames.astype(np.float32)
            mean = frames.astype(np.float32).mean(1)
            pooled = (mean / np.linalg.norm(mean, axis=1, keepdims=True)).astype(np.float16)
            for i in range(segments):
                row = {"vector_set": generation, "video_id": video, "ordinal": i, "start": i * length, "end": (i + 1) * length}
                rows.append({**row, "pooled": pooled[i].tobytes(), "frames": frames[i].tobytes()})
        if rows:
            connection.execute(insert(segment_table), rows)

    def add_adapter(self, state: str, videos: list[str]) -> str:
        """An adapter that matters, with a generation that holds these videos: active, retired or building."""
        shape = AdapterShape(self.backbone.dims, rank=2, shared=0)
        tensors = {name: 30 * tensor for name, tensor in shape.initial(len(self.adapters)).items()}
        packed = adapters_store.pack(shape, self.backbone.fingerprint, tensors)
        storage, encoder = self.workshop.storage, self.workshop.encoder
        version = publish(storage, encoder, self.tenant, self.id, packed, adapters_store.describe(packed)).id
        self.adapters[version], self.frames[version] = shape.assemble(tensors), {}
        with storage.database.write() as connection:
            given = (connection, self.tenant, self.id)
            row = generation_rows.add_generation(*given, version, self.backbone.fingerprint, None, "building")
            self.fill(connection, version, row["id"], videos)
            if state == "active":
                collection_rows.switch(*given, row["id"])
            else:
                generation_rows.set_generation_state(connection, self.tenant, row["id"], state)
        return version

    # --- what is right

    @torch.inference_mode()
    def text(self, text: str, adapter: str = "none") -> Vectors:
        backbone = self.backbone
        return backbone.encode_text(backbone.tokenize([text]).ids, self.adapters[adapter]).numpy()[0]  # type: ignore[no-any-return]

    @torch.inference_mode()
    def picture(self, picture: Image.Image, adapter: str = "none") -> Vectors:
        pixels = torch.from_numpy(to_pixels(picture, self.backbone.form))[None]
        return self.backbone.encode_frames(pixels, self.adapters[adapter]).numpy()[0]  # type: ignore[no-any-return]

    def ranked(self, query: Vectors, adapter: str = "none", without: str | None = None) -> list[tuple[str, float]]:
        """Every video with its best segment's score, best first."""
        found = {
            video: float(q_score(torch.tensor(query)[None], torch.from_numpy(frames)).max())
            for video, frames in self.frames[adapter].items()
            if video != without
        }
        return sorted(found.items(), key=lambda pair: -pair[1])

    # --- what is answered

    def pages(self, path: str = "/search", limit: int = 7, **body: Any) -> list[dict[str, Any]]:
        """All hits, page after page, each of which tells the same total."""
        token, hits, totals = None, [], set()
        while True:
            sent = {"collection": self.name, **body, "page_limit": limit, **({"page_token": token} if token else {})}
            if path == "/search/image":
                image = sent.pop("image")
                files = {"image": ("p", image), "query": (None, json.dumps(sent))}
                answer = self.workshop.guest.call("POST", path, "search", files=files)
            else:
                answer = self.workshop.guest.post(path, sent, role="search")
            assert answer.status_code == 200, answer.text
            hits += answer.json()["data"]
            totals.add(answer.json()["page_info"]["total_results"])
            if (token := answer.json()["page_info"]["next_page_token"]) is None:
                assert totals == {len(hits)}
                return hits

    def finds(
        self, query: Vectors, path: str = "/search", under: str = "none", without: str | None = None, **body: Any
    ) -> None:
        got = [(hit["video_id"], hit["score"]) for hit in self.pages(path, **body)]
        expected = self.ranked(query, under, without)
        assert [score for _, score in got] == pytest.approx([score for _, score in expected], abs=2e-4)
        assert {video for video, _ in got} == {video for video, _ in expected}

    def refused(self, path: str, status: int, code: str, **body: Any) -> None:
        answer = self.workshop.guest.post(path, {"collection": self.name, **body}, role="search")
        assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text


def unit(vector: Vectors) -> Vectors:
    return np.asarray(vector / np.linalg.norm(vector))


def length(*vectors: Vectors) -> float:
    return float(np.mean([np.linalg.norm(vector) for vector in vectors]))


def png(picture: Image.Image, **options: Any) -> bytes:
    picture.save(memory := BytesIO(), "PNG", **options)
    return memory.getvalue()


def drawn(seed: int = 0, size: tuple[int, int] = (90, 60)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def shelf(client: Any) -> Shelf:
    return Shelf(Workshop(new_tenant(client)), 20)


def test_several_texts_are_searched_by_their_mean_and_a_negative_is_taken_away(shelf: Shelf) -> None:
    a, b, no = (shelf.text(text) for text in ("a red ball", "the sea", "snow"))
    shelf.finds(a, text="a red ball")
    shelf.finds(length(a, b) * unit(unit(a) + unit(b)), texts=["a red ball", " the  sea "])
    less: dict[str, Any] = {"not": "snow"}
    shelf.finds(length(a) * unit(unit(a) - 0.5 * unit(no)), text="a red ball", **less)
    shelf.finds(length(a) * unit(unit(a) - 0.9 * unit(no)), text="a red ball", **less, not_weight=0.9)


def test_a_picture_is_a_frame_and_may_have_a_text_with_it(shelf: Shelf) -> None:
    picture = drawn()
    seen, text = shelf.picture(picture), shelf.text("a red ball")
    shelf.finds(seen, "/search/image", image=png(picture))
    weights: tuple[tuple[float, dict[str, Any]], ...] = ((TEXT_WEIGHT, {}), (0.8, {"text_weight": 0.8}))
    for weight, sent in weights:
        long = weight * length(text) + (1 - weight) * length(seen)
        both = weight * unit(text) + (1 - weight) * unit(seen)
        shelf.finds(long * unit(both), "/search/image", image=png(picture), text="a red ball", **sent)


def test_more_like_a_part_of_a_video_leaves_that_video_out(shelf: Shelf) -> None:
    video = shelf.videos[3]
    frames = shelf.frames["none"][video].reshape(-1, shelf.backbone.embed_dim)  # one a second, in the middle of each

    def like(chosen: Vectors) -> Vectors:
        return length(*chosen) * unit(np.mean([unit(frame) for frame in chosen], axis=0))

    parts: tuple[tuple[dict[str, Any], Vectors], ...] = (
        ({}, frames), ({"start": 2.0, "end": 5.2}, frames[2:5]), ({"start": 3.6, "end": 3.9}, frames[3:4])
    )  # fmt: skip
    for body, part in parts:
        shelf.finds(like(part), "/search/video", without=video, video_id=video, **body)
    everyone = shelf.pages("/search/video", video_id=video, group_by="segment")
    assert len(everyone) == 2 * (len(shelf.videos) - 1) and video not in {hit["video_id"] for hit in everyone}
    for body in ({"start": 8.0}, {"start": 5.0, "end": 5.0}, {"start": 2.0, "end": 1.0}):
        shelf.refused("/search/video", 422, "invalid_part", video_id=video, **body)
    shelf.refused("/search/video", 422, "invalid_request", video_id=video, start=-1)


def test_a_video_of_another_tenant_or_collection_is_not_there(shelf: Shelf) -> None:
    mine, theirs = Shelf(shelf.workshop, 2), Shelf(Workshop(new_tenant(shelf.workshop.guest.client)), 2)
    for foreign in (mine.videos[0], theirs.videos[0], "vid_nothing"):
        shelf.refused("/search/video", 404, "video_not_found", video_id=foreign)
    for generation in (mine.first.id, theirs.first.id):
        shelf.refused("/search", 404, "generation_not_found", text="a ball", generation=generation)
    shelf.refused("/search", 404, "adapter_not_found", text="a ball", adapter=theirs.add_adapter("active", theirs.videos))
    with shelf.workshop.storage.database.write() as connection:
        video_rows.mark_video_deleted(connection, mine.tenant, mine.videos[0])
        pending = new_id("vid")
        video_rows.add_video(connection, mine.tenant, mine.id, pending, "p.mp4", "p", 1, {}, [])
    mine.refused("/search/video", 404, "video_not_found", video_id=mine.videos[0])
    mine.refused("/search/video", 409, "video_without_vectors", video_id=pending)


def test_a_search_under_another_generation_switches_nothing(client: Any) -> None:
    shelf = Shelf(Workshop(new_tenant(client)), 6)
    old, active = shelf.add_adapter("retired", shelf.videos[:4]), shelf.add_adapter("active", shelf.videos)
    building, empty = shelf.add_adapter("building", shelf.videos[:1]), shelf.add_adapter("retired", [])
    picture, text = drawn(), "a red ball"
    for adapter, how in ((active, {}), (active, {"adapter": active}), (old, {"adapter": old}), ("none", {"adapter": "none"})):
        shelf.finds(shelf.text(text, adapter), under=adapter, text=text, **how)
        shelf.finds(shelf.picture(picture, adapter), "/search/image", adapter, image=png(picture), **how)
    shelf.finds(shelf.text(text), text=text, generation=shelf.first.id)
    answer = shelf.workshop.guest.search(shelf.name, text, adapter=old)
    assert "lacks 2 " in {w["code"]: w["detail"] for w in answer["warnings"]}["generation_lacks_videos"]
    assert answer["search_pool"]["adapter"] == old
    shelf.refused("/search/video", 409, "video_without_vectors", video_id=shelf.videos[5], adapter=old)
    for adapter in (building, empty):
        shelf.refused("/search", 409, "generation_unusable", text=text, adapter=adapter)
    never = shelf.workshop.adapter(shelf.name, 9)
    shelf.refused("/search", 409, "generation_unusable", text=text, adapter=never)
    shelf.refused("/search", 422, "invalid_request", text=text, adapter=old, generation=shelf.first.id)
    after = shelf.workshop.guest.search(shelf.name, text)
    assert after["search_pool"]["adapter"] == active
    assert "generation_lacks_videos" not in {warning["code"] for warning in after["warnings"]}


def test_hits_are_sorted_after_the_score_has_decided_which_they_are(shelf: Shelf) -> None:
    by_score = shelf.pages(text="a ball")
    assert [hit["rank"] for hit in by_score] == list(range(1, 21))
    keys = {
        "filename": lambda hit: hit["filename"],
        "created_at": lambda hit: shelf.videos.index(hit["video_id"]),
        "duration": lambda hit: hit["metadata"]["number"] * 3 % 20,
    }
    for sort_by, key in keys.items():
        for order in ("asc", "desc", None):
            ordered: dict[str, Any] = {"order": order} if order else {}
            hits = shelf.pages(text="a ball", sort_by=sort_by, **ordered)
            told = [hit for hit in hits if sort_by != "duration" or hit["video_id"] != shelf.videos[0]]
            down = order == "desc" or (order is None and sort_by == "created_at")
            assert told == sorted(told, key=key, reverse=down)
            assert len(told) == 20 or hits[-1]["video_id"] == shelf.videos[0], "what has no duration comes last"
            assert {(hit["rank"], hit["video_id"]) for hit in hits} == {(hit["rank"], hit["video_id"]) for hit in by_score}
    plain = shelf.pages(text="a ball", fields="ids")
    names = ("rank", "score", "video_id", "start", "end")
    assert plain == [{name: hit[name] for name in names} for hit in by_score]


def test_a_filter_leaves_as_many_as_there_are(client: Any) -> None:
    shelf = Shelf(Workshop(new_tenant(client)), 1000, segments=1)
    like = shelf.videos[1]
    frames = shelf.frames["none"][like][0]
    mean = length(*frames) * unit(np.mean([unit(frame) for frame in frames], axis=0))
    for where, numbers in (
        ({"metadata.number": {"lt": 12}}, range(12)),
        ({"metadata.even": True}, range(0, 1000, 2)),
        ({"metadata.number": {"gte": 100}, "metadata.even": False}, range(101, 1000, 2)),
        ({"metadata.number": 7, "metadata.even": True}, range(0)),
    ):
        for path, query, body in (
            ("/search", shelf.text("a red ball"), {"text": "a red ball"}),
            ("/search/video", mean, {"video_id": like}),
        ):
            allowed = [shelf.videos[i] for i in numbers if path == "/search" or shelf.videos[i] != like]
            hits = shelf.pages(path, 50, filter=where, rescore=False, **body)
            pooled = {video: float(unit(shelf.frames["none"][video][0].mean(0)) @ unit(query)) for video in allowed}
            expected = sorted(pooled, key=lambda video: -pooled[video])[:200]
            assert len(hits) == len(expected)
            assert [hit["score"] for hit in hits] == pytest.approx([pooled[video] for video in expected], abs=1e-3)
            assert {hit["video_id"] for hit in hits} <= set(allowed)


def test_a_batch_answers_each_query_in_its_place_with_one_forward(shelf: Shelf) -> None:
    guest, other = shelf.workshop.guest, Shelf(shelf.workshop, 3)
    asked: list[Any] = [
        {"collection": shelf.name, "text": "a first text of a batch", "page_limit": 50},
        {"collection": "nowhere", "text": "a ball"},
        {"collection": other.name, "texts": ["a second text", "a third text"], "not": "a fourth text"},
        {"collection": shelf.name, "text": " "},
        {"collection": shelf.name, "text": "a ball", "filter": {"size": {"like": 1}}},
        {"collection": shelf.name, "text": "a ball", "page_limit": 1000},
        "no query",
        {"collection": shelf.name, "video_id": shelf.videos[0], "fields": "ids"},
        {"collection": shelf.name, "text": "a first text of a batch", "page_token": "nonsense"},
        {"collection": shelf.name, "text": "the same", "not": "the same", "not_weight": 1},
    ]
    guest.search(shelf.name, "the same")
    before = shelf.workshop.encoder.texts.batches
    answer = guest.post("/search/batch", {"queries": asked}, role="search")
    assert answer.status_code == 200, answer.text
    assert shelf.workshop.encoder.texts.batches == before + 1
    got = answer.json()["data"]
    codes = [each["problem"]["code"] if each["problem"] else None for each in got]
    assert codes == [
        None, "collection_not_found", None, "empty_text", "invalid_filter", "invalid_request", "invalid_request", None,
        "invalid_page_token", "nothing_left",
    ]  # fmt: skip
    assert [each["status"] for each in got] == [200, 404, 200, 422, 422, 422, 422, 200, 422, 422]
    assert got[5]["problem"]["errors"][0]["pointer"] == "/page_limit"
    names = ("rank", "score", "video_id", "start", "end")
    for i, path in ((0, "/search"), (2, "/search"), (7, "/search/video")):
        alone = guest.post(path, asked[i], role="search").json()["data"]
        assert [[hit[n] for n in names] for hit in got[i]["answer"]["data"]] == [[hit[n] for n in names] for hit in alone] != []
    texts = [f"a text {n}" for n in range(16)]
    many = {"queries": [{"collection": shelf.name, "texts": texts}] * 17}
    for body, code in (
        ({"queries": []}, "invalid_request"),
        ({"queries": asked * 7}, "invalid_request"),
        (many, "too_many_texts"),
    ):
        refused = guest.post("/search/batch", body, role="search")
        assert (refused.status_code, refused.json()["code"]) == (422, code)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "invalid_request"),
        ({"text": "a", "texts": ["a", "b"]}, "invalid_request"),
        ({"texts": ["a"]}, "invalid_request"),
        ({"texts": ["a"] * 17}, "invalid_request"),
        ({"texts": ["a", ""]}, "empty_text"),
        ({"texts": ["a", "b"], "combine": "each"}, "invalid_request"),
        ({"text": "a", "not": " "}, "empty_text"),
        ({"text": "a", "not": "b", "not_weight": 1.5}, "invalid_request"),
        ({"text": "a", "sort_by": "size"}, "invalid_request"),
        ({"text": "a", "fields": "none"}, "invalid_request"),
        ({"text": "a", "not": "a", "not_weight": 1}, "nothing_left"),
    ],
)
def test_what_cannot_be_asked_is_refused(shelf: Shelf, body: dict[str, Any], code: str) -> None:
    shelf.refused("/search", 422, code, **body)


def test_a_form_may_hold_the_fields_or_one_query(shelf: Shelf) -> None:
    guest, image = shelf.workshop.guest, ("p.png", png(drawn()))

    def sent(**parts: Any) -> Any:
        files = {name: part if isinstance(part, tuple) else (None, part) for name, part in parts.items()}
        return guest.call("POST", "/search/image", "search", files=files)

    fields = {"page_limit": "3", "filter": '{"metadata.even": true}', "rescore": "false", "text": "a ball", "fields": "ids"}
    apart = sent(image=image, collection=shelf.name, **fields)
    assert apart.status_code == 200, apart.text
    query = {"page_limit": 3, "filter": {"metadata.even": True}, "rescore": False, "text": "a ball", "fields": "ids"}
    whole = sent(image=image, query=json.dumps({"collection": shelf.name, **query}))
    assert apart.json()["data"] == whole.json()["data"] and len(whole.json()["data"]) == 3
    for parts, status, code in (
        ({"image": image}, 422, "invalid_request"),
        ({"collection": shelf.name}, 422, "invalid_upload"),
        ({"image": image, "collection": shelf.name, "colour": "red"}, 422, "invalid_upload"),
        ({"image": image, "collection": shelf.name, "query": f'{{"collection": "{shelf.name}"}}'}, 422, "invalid_upload"),
        ({"image": image, "query": "[]"}, 422, "invalid_upload"),
        ({"image": image, "query": "{"}, 422, "invalid_upload"),
        ({"image": image, "collection": "nowhere"}, 404, "collection_not_found"),
        ({"image": ("p.png", b"no picture"), "collection": shelf.name}, 422, "invalid_image"),
        ({"image": ("p.png", b""), "collection": shelf.name}, 422, "invalid_image"),
        ({"image": image, "collection": shelf.name, "page_limit": "many"}, 422, "invalid_request"),
        ({"image": ("p.png", bytes(11 * 1024 * 1024)), "collection": shelf.name}, 422, "invalid_upload"),
        ({"image": ("p.png", bytes(14 * 1024 * 1024)), "collection": shelf.name}, 413, "body_too_large"),
    ):
        answer = sent(**parts)
        assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text


def test_a_picture_is_turned_and_its_first_frame_is_taken() -> None:
    picture = drawn(size=(40, 24))
    exif = Image.Exif()
    exif[0x0112] = 6  # its right side is the top of what is stored
    turned = read_picture(png(picture.transpose(Image.Transpose.ROTATE_90), exif=exif))
    assert np.array_equal(np.asarray(turned), np.asarray(picture))
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    for kind in ("GIF", "WEBP", "PNG"):
        first.save(memory := BytesIO(), kind, save_all=True, append_images=[second], duration=100, lossless=True)
        frame = read_picture(memory.getvalue())
        assert frame.mode == "RGB" and frame.getpixel((4, 4)) == (255, 0, 0), kind
    deep = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
    assert read_picture(png(deep)).getpixel((0, 0)) in ((155,) * 3, (156,) * 3)
    assert read_picture(png(Image.new("P", (4, 4)))).mode == read_picture(png(Image.new("LA", (4, 4)))).mode == "RGB"


def test_what_is_no_picture_is_refused_and_a_huge_one_before_it_is_decoded() -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    def claims(width: int, height: int) -> bytes:
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")

    drawn().save(memory := BytesIO(), "JPEG")
    jpeg = memory.getvalue()
    Image.new("RGB", (4, 4)).save(tiff := BytesIO(), "TIFF")
    for data, why in (
        (b"", "no picture in a format"),
        (b"\0" * 100, "no picture in a format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture in a format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "no picture in a format"),
        (tiff.getvalue(), "no picture in a format"),
        (jpeg[: len(jpeg) // 2], "cannot be read"),
        (claims(10_000, 10_000), "pixels"),
        (claims(60_000, 60_000), "pixels"),
        (claims(100, 100), "cannot be read"),
        (jpeg + b"\xff\xda" * MAX_SCANS, "scans"),
    ):
        with pytest.raises(InvalidImage, match=why):
            read_picture(data)
