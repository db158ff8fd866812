import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from training.dataset import ArrayClips, Batches, Dataset, InvalidDataset, Pair, load_dataset


def dataset(videos: int, captions: int = 2) -> Dataset:
    pairs = tuple(Pair(v, f"caption {c} of {v}", f"vid_{v}") for v in range(videos) for c in range(captions))
    return Dataset(ArrayClips(np.zeros((videos, 12, 3, 8, 8), np.uint8)), pairs, {})


def test_no_video_is_on_both_sides_and_none_is_lost() -> None:
    split = dataset(50).split(0.2)
    train, held = {p.video for p in split.train}, {p.video for p in split.validation}
    assert not train & held
    assert len(train | held) == 50
    assert 4 <= len(held) <= 16


def test_a_video_keeps_its_side_as_the_collection_grows() -> None:
    small, large = dataset(50).split(0.2), dataset(200).split(0.2)
    before = {p.video for p in small.validation}
    assert before == {p.video for p in large.validation} & {f"vid_{v}" for v in range(50)}


@pytest.mark.parametrize("share", [0.01, 0.9])
def test_neither_side_is_ever_empty(share: float) -> None:
    for videos in (2, 3, 5):
        split = dataset(videos).split(share)
        assert split.train and split.validation


def test_one_video_cannot_be_split() -> None:
    with pytest.raises(InvalidDataset, match="at least 2 training videos"):
        dataset(1).split(0.2)


def test_every_pair_comes_once_an_epoch_and_no_clip_twice_in_a_batch() -> None:
    pairs = dataset(12, captions=3).pairs
    batches = Batches(pairs, 4, seed=0)
    assert batches.per_epoch == 9
    seen: list[Pair] = []
    for step in range(9):
        batch = batches[step]
        assert len({p.clip for p in batch}) == 4
        seen += batch
    assert sorted(p.text for p in seen) == sorted(p.text for p in pairs)


def test_a_batch_is_never_larger_than_the_clips() -> None:
    assert len(Batches(dataset(3).pairs, 32, seed=0)[0]) == 3


def test_a_batch_depends_on_its_number_alone() -> None:
    pairs = dataset(10, captions=3).pairs
    forwards, backwards = Batches(pairs, 4, seed=5), Batches(pairs, 4, seed=5)
    there = [forwards[step] for step in range(20)]
    assert there[::-1] == [backwards[step] for step in reversed(range(20))]
    assert there != [Batches(pairs, 4, seed=6)[step] for step in range(20)]


def test_named_splits_are_kept_and_a_test_video_is_never_validated_on() -> None:
    data = dataset(20)
    named = replace(data, splits={"vid_3": "test", "vid_4": "validation"})
    split = named.split(0.5)
    assert {p.video for p in split.validation} == {"vid_4"} and {p.video for p in split.test} == {"vid_3"}
    carved = replace(data, splits={f"vid_{v}": "test" for v in range(10)}).split(0.3)
    assert {p.video for p in carved.test} == {f"vid_{v}" for v in range(10)}
    assert carved.validation and carved.train and not {p.video for p in carved.validation} & {p.video for p in carved.test}


def test_an_empty_training_split_is_told() -> None:
    data = replace(dataset(3), splits={"vid_0": "validation", "vid_1": "validation", "vid_2": "test"})
    with pytest.raises(InvalidDataset, match="'train' is empty"):
        data.split(0.2)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not json", "line 1"),
        ('{"video": "a"}', "line 1"),
        ('["video"]', "line 1"),
        ('{"video": "a", "frames": "f.zip", "captions": []}', "no captioned video"),
        ('{"video": "a", "frames": "f.zip", "captions": [{"text": " "}]}', "caption of a is empty"),
        ('{"video": "a", "frames": "f.zip", "captions": [{"text": "b"}], "split": "tset"}', "split is 'tset'"),
    ],
)
def test_a_broken_file_is_told_with_its_line(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "dataset.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InvalidDataset, match=reason):
        load_dataset(path, tmp_path, 8)


def test_only_a_line_feed_ends_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.dataset.PIXEL_BYTES", 0)  # no pixels are read
    row = {"video": "vid_1", "frames": "none.zip", "captions": [{"text": "one\u2028two\x85three"}]}
    (tmp_path / "dataset.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(row, ensure_ascii=False).encode() + b"\r\n\n")
    (pair,) = load_dataset(tmp_path / "dataset.jsonl", tmp_path, 8).pairs
    assert pair.text == "one\u2028two\x85three"
    (tmp_path / "dataset.jsonl").write_bytes(json.dumps(row).encode() + b"\xff")
    with pytest.raises(InvalidDataset, match="not UTF-8"):
        load_dataset(tmp_path / "dataset.jsonl", tmp_path, 8)


def test_captions_of_two_moments_get_two_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    from indexer.decode import DecodedSegment, DecodedVideo, MediaFacts
    from indexer.frames import pack_frames

    segments = []
    for s, value in enumerate((0, 200)):
        names = tuple(f"{s:03d}-{f:02d}.jpg" for f in range(12))
        for name in names:
            Image.new("RGB", (16, 16), (value,) * 3).save(tmp_path / name)
        segments.append(DecodedSegment(30.0 * s, 30.0 * s + 30, names, names[0]))
    facts = MediaFacts(60.0, 16, 16, 10.0, "h264", 600, "mp4", "decord")
    (tmp_path / "frames.zip").write_bytes(pack_frames(DecodedVideo(facts, tuple(segments)), tmp_path))
    captions = [{"text": "dark", "start": 0, "end": 10}, {"text": "light", "start": 40, "end": 50}, {"text": "both"}]
    row = {"video": "v", "frames": str(tmp_path / "frames.zip"), "captions": captions}
    (tmp_path / "dataset.jsonl").write_text(json.dumps(row))
    loaded = load_dataset(tmp_path / "dataset.jsonl", tmp_path / "scratch", 8)
    pixels = loaded.clips.pixels([p.clip for p in loaded.pairs])
    assert pixels.shape == (3, 12, 3, 8, 8)
    monkeypatch.setattr("training.dataset.PIXEL_BYTES", 0)
    anew = load_dataset(tmp_path / "dataset.jsonl", tmp_path / "scratch", 8).clips
    picks = np.asarray([[1, 7], [0, 11]])
    np.testing.assert_array_equal(anew.pixels([2, 0], picks), pixels[[[2], [0]], picks])
    means = [clip.mean() for clip in pixels]
    assert means[0] < 10 and means[1] > 190 and 80 < means[2] < 120
