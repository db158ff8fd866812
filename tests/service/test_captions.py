"""Captions and metadata that come with files: each to its own video, whole, bounded, and never dropped in silence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
from house import House
from serving import clip
from workshop import Workshop

from service import errors
from service.cli.index import InvalidCaptions, index_files, read_captions
from service.settings import Settings
from service.storage import collection_rows, tenant_rows
from service.upkeep.archive_json import VideoRecord
from service.videos import video_rows


def written(path: Path, *rows: dict[str, Any], start: bytes = b"") -> Path:
    path.write_bytes(start + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return path


def placed(folder: Path, *names: str | bytes) -> Path:
    """Small videos, no two alike, under these names below `folder`."""
    for number, name in enumerate(names):
        path = folder / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(clip(300 + number))
    return folder


def index(tmp_path: Path, captions: Path | None, *paths: Path) -> dict[str, Any]:
    return index_files(Settings(data=tmp_path / "data", threads=1), "default", "films", list(paths), captions, None)


def held(tmp_path: Path) -> dict[str, list[list[str]]]:
    """The captions of each video, by file name."""
    with House(tmp_path / "data", tenant="looker") as house, house.storage.database.read() as connection:
        tenant = tenant_rows.tenant_named(connection, "default")
        films = collection_rows.collection_named(connection, tenant.id, "films")
        rows = video_rows.list_videos(connection, tenant.id, films.id, None, 50, None).rows
        texts = video_rows.captions_of(connection, tenant.id, [row.id for row in rows])
    found: dict[str, list[list[str]]] = {}
    for row in sorted(rows, key=lambda row: row.id):
        found.setdefault(row.filename, []).append([caption.text for caption in texts[row.id]])
    return {name: sorted(own) for name, own in found.items()}


@pytest.mark.parametrize("prefix", ["", "films/", "./"])
def test_namesakes_get_the_captions_of_their_own_path(tmp_path: Path, prefix: str) -> None:
    folder = placed(tmp_path / "films", "cats/clip.mp4", "dogs/clip.mp4", "dogs/only.mp4")
    rows = [{"file": f"{prefix}{kind}/clip.mp4", "captions": [f"one of the {kind}"]} for kind in ("cats", "dogs")]
    index(tmp_path, written(tmp_path / "c.jsonl", *rows, {"file": "only.mp4", "caption": "alone"}), folder)
    assert held(tmp_path) == {"clip.mp4": [["one of the cats"], ["one of the dogs"]], "only.mp4": [["alone"]]}


def test_a_bare_name_of_two_files_is_refused_with_both(tmp_path: Path) -> None:
    folder = placed(tmp_path / "films", "cats/clip.mp4", "dogs/clip.mp4")
    captions = written(tmp_path / "c.jsonl", {"file": "clip.mp4", "captions": ["which?"]})
    with pytest.raises(InvalidCaptions, match=r"'clip.mp4' may be .*cats/clip.mp4' or .*dogs/clip.mp4'"):
        index(tmp_path, captions, folder)
    with pytest.raises(InvalidCaptions, match="may be"):
        index(tmp_path, captions, folder / "cats", folder / "dogs")


def test_a_path_to_another_folder_is_no_name(tmp_path: Path) -> None:
    folder = placed(tmp_path / "films", "dogs/clip.mp4")
    with pytest.raises(InvalidCaptions, match=r"there is no video 'cats/clip.mp4'"):
        index(tmp_path, written(tmp_path / "c.jsonl", {"file": "cats/clip.mp4", "captions": ["a cat"]}), folder)


def test_captions_files_are_read_as_they_are_written(tmp_path: Path) -> None:
    rows = [{"file": "a.mp4", "captions": ["one\u2028two\x85three"]}, {"file": "a.mp4", "captions": []}]
    found = read_captions(written(tmp_path / "c.jsonl", *rows, start=b"\xef\xbb\xbf\r\n"))
    assert [caption.text for caption in found["a.mp4"]] == ["one\u2028two\x85three"]
    (tmp_path / "c.jsonl").write_bytes('{"file": "a.mp4", "captions": ["é"]}'.encode("latin-1"))
    with pytest.raises(InvalidCaptions, match="not UTF-8"):
        read_captions(tmp_path / "c.jsonl")


def test_odd_names_and_files_are_indexed_or_passed_over(tmp_path: Path) -> None:
    cafe, decomposed = "café.mp4", normalize("NFD", "zoë.mp4")
    folder = placed(tmp_path / "films", cafe.encode("latin-1"), decomposed)
    os.mkfifo(folder / "pipe.mp4")
    (folder / "dead.mp4").symlink_to("nowhere")
    (folder / "loop").symlink_to(".")
    rows = [{"file": cafe, "captions": ["a café"]}, {"file": normalize("NFC", decomposed), "captions": ["Zoë"]}]
    report = index(tmp_path, written(tmp_path / "c.jsonl", *rows), folder)
    assert (report["ready"], report["failed"]) == (2, [])
    assert held(tmp_path) == {cafe: [["a café"]], decomposed: [["Zoë"]]}
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder") as refused:
        index(tmp_path, None, folder / "pipe.mp4")
    assert errors.line(refused.value)


def test_indexing_again_adds_the_captions_that_are_new(tmp_path: Path) -> None:
    folder = placed(tmp_path / "films", "a.mp4")
    index(tmp_path, None, folder)
    captions = written(tmp_path / "c.jsonl", {"file": "a.mp4", "captions": ["one", "two", "one"]})
    reports = [index(tmp_path, captions, folder) for _ in range(2)]
    assert [(each["duplicates"], each["updated"]) for each in reports] == [(1, 1), (1, 0)]
    assert held(tmp_path) == {"a.mp4": [["one", "two"]]}


def test_a_video_has_1000_captions_from_files_too(tmp_path: Path) -> None:
    folder = placed(tmp_path / "films", "a.mp4")
    many = [f"number {number}" for number in range(1001)]
    halves = written(tmp_path / "halves.jsonl", *({"file": "a.mp4", "captions": part} for part in (many[:600], many[600:])))
    with pytest.raises(InvalidCaptions, match="1000 captions"):
        index(tmp_path, halves, folder)
    index(tmp_path, written(tmp_path / "c.jsonl", {"file": "a.mp4", "captions": many[:1000]}), folder)
    with pytest.raises(InvalidCaptions, match="it has 1000, 1 more"):
        index(tmp_path, written(tmp_path / "c.jsonl", {"file": "a.mp4", "captions": many[1000:]}), folder)


def test_a_video_has_1000_captions_from_an_upload_too(workshop: Workshop) -> None:
    guest, collection = workshop.guest, workshop.guest.collection()
    refused = guest.upload(collection, clip(310), captions=["x"] * 1001)
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_upload") and "1000" in refused.json()["detail"]
    kept = guest.upload(collection, clip(310), captions=[str(number) for number in range(1000)])
    assert kept.status_code == 202
    more = guest.upload(collection, clip(310), captions=["one more"])
    assert (more.status_code, more.json()["code"]) == (422, "invalid_upload")
    assert len(guest.get(f"/collections/{collection}/videos/{kept.json()['video_id']}").json()["captions"]) == 1000


def test_a_video_has_1000_captions_from_an_archive_too() -> None:
    record = {"captions": [{"text": "x"}] * 1001, "size": 1, "sha256": "0" * 64, "metadata": {}, "filename": "a.mp4"}
    with pytest.raises(ValueError, match=r"captions: .* at most 1000"):
        VideoRecord.of(json.dumps(record).encode())
    kept = {**record, "captions": record["captions"][:1000]}  # type: ignore[index]
    assert len(VideoRecord.of(json.dumps(kept).encode()).captions) == 1000


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "once"}])
def test_the_same_bytes_bring_new_captions_and_metadata(workshop: Workshop, headers: dict[str, str]) -> None:
    guest, collection = workshop.guest, workshop.guest.collection()
    first = guest.upload(collection, clip(311), "a.mp4", {"flag": 1}, ["one"]).json()
    assert first["updated"] == []
    again = guest.upload(collection, clip(311), "a.mp4", {"flag": True}, ["two", "one", "two"], headers=headers).json()
    assert (again["duplicate_of"], again["updated"]) == (first["video_id"], ["captions", "metadata"])
    video = guest.get(f"/collections/{collection}/videos/{first['video_id']}").json()
    assert video["metadata"] == {"flag": True} and video["metadata"]["flag"] is True
    assert [caption["text"] for caption in video["captions"]] == ["one", "two"]
    for metadata, captions in ((None, None), ({"flag": True}, ["two"])):
        assert guest.upload(collection, clip(311), "a.mp4", metadata, captions).json()["updated"] == []
    assert guest.upload(collection, clip(311), "a.mp4", {}).json()["updated"] == ["metadata"]
    assert guest.get(f"/collections/{collection}/videos/{first['video_id']}").json()["metadata"] == {}


def test_metadata_is_bounded(workshop: Workshop) -> None:
    guest, collection = workshop.guest, workshop.guest.collection()
    refused = guest.upload(collection, clip(313), metadata={"a": "x" * 65536})
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_upload") and "65536" in refused.json()["detail"]
    assert guest.upload(collection, clip(313), metadata={"a": "x" * 65000}).status_code == 202


def test_metadata_that_is_not_utf_8_is_refused(workshop: Workshop) -> None:
    guest, collection = workshop.guest, workshop.guest.collection()

    def sent(metadata: bytes) -> Any:
        files = {"metadata": (None, metadata), "file": ("a.mp4", clip(312), "video/mp4")}
        return guest.call("POST", f"/collections/{collection}/videos", files=files)

    for wrong in ('{"a": "é"}'.encode("latin-1"), '{"a": 1}'.encode("utf-16")):
        answer = sent(wrong)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_upload") and "UTF-8" in answer.json()["detail"]
    kept = sent(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')
    assert guest.get(f"/collections/{collection}/videos/{kept.json()['video_id']}").json()["metadata"] == {"a": "é"}
