"""Snapshots of views: whole and of the right thing, or BadSnapshot; never a crash, never a wrong hit."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from indexer import index, snapshot
from indexer.index import IndexView
from indexer.snapshot import MAGIC, BadSnapshot

DIM = 16
FACTS = {"tenant": "ten_a", "vector_set": "gen_a", "backbone": "f" * 64}


def rows(first: int, count: int) -> list[dict[str, object]]:
    vectors = np.random.default_rng(first).normal(size=(count, DIM))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    return [
        {"seq": i, "video_id": f"vid_ü{i}", "ordinal": 0, "start": 0.5, "end": i / 7, "pooled": v.tobytes()}
        for i, v in enumerate(vectors, start=first)
    ]


def tombstone(seq: int, video: int) -> dict[str, object]:
    return {"seq": seq, "video_id": f"vid_ü{video}", "ordinal": -1, "start": None, "end": None, "pooled": None}


@pytest.fixture(params=["flat", "approximate"])
def view(request: pytest.FixtureRequest) -> IndexView:
    made = IndexView(DIM)
    made.apply([*rows(1, 300), tombstone(301, 7), *rows(302, 20)])
    if request.param == "approximate":
        made.settle()
    return made


def found(view: IndexView, k: int = 1000) -> list[index.Candidate]:
    return view.search(np.random.default_rng(1).normal(size=DIM).astype(np.float32), k)


def test_what_is_read_is_what_was_written_and_goes_on(view: IndexView, tmp_path: Path) -> None:
    path = tmp_path / "a.view"
    assert snapshot.read(path, DIM, FACTS) is None
    assert snapshot.write(path, view, FACTS) == path.stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["a.view"]
    again = snapshot.read(path, DIM, FACTS)
    assert again is not None
    assert (again.tip, again.tally, again.changes, len(again), again.videos) == (view.tip, view.tally, 0, 319, 319)
    assert again.approximate == view.approximate and again.due == view.due
    for tail in ([], [*rows(400, 5), tombstone(405, 3), tombstone(406, 402)]):
        view.apply(tail)
        again.apply(tail)
        assert found(again) == found(view) and found(again, 10) == found(view, 10)
    assert again.tally == view.tally and len(found(again)) == 322


def test_an_empty_view_is_kept_too(tmp_path: Path) -> None:
    snapshot.write(tmp_path / "a.view", IndexView(DIM), FACTS)
    again = snapshot.read(tmp_path / "a.view", DIM, FACTS)
    assert again is not None and found(again) == []
    again.apply(rows(1, 3))
    assert len(found(again)) == 3


def test_a_torn_file_is_not_trusted(view: IndexView, tmp_path: Path) -> None:
    path = tmp_path / "a.view"
    snapshot.write(path, view, FACTS)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    cuts = {0, 1, len(MAGIC), len(MAGIC) + 32, len(MAGIC) + 40, len(whole) - 1, *rng.integers(len(whole), size=40).tolist()}
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        with pytest.raises(BadSnapshot):
            snapshot.read(path, DIM, FACTS)
        path.write_bytes(whole[:cut] + bytes(len(whole) - cut))  # the length is there, the bytes are not
        if whole[cut:].strip(b"\0"):
            with pytest.raises(BadSnapshot):
                snapshot.read(path, DIM, FACTS)
    path.write_bytes(whole + b"\0")
    with pytest.raises(BadSnapshot):
        snapshot.read(path, DIM, FACTS)


def test_no_flipped_bit_goes_unseen(view: IndexView, tmp_path: Path) -> None:
    path = tmp_path / "a.view"
    snapshot.write(path, view, FACTS)
    whole = path.read_bytes()
    places = {*range(64), len(whole) - 1, *np.random.default_rng(0).integers(len(whole), size=100).tolist()}
    for place in sorted(places):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(BadSnapshot):
            snapshot.read(path, DIM, FACTS)


@pytest.mark.parametrize("fact", ["tenant", "vector_set", "backbone"])
def test_a_snapshot_of_something_else_is_not_trusted(view: IndexView, tmp_path: Path, fact: str) -> None:
    path = tmp_path / "a.view"
    snapshot.write(path, view, FACTS)
    with pytest.raises(BadSnapshot, match="it is of"):
        snapshot.read(path, DIM, {**FACTS, fact: "another"})
    with pytest.raises(BadSnapshot, match="it is of"):
        snapshot.read(path, DIM + 1, FACTS)


def test_another_format_and_a_folder_are_not_trusted(view: IndexView, tmp_path: Path) -> None:
    path = tmp_path / "a.view"
    snapshot.write(path, view, FACTS)
    path.write_bytes(path.read_bytes().replace(MAGIC, b"polyclip view 2\n"))
    with pytest.raises(BadSnapshot, match="format"):
        snapshot.read(path, DIM, FACTS)
    with pytest.raises(BadSnapshot):
        snapshot.read(tmp_path, DIM, FACTS)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"state"', b'"stale"'),
        (b'"trained": 0', b'"trained": 1'),
        (b'"bytes": [1', b'"bytes": [2'),
        (b'"tip": [', b'"tap": ['),
        (b'{"facts"', b'["facts"'),
    ],
)
def test_a_file_whose_checksum_fits_but_whose_parts_do_not_is_not_trusted(tmp_path: Path, old: bytes, new: bytes) -> None:
    """Not damage, but another program's work, or a mistake of this one."""
    path, made = tmp_path / "a.view", IndexView(DIM)
    made.apply(rows(1, 40))
    snapshot.write(path, made, FACTS)
    body = path.read_bytes()[len(MAGIC) + 32 :]
    assert old in body
    body = body.replace(old, new)
    path.write_bytes(MAGIC + hashlib.sha256(body).digest() + body)
    with pytest.raises(BadSnapshot):
        snapshot.read(path, DIM, FACTS)


def test_a_write_that_fails_leaves_the_snapshot_before_it(
    view: IndexView, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.view"
    snapshot.write(path, view, FACTS)
    before = path.read_bytes()
    view.apply(rows(900, 5))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        snapshot.write(path, view, FACTS)
    assert [p.name for p in tmp_path.iterdir()] == ["a.view"] and path.read_bytes() == before
