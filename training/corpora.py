"""The published data sets, read from the files that they are published in, and their frames, decoded once.

`load_corpus` reads captions and splits and finds each video's file; `cache_frames` decodes the videos and writes the JSONL
that `training.dataset` reads. docs/datasets.md says which file goes where.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any, get_args
from unicodedata import normalize

from adapters_store import durable
from indexer.decode import DecodedSegment, DecodedVideo, DecodeError, Decoder, Sampling
from indexer.formats import VIDEO_SUFFIXES
from indexer.frames import pack_frames
from indexer.sandbox import Sandbox
from training import published
from training.dataset import SPLITS
from training.progress import Progress, Tell, unheard
from training.published import InvalidCorpus, named

LONGEST_VIDEO = 4 * 3600.0  # seconds
LONGEST_OF_BEGINNING = 3600.0  # seconds; such a video is sampled densely, and a decoding numbers up to 10,000 frames

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Clip:
    """One video of a corpus: its id in the published files, and where it lies."""

    video: str
    file: Path
    split: str
    captions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Corpus:
    """`frames` of a video and `words` of a caption are the paper's protocol; `missing` are the ids without a file."""

    name: str
    clips: tuple[Clip, ...]
    frames: int
    words: int
    missing: tuple[str, ...]
    seconds: float | None = None  # only the beginning of a video counts


@dataclass(frozen=True, slots=True)
class _Published:
    """How a data set is read. The first variant is the usual one; file names may leave out `prefix` of the id."""

    read: Callable[[Path, str | None, bool], published.Splits]
    frames: int = 12
    words: int = 32
    variants: tuple[str, ...] = ()
    prefix: str = ""
    seconds: float | None = None


_PUBLISHED = {
    "msrvtt": _Published(published.msrvtt, variants=("9k", "7k")),
    "msvd": _Published(published.msvd),
    "vatex": _Published(published.vatex, variants=("hgr", "1k5")),
    "didemo": _Published(published.didemo, frames=64, words=64, seconds=30.0),  # no annotator saw more of a video
    "activitynet": _Published(published.activitynet, frames=64, words=64, prefix="v_"),
    "jsonl": _Published(published.jsonl),
}
CORPORA = tuple(_PUBLISHED)


def load_corpus(name: str, root: Path, *, variant: str | None = None, allow_missing: bool = False) -> Corpus:
    """The data set `name` (one of CORPORA) of the folder `root`: annotations there, videos in `videos/` or anywhere below.

    A `root` of jsonl may be the JSONL file, beside which its videos lie. Raises InvalidCorpus: for files that are absent or
    broken, for a video that is in two splits, and, unless `allow_missing`, for videos without a file or a caption.
    """
    known = _PUBLISHED.get(name)
    if known is None:
        raise InvalidCorpus(f"there is no data set {name!r}; known are {', '.join(CORPORA)}")
    if variant is not None and variant not in known.variants:
        raise InvalidCorpus(f"{name} has no variant {variant!r}; known are {', '.join(known.variants) or 'none'}")
    folder = root.parent if name == "jsonl" and root.is_file() else root
    if not folder.is_dir():
        raise InvalidCorpus(f"{name}: there is no folder {folder}")
    splits = known.read(root, variant or next(iter(known.variants), None), allow_missing)
    _refuse_leaks(name, ((video, video, split) for split in SPLITS for video in splits.get(split, ())))
    files = _index(folder)
    clips, missing = [], []
    for split in SPLITS:
        for video, captions in splits.get(split, {}).items():
            file = _file_of(video, files, known.prefix)
            if file is None:
                missing.append(video)
            else:
                clips.append(Clip(video, file, split, tuple(captions)))
    total = len(clips) + len(missing)
    if missing and not allow_missing:
        raise InvalidCorpus(f"{name}: {len(missing)} of {total} videos have no file below {folder}: {named(missing)}")
    if not clips:
        raise InvalidCorpus(f"{name}: none of the {total} videos has a file below {folder}")
    _refuse_leaks(name, ((os.path.normpath(clip.file), clip.video, clip.split) for clip in clips))
    return Corpus(name, tuple(clips), known.frames, known.words, tuple(missing), known.seconds)


def cache_frames(
    corpus: Corpus,
    cache: Path,
    *,
    splits: Sequence[str] | None = None,
    workers: int = 2,
    allow_missing: bool = False,
    progress: Tell = unheard,
    side: int = 0,
) -> Path:
    """Decodes the videos of `splits` (None: all that the corpus has) into `cache` and returns a JSONL for `load_dataset`.

    The short side of the frames is 256 pixels, or `side` where a backbone takes more.

    A video that is there already is not decoded again; one whose file has changed is. `progress` is told
    after each. Videos that cannot be decoded raise InvalidCorpus at the end, or, with `allow_missing`, are logged and left
    out. Raises OSError (a full disk), after which nothing is half-written and a second call goes on.
    """
    for split in splits or ():
        if split not in SPLITS:
            raise InvalidCorpus(f"there is no split {split!r}; known are {', '.join(SPLITS)}")
        if not any(clip.split == split for clip in corpus.clips):
            raise InvalidCorpus(f"{corpus.name} has no {split} videos")
    clips = [clip for clip in corpus.clips if splits is None or clip.split in splits]
    decoder: Any = os.environ.get("POLYCLIP_DECODER", "auto")
    if decoder not in get_args(Decoder):
        raise InvalidCorpus(f"POLYCLIP_DECODER is one of {', '.join(get_args(Decoder))}, not {decoder!r}")
    cache.mkdir(parents=True, exist_ok=True)
    archives: dict[str, Path] = {}
    bad: dict[str, str] = {}
    with ExitStack() as stack:
        stack.enter_context(_in_use(cache))
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        sandboxes: SimpleQueue[Sandbox] = SimpleQueue()
        for _ in range(workers):
            sandboxes.put(stack.enter_context(Sandbox(decoder=decoder)))
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)  # after an error nothing more is begun
        waiting = {pool.submit(_cached, corpus, clip, cache, sandboxes, side): clip for clip in clips}
        for done, future in enumerate(as_completed(waiting), start=1):
            try:
                archives[waiting[future].video] = future.result()
            except DecodeError as error:
                bad[waiting[future].video] = error.detail.rstrip(".")
            progress(Progress("decoding", done, len(clips)))
    if bad:
        told = named([f"{clip.video!r} ({bad[clip.video]})" for clip in clips if clip.video in bad], str)
        reason = f"{corpus.name}: {len(bad)} of {len(clips)} videos cannot be decoded: {told}"
        if not allow_missing:
            raise InvalidCorpus(reason)
        logger.warning("%s; left out", reason)
    for split in dict.fromkeys(clip.split for clip in clips):
        if not any(clip.split == split and clip.video in archives for clip in clips):
            raise InvalidCorpus(f"{corpus.name}: not one {split} video can be decoded")
    lines = (
        {
            "video": clip.video,
            "frames": str(archives[clip.video].resolve()),
            "captions": [{"text": text} for text in clip.captions],
            "split": clip.split,
        }
        for clip in clips
        if clip.video in archives
    )
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    dataset = cache / f"{corpus.name}-{hashlib.sha256(data).hexdigest()[:16]}.jsonl"
    durable.write(dataset, data)
    return dataset


# --- decoding


@contextmanager
def _in_use(cache: Path) -> Iterator[None]:
    """Holds the folder, with others; who finds nobody else in it removes what runs that were killed left half-way."""
    descriptor = os.open(cache, os.O_RDONLY)
    try:
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in [*cache.glob(".decoding-*"), *cache.glob(".*.part")]:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _cached(corpus: Corpus, clip: Clip, cache: Path, sandboxes: SimpleQueue[Sandbox], side: int) -> Path:
    """The archive of a clip's frames, written if it is not there. Raises DecodeError for the file, OSError for the disk."""
    longest = LONGEST_OF_BEGINNING if corpus.seconds else LONGEST_VIDEO
    short_side = max(Sampling().short_side, side)
    sampling = Sampling(longest, frames_per_segment=corpus.frames, short_side=short_side, max_seconds=longest)
    try:
        with clip.file.open("rb") as file:
            facts = os.fstat(file.fileno())
    except OSError as error:
        raise DecodeError("unsupported_media", error.strerror or "cannot be read") from error
    key = json.dumps([clip.video, asdict(sampling), corpus.seconds, facts.st_size, facts.st_mtime_ns])
    archive = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.zip"
    if archive.exists():
        return archive
    sandbox = sandboxes.get()
    try:
        with TemporaryDirectory(dir=cache, prefix=".decoding-") as scratch:
            folder = Path(scratch, "whole")
            folder.mkdir()
            video = sandbox.decode(clip.file, folder, sampling)
            if corpus.seconds and video.facts.duration > corpus.seconds + 1:
                count = math.ceil(corpus.frames * video.facts.duration / corpus.seconds)
                folder = Path(scratch, "beginning")
                folder.mkdir()
                whole = sandbox.decode(clip.file, folder, replace(sampling, frames_per_segment=count)).segments[0]
                first = DecodedSegment(0.0, corpus.seconds, whole.frame_files[: corpus.frames], whole.thumbnail_file)
                video = DecodedVideo(video.facts, (first,))
            durable.write(archive, pack_frames(video, folder))
    finally:
        sandboxes.put(sandbox)
    return archive


# --- the videos


def _index(root: Path) -> dict[str, list[Path]]:
    """The video files of `root`, each under its name, its name without the ending, and its path, which goes before names.

    Names are in NFC, whichever form of Unicode the disk has them in.
    """
    base = root / "videos" if (root / "videos").is_dir() else root
    found: dict[str, list[Path]] = {}
    paths: dict[str, list[Path]] = {}
    walked: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(base, followlinks=True):
        facts = os.stat(folder)
        if (facts.st_dev, facts.st_ino) in walked:  # a link that leads back
            folders.clear()
            continue
        walked.add((facts.st_dev, facts.st_ino))
        folders.sort()
        for file in (Path(folder, name) for name in sorted(names)):
            if file.suffix.lower() in VIDEO_SUFFIXES and file.is_file():  # no pipe, which is waited for without end
                for name in (file.name, file.stem):
                    found.setdefault(normalize("NFC", name), []).append(file)
                for path in {normalize("NFC", file.relative_to(top).as_posix()) for top in (root, base)}:
                    paths.setdefault(path, []).append(file)
    return found | paths


def _file_of(video: str, files: dict[str, list[Path]], prefix: str) -> Path | None:
    if os.path.isabs(video):
        return Path(video) if os.path.isfile(video) else None
    names = [video]
    if PurePosixPath(video).suffix.lower() in VIDEO_SUFFIXES:  # published with an ending that the file may not have kept
        names.append(video.rpartition(".")[0])
    if prefix and video.startswith(prefix):
        names.append(video.removeprefix(prefix))
    found = next((files[name] for name in (normalize("NFC", name) for name in names) if name in files), [])
    if len(found) > 1:
        raise InvalidCorpus(f"video {video!r} has more than one file: {found[0]} and {found[1]}")
    return found[0] if found else None


def _refuse_leaks(name: str, places: Iterable[tuple[str, str, str]]) -> None:
    """`places` are (what must be in one split only, video id, split)."""
    first: dict[str, tuple[str, str]] = {}
    for what, video, split in places:
        other, other_split = first.setdefault(what, (video, split))
        if other_split != split:
            same = "" if other == video else f" (the file of {other!r})"
            raise InvalidCorpus(f"{name}: video {video!r}{same} is in {other_split} and in {split}")
