"""Captioned videos for training: read from a JSONL, split by video, pixels decoded once into a memory map.

A line is `{"video": id, "frames": path of its cached frames, "captions": [{"text", "start", "end"}, …]}`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from indexer.frames import FrameArchive

CACHED_FRAMES = 12


class InvalidDataset(ValueError):
    """The data set cannot be trained on; the message says why, in one line."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A caption and the clip that it tells of: `clip` is a row of the pixels."""

    clip: int
    text: str
    video: str


@dataclass(frozen=True, slots=True)
class Split:
    """Training and validation pairs; no video has captions in both."""

    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]


@dataclass(frozen=True, slots=True)
class Dataset:
    """`pixels` (clips, CACHED_FRAMES, 3, size, size) uint8, on disk; `pairs` in the order of the file."""

    pixels: NDArray[np.uint8]
    pairs: tuple[Pair, ...]

    def split(self, share: float) -> Split:
        """Holds out about `share` of the videos, at least one, by a hash of their ids: a video keeps its side as the
        collection grows, so two adapters are compared on the same held-out videos.
        """
        videos = sorted({pair.video for pair in self.pairs}, key=_hash)
        if len(videos) < 2:
            raise InvalidDataset(f"an adapter needs captions of at least 2 videos, there are {len(videos)}")
        held = {video for video in videos if _hash(video) < share * 2**64}
        if not held:
            held = {videos[0]}
        if len(held) == len(videos):
            held.discard(videos[-1])
        return Split(
            train=tuple(p for p in self.pairs if p.video not in held),
            validation=tuple(p for p in self.pairs if p.video in held),
        )


def load_dataset(path: Path, scratch: Path, image_size: int) -> Dataset:
    """Reads the JSONL at `path` and decodes each clip's cached frames once, into a file in `scratch`.

    A caption with start and end gets the frames of that part of its video. Raises InvalidDataset or DamagedFrames.
    """
    clips: dict[tuple[str, float | None, float | None], int] = {}
    sources: list[tuple[Path, float | None, float | None]] = []
    pairs = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            video, frames = str(row["video"]), Path(row["frames"])
            captions = [(c["text"], c.get("start"), c.get("end")) for c in row["captions"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidDataset(f"{path.name}, line {number}: {error!r}") from error
        for text, start, end in captions:
            key = (video, start, end)
            if key not in clips:
                clips[key] = len(sources)
                sources.append((frames, start, end))
            pairs.append(Pair(clips[key], text, video))
    if not pairs:
        raise InvalidDataset("there is no captioned video to train on")
    shape = (len(sources), CACHED_FRAMES, 3, image_size, image_size)
    scratch.mkdir(parents=True, exist_ok=True)
    pixels = np.lib.format.open_memmap(scratch / "pixels.npy", mode="w+", dtype=np.uint8, shape=shape)
    for clip, (frames, start, end) in enumerate(sources):
        archive = FrameArchive(frames.read_bytes())
        pixels[clip] = archive.pixels(archive.between(start, end, CACHED_FRAMES), image_size)
    return Dataset(pixels, tuple(pairs))


def batches(pairs: tuple[Pair, ...], size: int, rng: np.random.Generator) -> Iterator[list[Pair]]:
    """Endless batches of `size` pairs (fewer where there are fewer clips), every pair once an epoch.

    An epoch goes round by round, each clip giving one caption a round, so that a batch hardly ever holds two captions
    of one clip: they would count as each other's negatives.
    """
    by_clip: dict[int, list[Pair]] = {}
    for pair in pairs:
        by_clip.setdefault(pair.clip, []).append(pair)
    size = min(size, len(by_clip))
    waiting: list[Pair] = []
    while True:
        order = {clip: rng.permutation(len(own)) for clip, own in by_clip.items()}
        for turn in range(max(len(own) for own in by_clip.values())):
            round_ = [own[order[clip][turn]] for clip, own in by_clip.items() if turn < len(own)]
            waiting += [round_[i] for i in rng.permutation(len(round_))]
            while len(waiting) >= size:
                yield waiting[:size]
                waiting = waiting[size:]


def _hash(video: str) -> int:
    return int.from_bytes(hashlib.sha256(video.encode()).digest()[:8], "big")
