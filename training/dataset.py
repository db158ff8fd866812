"""Captioned videos for training: read from a JSONL, split by video, pixels decoded once.

A line is `{"video": id, "frames": path of its cached frames, "captions": [{"text", "start", "end"}, …]}`. It may have a
`split`: train, validation or test; where no line says validation, a part of the training videos is held out for it. And
`feedback`, what users said of hits, `[{"text", "start", "end", "relevant"}, …]`: it is trained on, and never held out.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from backbone import Form
from indexer.frames import DamagedFrames, FrameArchive

CACHED_FRAMES = 12
PIXEL_BYTES = 32 << 30  # larger sets of pixels are decoded anew whenever they are read
SPLITS = ("train", "validation", "test")


class InvalidDataset(ValueError):
    """The data set cannot be trained on; the message says why, in one line."""


class Clips(Protocol):
    """The frames of all clips; `frames` of each."""

    @property
    def frames(self) -> int: ...

    def pixels(self, rows: Sequence[int], picks: NDArray[np.int64] | None = None) -> NDArray[np.uint8]:
        """(len(rows), F, 3, size, size) uint8: all frames of these clips, or those of `picks` (len(rows), F)."""
        ...


@dataclass(frozen=True, slots=True)
class Pair:
    """A text and a clip: `clip` is a row of the clips. A caption and what it tells of, or of a user's query (`clicked`) what
    he called relevant, or irrelevant."""

    clip: int
    text: str
    video: str
    clicked: bool = False


@dataclass(frozen=True, slots=True)
class Split:
    """No video has captions in two of them. `clicked` and `rejected`: what users called relevant and irrelevant, of videos that
    may be trained on."""

    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    test: tuple[Pair, ...] = ()
    clicked: tuple[Pair, ...] = ()
    rejected: tuple[Pair, ...] = ()


@dataclass(frozen=True, slots=True)
class Dataset:
    """`pairs` in the order of the file; `splits` by video, where the file names them. Feedback as of `Split`."""

    clips: Clips
    pairs: tuple[Pair, ...]
    splits: Mapping[str, str]
    clicked: tuple[Pair, ...] = ()
    rejected: tuple[Pair, ...] = ()

    def split(self, share: float) -> Split:
        """Holds out about `share` of the training videos, at least one, where no video is named for validation.

        By a hash of their ids: a video keeps its side as the collection grows, so two adapters are compared on the same
        held-out videos. A video with feedback alone has the side that it will have with captions. Raises InvalidDataset where a
        side stays empty.
        """
        side = {video: self.splits.get(video, "train") for video in {pair.video for pair in self.pairs}}
        told = {pair.video: self.splits.get(pair.video, "train") for pair in (*self.clicked, *self.rejected)}
        if "validation" not in side.values():
            told |= dict.fromkeys((v for v, s in told.items() if s == "train" and falls_out(v, share)), "validation")
            side |= dict.fromkeys(held_out([v for v, s in side.items() if s == "train"], share), "validation")
        parts = {name: tuple(p for p in self.pairs if side[p.video] == name) for name in SPLITS}
        if not parts["train"]:
            raise InvalidDataset("the split 'train' is empty")
        told |= side
        clicked, rejected = (tuple(p for p in pairs if told[p.video] == "train") for pairs in (self.clicked, self.rejected))
        return Split(**parts, clicked=clicked, rejected=rejected)

    def thumbnail(self, clip: int) -> bytes | None:
        """A clip's middle frame as a small JPEG; None where its archive is gone."""
        try:
            picture = Image.fromarray(self.clips.pixels([clip])[0, self.clips.frames // 2].transpose(1, 2, 0))
        except DamagedFrames:
            return None
        picture.thumbnail((160, 160))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=85)
        return file.getvalue()

    def digest(self) -> str:
        """Names the captions, the clips that they tell of, the splits and the feedback: sha256, hex."""
        facts = [[(p.clip, p.text, p.video) for p in self.pairs], sorted(self.splits.items()), self.clips.frames]
        if self.clicked or self.rejected:
            facts += [[(p.clip, p.text) for p in pairs] for pairs in (self.clicked, self.rejected)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def load_dataset(path: Path, scratch: Path, form: Form | int, frames: int = CACHED_FRAMES, decode: bool = True) -> Dataset:
    """Reads the JSONL at `path`; pixels of up to `PIXEL_BYTES` in all are decoded once, into a file in `scratch`.

    A caption with start and end gets the frames of that part of its video. `decode` False: another rank has filled that
    file. Raises InvalidDataset, DamagedFrames, or OSError where the disk is too small.
    """
    rows: dict[tuple[str, float | None, float | None], int] = {}
    sources: list[_Source] = []
    pairs: list[Pair] = []
    said: dict[bool, list[Pair]] = {True: [], False: []}
    splits: dict[str, str] = {}
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # nothing else ends a line of JSON: a caption may hold U+2028
    except UnicodeDecodeError as error:
        raise InvalidDataset(f"{path.name}: not UTF-8 text (byte {error.start})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            video, archive = str(row["video"]), Path(row["frames"])
            captions: list[tuple[Any, Any, Any, bool | None]]
            captions = [(c["text"], c.get("start"), c.get("end"), None) for c in row["captions"]]
            captions += [(f["text"], f.get("start"), f.get("end"), bool(f["relevant"])) for f in row.get("feedback", ())]
            if row.get("split") is not None:
                splits[video] = row["split"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidDataset(f"{path.name}, line {number}: {error!r}") from error
        if splits.get(video, "train") not in SPLITS:
            raise InvalidDataset(f"{path.name}, line {number}: the split is {splits[video]!r}, not one of {', '.join(SPLITS)}")
        for text, start, end, relevant in captions:
            if not isinstance(text, str) or not text.strip():
                raise InvalidDataset(f"{path.name}, line {number}: a caption of {video} is empty")
            key = (video, start, end)
            if key not in rows:
                rows[key] = len(sources)
                sources.append(_Source(video, archive, start, end))
            (pairs if relevant is None else said[relevant]).append(Pair(rows[key], text, video, relevant is not None))
    if not pairs:
        raise InvalidDataset("there is no captioned video to train on")
    archived = _ArchivedClips(tuple(sources), form, frames)
    side = form if isinstance(form, int) else form.side
    small = len(sources) * frames * 3 * side**2 <= PIXEL_BYTES
    clips = _cached(archived, len(sources), side, scratch, decode) if small else archived
    known = {(pair.clip, pair.text) for pair in pairs}
    clicked = tuple(dict.fromkeys(pair for pair in said[True] if (pair.clip, pair.text) not in known))
    known |= {(pair.clip, pair.text) for pair in clicked}
    rejected = tuple(dict.fromkeys(pair for pair in said[False] if (pair.clip, pair.text) not in known))
    return Dataset(clips, tuple(pairs), splits, clicked, rejected)


class Batches:
    """Endless batches of `size` pairs (fewer where there are fewer clips), every pair once an epoch.

    Batch `i` depends on nothing but the seed, so that a run goes on from any step. An epoch goes round by round, each
    clip giving one caption a round, so that a batch hardly ever holds two captions of one clip: they would count as
    each other's negatives.
    """

    def __init__(self, pairs: Sequence[Pair], size: int, seed: int) -> None:
        self._by_clip: dict[int, list[Pair]] = {}
        for pair in pairs:
            self._by_clip.setdefault(pair.clip, []).append(pair)
        self.size = min(size, len(self._by_clip))
        self._pairs = len(pairs)
        self._seed = seed
        self._order = lru_cache(maxsize=2)(self._epoch)

    @property
    def clips(self) -> list[int]:
        """The clips that occur, ascending."""
        return sorted(self._by_clip)

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch, rounded up."""
        return -(-self._pairs // self.size)

    def __getitem__(self, index: int) -> list[Pair]:
        places = (divmod(index * self.size + i, self._pairs) for i in range(self.size))
        return [self._order(epoch)[place] for epoch, place in places]

    def _epoch(self, epoch: int) -> list[Pair]:
        rng = np.random.default_rng([self._seed, epoch])
        order = {clip: rng.permutation(len(own)) for clip, own in self._by_clip.items()}
        pairs: list[Pair] = []
        for turn in range(max(len(own) for own in self._by_clip.values())):
            round_ = [own[order[clip][turn]] for clip, own in self._by_clip.items() if turn < len(own)]
            pairs += [round_[i] for i in rng.permutation(len(round_))]
        return pairs


def pick_frames(clips: int, cached: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(clips, count): one frame at random from each of `count` equal slices of `cached`; all in order if count covers them."""
    if count >= cached:
        return np.tile(np.arange(cached), (clips, 1))
    edges = np.floor(np.linspace(0, cached, count + 1)).astype(np.int64)
    return rng.integers(edges[:-1], np.maximum(edges[:-1] + 1, edges[1:]), (clips, count))


@dataclass(frozen=True, slots=True)
class _Source:
    video: str
    archive: Path
    start: float | None
    end: float | None


@dataclass(frozen=True, slots=True)
class _ArchivedClips:
    """Frames read from their archives whenever they are asked for."""

    sources: tuple[_Source, ...]
    form: Form | int
    frames: int

    def pixels(self, rows: Sequence[int], picks: NDArray[np.int64] | None = None) -> NDArray[np.uint8]:
        wanted = np.arange(self.frames)[None].repeat(len(rows), axis=0) if picks is None else picks
        return np.stack([self._read(self.sources[row], own) for row, own in zip(rows, wanted, strict=True)])

    def _read(self, source: _Source, picks: NDArray[np.int64]) -> NDArray[np.uint8]:
        try:
            archive = FrameArchive(source.archive.read_bytes())
            names = archive.between(source.start, source.end, self.frames)
            return archive.pixels(tuple(names[i] for i in picks), self.form)
        except (DamagedFrames, FileNotFoundError) as error:
            raise DamagedFrames(f"video {source.video}: its cached frames are missing or damaged") from error


@dataclass(frozen=True, slots=True)
class ArrayClips:
    """Frames in an array (clips, F, 3, size, size) uint8, in memory or mapped from a file."""

    array: NDArray[np.uint8]

    @property
    def frames(self) -> int:
        return int(self.array.shape[1])

    def pixels(self, rows: Sequence[int], picks: NDArray[np.int64] | None = None) -> NDArray[np.uint8]:
        index = np.asarray(rows, dtype=np.int64)
        return self.array[index] if picks is None else self.array[index[:, None], picks]


def _cached(clips: _ArchivedClips, count: int, size: int, scratch: Path, decode: bool) -> ArrayClips:
    """All pixels in a mapped file of `scratch`, decoded on every core."""
    scratch.mkdir(parents=True, exist_ok=True)
    array = mapped(scratch / "pixels", (count, clips.frames, 3, size, size), np.uint8, new=decode)

    def fill(row: int) -> None:
        array[row] = clips.pixels([row])[0]

    if decode:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(fill, range(count)):
                pass
    return ArrayClips(array)


Scalar = TypeVar("Scalar", np.uint8, np.float32)


def mapped(path: Path, shape: tuple[int, ...], dtype: type[Scalar], new: bool = True) -> NDArray[Scalar]:
    """A file of zeros, mapped; its room is taken now, so that a full disk is an OSError and not a crash later.

    `new` False: one that another rank has filled.
    """
    if new:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize))
    return np.memmap(path, dtype, "r+", shape=shape)


def held_out(videos: Sequence[str], share: float) -> Iterator[str]:
    """Which of these captioned videos are kept from a training, about a `share`. Raises InvalidDataset for less than two."""
    if len(videos) < 2:
        raise InvalidDataset(f"an adapter needs captions of at least 2 training videos, there are {len(videos)}")
    ordered = sorted(videos, key=hash_of)
    held = [video for video in ordered if falls_out(video, share)] or ordered[:1]
    return iter(held[: len(videos) - 1])


def falls_out(video: str, share: float) -> bool:
    """Whether a video is held out, but for the few cases in which a side would be empty."""
    return hash_of(video) < share * 2**64


def hash_of(video: str) -> int:
    return int.from_bytes(hashlib.sha256(video.encode()).digest()[:8], "big")
