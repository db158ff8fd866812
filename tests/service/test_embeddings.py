"""`/v1/embeddings`: vectors for other programs are those that searches compare."""

from __future__ import annotations

import base64
import io
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from serving import Tenant, colour
from workshop import Workshop

from indexer.pictures import InvalidImage, read_picture
from service.storage.rows import NAME


def url(picture: Image.Image | bytes, form: str = "PNG", **options: Any) -> str:
    buffer = io.BytesIO()
    if isinstance(picture, Image.Image):
        picture.save(buffer, form, **options)
    data = picture if isinstance(picture, bytes) else buffer.getvalue()
    return f"data:image/{form.lower()};base64,{base64.b64encode(data).decode()}"


def vectors(answer: Any) -> NDArray[np.float32]:
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert [row["index"] for row in body["data"]] == list(range(len(body["data"])))
    found = np.array([row["embedding"] for row in body["data"]], np.float32)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    return found


def plain(number: int) -> Image.Image:
    return Image.new("RGB", (96, 64), colour(number))


def header(width: int, height: int) -> bytes:
    """A PNG that says how large it is and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def embed(guest: Tenant, **body: Any) -> Any:
    return guest.post("/v1/embeddings", body, role="search")


def test_a_text_and_a_picture_score_a_video_as_a_search_does(guest: Tenant, workshop: Workshop) -> None:
    """With an adapter in both towers too. All frames of these videos are equal: a score is the cosine with any of them."""
    films, videos = workshop.filled([1, 2])
    for adapter in (None, workshop.adapter(films, seed=5)):
        workshop.activate(films, adapter)
        text, *frames = vectors(embed(guest, model=films, input=["a red ball", url(plain(1)), {"image": url(plain(2))}]))
        hits = {hit["video_id"]: hit["score"] for hit in guest.search(films, "a  red ball ")["data"]}
        stored = workshop.held(films, adapter)
        for video, frame in zip(videos, frames, strict=True):
            held = np.frombuffer(stored[video][0], np.float16).astype(np.float32).reshape(12, -1)[0]
            assert float(frame @ held) / np.linalg.norm(held) > 0.999  # MP4 and JPEG lie between
            assert hits[video] == pytest.approx(float(text @ frame), abs=0.01)
    frozen = vectors(embed(guest, model="backbone", input="a red ball"))[0]
    assert abs(float(frozen @ text)) < 0.99
    assert embed(guest, model=films, input=[*["a"] * 10, url(b"x")]).status_code == 422
    with ThreadPoolExecutor(4) as pool:  # what was refused holds no row and no lease
        list(pool.map(lambda n: vectors(embed(guest, model=films, input=[f"t{n}", url(plain(n))])), range(8)))
    assert workshop.encoder.texts.depth == workshop.encoder.frames.depth == 0
    assert "active" not in workshop.encoder.residency.states().values()


def test_the_shape_is_that_of_openai_s_api(guest: Tenant) -> None:
    films = guest.collection("backbone")
    answer = embed(guest, model="backbone", input=["a red ball", "word " * 500], user="u-1").json()
    assert (answer["object"], answer["model"], answer["data"][0]["object"]) == ("list", "backbone", "embedding")
    length = guest.client.app.state.services.encoder.backbone.context_length
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == 5 + length
    assert next(w["detail"] for w in answer["warnings"] if w["code"] == "text_truncated").endswith("inputs 1")
    coded = embed(guest, model=f"collection:{films}", input="a red ball", encoding_format="base64").json()["data"][0]
    raw = np.frombuffer(base64.b64decode(coded["embedding"]), "<f4")
    assert np.array_equal(raw, np.array(answer["data"][0]["embedding"], np.float32))
    models = guest.get("/v1/models", role="search").json()
    assert models["object"] == "list" and [m["id"] for m in models["data"]] == ["backbone", "collection:backbone"]
    assert all(m["object"] == "model" and time.time() - m["created"] < 600 for m in models["data"])
    assert not NAME.fullmatch("collection:x")


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"input": []}, "invalid_request"),
        ({"input": ["a"] * 65}, "invalid_request"),
        ({"input": [[1, 2]]}, "invalid_request"),
        ({"input": [1]}, "invalid_request"),
        ({"input": "x" * 10_001}, "invalid_request"),
        ({"input": {"image": "https://example.org/a.png"}}, "invalid_request"),
        ({"input": "a", "dimensions": 64}, "invalid_request"),
        ({"input": ["a", " "]}, "empty_text"),
        ({"input": "data:image/png;base64,&"}, "invalid_image"),
        ({"input": "data:image/png,abc"}, "invalid_image"),
        ({"input": url(b"no picture")}, "invalid_image"),
        ({"input": ["a", url(header(10_000, 10_000))]}, "invalid_image"),
        ({"input": "a", "model": "none"}, "collection_not_found"),
    ],
)
def test_what_cannot_be_encoded_is_told_by_a_code(guest: Tenant, asked: dict[str, Any], code: str) -> None:
    answer = embed(guest, **{"model": "backbone", **asked})
    assert (answer.json()["code"], answer.status_code) == (code, 404 if "model" in asked else 422)


def test_another_tenant_s_collection_is_no_model(guest: Tenant, client: Any) -> None:
    from serving import new_tenant

    other = new_tenant(client)
    theirs = other.collection()
    assert embed(guest, model=theirs, input="a").json()["code"] == "collection_not_found"
    assert theirs not in str(guest.get("/v1/models").json())


def test_pictures_are_turned_right_and_only_their_first_frame_is_read() -> None:
    left = Image.new("RGB", (60, 40), "blue")
    left.paste("red", (0, 0, 30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise: left comes up
    for form in ("JPEG", "PNG", "WEBP"):
        turned = read_picture(base64.b64decode(url(left, form, exif=exif).partition(",")[2]))
        assert turned.size == (40, 60) and np.asarray(turned)[5, 20, 0] > 200 and np.asarray(turned)[55, 20, 2] > 200
    two = [Image.new("RGB", (8, 8), name) for name in ("red", "blue")]
    for form in ("GIF", "PNG", "WEBP"):
        moving = base64.b64decode(url(two[0], form, save_all=True, append_images=two[1:]).partition(",")[2])
        assert np.asarray(read_picture(moving))[4, 4, 0] > 200
    clear = base64.b64decode(url(Image.new("RGBA", (4, 4), (0, 0, 0, 0))).partition(",")[2])
    assert read_picture(clear).getpixel((0, 0)) == (255, 255, 255)


def test_a_picture_of_100_megapixels_is_refused_before_it_is_decoded() -> None:
    started = time.perf_counter()
    for broken in (header(10_000, 10_000), header(60_000, 60_000), header(5000, 4001)):
        with pytest.raises(InvalidImage, match="20,000,000"):
            read_picture(broken)
    assert time.perf_counter() - started < 1
    scans = io.BytesIO()
    Image.new("RGB", (64, 64)).save(scans, "JPEG", progressive=True)
    with pytest.raises(InvalidImage, match="scans"):
        read_picture(scans.getvalue() + b"\xff\xda" * 101)
    with pytest.raises(InvalidImage):  # an end that is missing
        read_picture(header(64, 64))
