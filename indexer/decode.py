"""From a video file to sampled frames: probe, cut into segments, write frames and thumbnails as JPEG files.

This runs on hostile bytes, so only inside the sandbox (`indexer.sandbox`). A first pass reads the packets without
decoding them (the survey): it knows the real time of every frame, whatever the header claims. PyAV decodes the chosen
frames; a file whose packets promise frames that do not come out is read through and keeps what it still gives. decord may
take its place for the operator's own files, where it agrees with the survey: it bundles an old FFmpeg.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from av.error import FFmpegError
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from indexer.color import HLG, PQ, to_sdr
from indexer.formats import DEMUXERS

Decoder = Literal["pyav", "decord", "auto"]
Picture = NDArray[np.uint8]  # (height, width, 3) RGB, upright; its pixels may not be square
Pixel = tuple[float, float]  # how wide and how high a pixel of a Picture is shown
SQUARE = (1.0, 1.0)
UPRIGHT = (False, False, False)

# decord can be given no such list, so it only sees files whose first bytes leave no doubt what they are.
DECORD_HEADS = re.compile(rb"....(ftyp|moov|mdat|wide|free|skip)|\x1a\x45\xdf\xa3|RIFF....AVI ", re.DOTALL)
LONGEST_GAP = 60.0  # seconds from one frame to the next, or ten times the usual: beyond it a stamp is wrong
LONGEST_SIDE = 16384  # pixels
LONGEST_PIXEL = 10  # times its other side; the shape of a longer one is garbage and left alone
ASPECT = 4  # of a cached frame, at most: backbones see its middle square only
LARGEST_FRAME = ASPECT * 1024 * 1024  # pixels of a cached frame
FRAME_NAME = re.compile(r"\d{3,6}-(\d{2,4}|thumb)\.jpg")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a video is cut and sampled, and what is refused. Times in seconds, sizes in pixels."""

    segment_seconds: float = 30.0
    frames_per_segment: int = 12
    short_side: int = 256
    thumbnail_width: int = 320
    max_seconds: float = 4 * 3600.0
    max_segments: int = 2000
    max_pixels: int = 8192 * 8192


class DecodeError(Exception):
    """The file gives no video. `code` is stable (docs name them all); `detail` is one line for who sent the file."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


@dataclass(frozen=True, slots=True)
class MediaFacts:
    """What was found in the file. Sizes are as shown (turned, with square pixels), fps the true average.

    `duration` in seconds is what is shown: a leap of the stamps (`LONGEST_GAP`) counts as one usual frame.
    """

    duration: float
    width: int
    height: int
    fps: float
    codec: str
    frames: int
    container: str
    decoder: str


@dataclass(frozen=True, slots=True)
class DecodedSegment:
    """A stretch [start, end) in seconds from the first frame, and the names of its JPEG files in the output folder."""

    start: float
    end: float
    frame_files: tuple[str, ...]
    thumbnail_file: str


@dataclass(frozen=True, slots=True)
class DecodedVideo:
    facts: MediaFacts
    segments: tuple[DecodedSegment, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DecodedVideo:
        """Raises ValueError, KeyError or TypeError where `data` is not what `to_dict` gives."""
        segments = []
        for each in data["segments"]:
            names, thumbnail = tuple(each["frame_files"]), each["thumbnail_file"]
            if not all(FRAME_NAME.fullmatch(name) for name in (*names, thumbnail)):
                raise ValueError("not the name of a frame file")
            segments.append(DecodedSegment(float(each["start"]), float(each["end"]), names, thumbnail))
        return cls(MediaFacts(**data["facts"]), tuple(segments))


@dataclass(frozen=True, slots=True)
class _Survey:
    """The frames that the packets promise, in the order they are shown."""

    facts: MediaFacts
    times: NDArray[np.float64]  # (frames,) seconds from the first frame
    stamps: list[int]  # (frames,) in the stream's time base; empty where there are none, or they do not tell the order
    keys: list[tuple[int, int]]  # the key frames: (stamp shown at, stamp to seek to)
    pixel: Pixel
    shape: tuple[int, ...]  # of the pictures
    decord: bool  # worth trying


class _Damaged(Exception):
    """The frames that come out are not those that the packets promised."""


Fetch = Callable[[Path, _Survey, list[int], Sampling], Iterator[Picture]]


def probe(path: Path, sampling: Sampling = Sampling()) -> MediaFacts:
    """The facts of the file at `path`, from its packets and its first frame. Raises DecodeError as `decode` does."""
    return _survey(path, sampling).facts


def decode(path: Path, out: Path, sampling: Sampling = Sampling(), *, decoder: Decoder = "pyav") -> DecodedVideo:
    """Sample the video at `path` into JPEG files in the folder `out`, which exists and is empty.

    A video up to `segment_seconds` is one segment, a longer one is cut into equal ones. Each segment gives exactly
    `frames_per_segment` frames: those shown at the centres of as many equal slices (a short clip repeats frames).

    `decoder`: `pyav`; `auto`, decord where it agrees with PyAV's survey of the file and PyAV elsewhere; `decord`, that alone.

    Raises DecodeError (`empty_file`, `unsupported_media`, `no_frames`, `video_too_long`, `video_too_large`,
    `too_many_segments`) for the file's faults, OSError for ours (a missing file, a full disk).
    """
    survey = _survey(path, sampling)
    attempts: list[tuple[Fetch, bool]] = [
        (_by_decord, decoder != "pyav" and survey.decord),
        (_by_seeking, decoder != "decord" and bool(survey.stamps)),
    ]
    for attempt in (attempt for attempt, fit in attempts if fit):
        try:
            return _write(survey, attempt, path, out, sampling)
        except _Damaged:
            for file in out.iterdir():
                file.unlink()
    if decoder == "decord":
        raise DecodeError("unsupported_media", "decord does not read this file as it is: the decoders pyav and auto may.")
    with _open(path, sampling) as (container, stream):
        found = np.array([time for time, _ in _through(container, stream)])
    times = _without_leaps(found, found)
    survey = replace(survey, facts=_with_times(survey.facts, times), times=_shown(times))
    _check_length(survey.facts, sampling)
    return _write(survey, _by_decoding_through, path, out, sampling)


def reopen(path: Path, out: Path, facts: MediaFacts, sampling: Sampling = Sampling()) -> DecodedVideo:
    """Cached frames that come from elsewhere (a zip as `indexer.frames` packs it), written anew into the folder `out`.

    Every picture is decoded once, to see that it is a JPEG of a sane size; thumbnails are made of them. One that would be
    dear to read again (too large, or in many scans) is written as `decode` would. Raises DecodeError (`frames_damaged`).
    """
    segments = []
    try:
        left = path.stat().st_size  # what is stored cannot be more than the file: no entry counts twice
        with zipfile.ZipFile(path) as archive:
            told = json.loads(_stored(archive, "index.json", left))["segments"]
            if len(told) > sampling.max_segments:
                raise ValueError(f"{len(told)} segments; the limit is {sampling.max_segments}")
            for number, each in enumerate(told):
                start, end, count = float(each["start"]), float(each["end"]), len(each["frames"])
                if count > sampling.frames_per_segment:
                    raise ValueError(f"{count} frames in a segment; the limit is {sampling.frames_per_segment}")
                if not (0 <= start <= end < math.inf and count):
                    raise ValueError("a segment without time or frames")
                names, thumbnail = tuple(f"{number:03d}-{slot:02d}.jpg" for slot in range(count)), f"{number:03d}-thumb.jpg"
                for slot, (name, theirs) in enumerate(zip(names, each["frames"], strict=True)):
                    jpeg = _stored(archive, theirs, left)
                    left -= len(jpeg)
                    image = Image.open(io.BytesIO(jpeg), formats=("JPEG",))
                    if image.width * image.height > sampling.max_pixels:
                        raise ValueError("a picture is too large")
                    dear = image.width * image.height > LARGEST_FRAME or "progressive" in image.info
                    picture = _middle(np.asarray(image.convert("RGB")), SQUARE)
                    (out / name).write_bytes(_jpeg(picture, SQUARE, short=sampling.short_side) if dear else jpeg)
                    if slot == count // 2:
                        (out / thumbnail).write_bytes(_jpeg(picture, SQUARE, width=sampling.thumbnail_width))
                segments.append(DecodedSegment(start, end, names, thumbnail))
        if not segments:
            raise ValueError("no segments")
    except (zipfile.BadZipFile, UnidentifiedImageError, Image.DecompressionBombError, KeyError, TypeError, ValueError) as error:
        raise DecodeError("frames_damaged", f"The cached frames are damaged: {error}") from error
    return DecodedVideo(facts, tuple(segments))


def _stored(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > limit:
        raise ValueError(f"{name} is not stored as it is")
    return archive.read(entry)


def _write(survey: _Survey, attempt: Fetch, path: Path, out: Path, sampling: Sampling) -> DecodedVideo:
    """Cut, let `attempt` fetch the pictures in the order of their indexes, write them."""
    per, duration = sampling.frames_per_segment, survey.facts.duration
    count = _segments(duration, sampling)
    bounds = np.linspace(0.0, duration, count + 1).tolist()
    centres = (np.arange(count * per) + 0.5) * (duration / (count * per))
    chosen = np.maximum(np.searchsorted(survey.times, centres + 1e-6, side="right") - 1, 0).tolist()
    pictures = attempt(path, survey, sorted(set(chosen)), sampling)
    picture, jpeg, last = np.zeros((1, 1, 3), np.uint8), b"", -1
    segments = []
    for number in range(count):
        names, thumbnail = tuple(f"{number:03d}-{slot:02d}.jpg" for slot in range(per)), f"{number:03d}-thumb.jpg"
        for slot, name in enumerate(names):
            index = chosen[number * per + slot]
            if index != last:
                picture, last = _middle(next(pictures), survey.pixel), index
                jpeg = _jpeg(picture, survey.pixel, short=sampling.short_side)
            (out / name).write_bytes(jpeg)
            if slot == per // 2:
                (out / thumbnail).write_bytes(_jpeg(picture, survey.pixel, width=sampling.thumbnail_width))
        segments.append(DecodedSegment(bounds[number], bounds[number + 1], names, thumbnail))
    decoder = "decord" if attempt is _by_decord else "pyav"
    return DecodedVideo(replace(survey.facts, decoder=decoder), tuple(segments))


def _middle(picture: Picture, pixel: Pixel) -> Picture:
    """All of an ordinary picture; the middle of one that is longer than `ASPECT` times its short side."""
    height, width = picture.shape[:2]
    longest = ASPECT * min(height * pixel[1], width * pixel[0])
    left, top = (max(0, int(side - longest / part) // 2) for side, part in zip((width, height), pixel, strict=True))
    return np.ascontiguousarray(picture[top : height - top, left : width - left])


def _jpeg(picture: Picture, pixel: Pixel, *, short: int = 0, width: int = 0) -> bytes:
    """With square pixels, made smaller until its short side is `short` or its width is `width`."""
    image = Image.fromarray(picture)
    across, down = image.width * pixel[0], image.height * pixel[1]
    scale = min(1.0, short / min(across, down) if short else width / across)
    size = (max(1, round(across * scale)), max(1, round(down * scale)))
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92)
    return file.getvalue()


# --- the survey


@contextmanager
def _open(path: Path, sampling: Sampling) -> Iterator[tuple[Any, Any]]:
    options = {"protocol_whitelist": "file", "format_whitelist": DEMUXERS}
    try:
        container = av.open(str(path), metadata_errors="ignore", options=options)
    except MemoryError:
        raise
    except FFmpegError as error:
        raise DecodeError("unsupported_media", "The file is not a video that can be read.") from error
    with container:
        stream: Any = container.streams.best("video")
        if stream is None or stream.disposition & stream.disposition.attached_pic:
            raise DecodeError("unsupported_media", "The file has no video stream.")
        if stream.codec_context is None:
            raise DecodeError("unsupported_media", "The video is encrypted or in a codec that is not known.")
        _check_size(stream.codec_context.width, stream.codec_context.height, sampling)
        stream.codec_context.thread_count = 1
        yield container, stream


def _survey(path: Path, sampling: Sampling) -> _Survey:
    if path.stat().st_size == 0:
        raise DecodeError("empty_file", "The file is empty.")
    with _open(path, sampling) as (container, stream):
        stamps: list[int] = []
        order: list[int] = []  # stamps of decoding
        lengths: list[int] = []
        keys: list[tuple[int, int]] = []
        base = float(stream.time_base or 0)
        # AVI stamps tell the order in the file: where frames are shown in another order, decord gives wrong ones
        usable, clean = not (container.format.name == "avi" and stream.codec_context.has_b_frames), True
        for packet in _packets(container, stream):
            if packet.has_sidedata("encryption_info"):
                raise DecodeError("unsupported_media", "The video is encrypted.")
            if packet.is_discard or packet.is_corrupt:
                clean = False
                continue
            stamp = packet.pts
            if stamp is None or not base:
                usable = False
                stamp = packet.dts or 0
            stamps.append(stamp)
            order.append(stamp if packet.dts is None else packet.dts)
            lengths.append(packet.duration or 0)
            if packet.is_keyframe:
                keys.append((stamp, stamp if packet.dts is None else packet.dts))
        name = stream.codec_context.codec.canonical_name
        facts = MediaFacts(0.0, 0, 0, 0.0, name, len(stamps), container.format.name, "pyav")
    found = np.array(stamps) * base
    times = _without_leaps(found, np.array(order) * base)
    if usable and stamps:
        facts = _with_times(facts, times, lengths[int(np.argmax(times))] * base)
        _check_length(facts, sampling)
    with _open(path, sampling) as (container, stream):
        first = next((picture for _, picture in _through(container, stream)), None)
        if first is None:
            raise DecodeError("no_frames", "The file opens as a video, but not one frame can be decoded.")
        shape, pixel = _rgb(first, sampling).shape, _pixel(stream, first)
        plain = first.side_data.get("DISPLAYMATRIX") is None and first.color_trc not in (PQ, HLG)
    width, height = (first.height, first.width) if _orientation(first)[0] else (first.width, first.height)
    width, height = max(1, round(width * pixel[0])), max(1, round(height * pixel[1]))
    _check_size(width, height, sampling)
    facts = replace(facts, width=width, height=height)
    with path.open("rb") as file:
        known = DECORD_HEADS.match(file.read(16)) is not None
    same_order = bool(np.array_equal(np.argsort(found, kind="stable"), np.argsort(times, kind="stable")))
    usual_stamps = usable and clean and bool(np.array_equal(found, times))
    in_order = sorted(stamps) if usable and keys and same_order else []
    return _Survey(facts, _shown(times), in_order, sorted(keys), pixel, shape, usual_stamps and known and plain)


def _usual_gap(times: NDArray[np.float64]) -> float:
    """Seconds from a frame to the next, mostly; 0.04 where that cannot be told."""
    gaps = np.diff(np.sort(times))
    return float(np.median(gaps[gaps > 0])) if gaps.any() else 0.04


def _without_leaps(times: NDArray[np.float64], order: NDArray[np.float64]) -> NDArray[np.float64]:
    """(frames,) `times` (seconds, in the file's order), with each leap of the stamps made one usual gap.

    A leap is seen in the stamps of decoding (`order`): forth, or back where a recording starts again; or it is the time
    of a frame alone, which leaves a gap in the order of showing.
    """
    usual = _usual_gap(times)
    longest, back = max(LONGEST_GAP, 10 * usual), max(1.0, 32 * usual)  # frames are decoded up to 16 places before or after
    steps = np.diff(order, prepend=order[:1])
    times = times + np.cumsum(np.where((steps > longest) | (steps < -back), usual - steps, 0.0))
    shown = np.argsort(times, kind="stable")
    gaps = np.diff(times[shown], prepend=times[shown[:1]])
    times[shown] -= np.cumsum(np.where(gaps > longest, gaps - usual, 0.0))
    return times


def _with_times(facts: MediaFacts, times: NDArray[np.float64], last: float = 0.0) -> MediaFacts:
    """`facts` with these frame times; a last frame of no sane length (`last`) of its own is shown as long as the others."""
    usual = _usual_gap(times)
    duration = round(float(np.ptp(times)) + (last if 0 < last <= max(LONGEST_GAP, 10 * usual) else usual), 9)
    return replace(facts, duration=duration, frames=len(times), fps=len(times) / duration)


def _shown(times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Frames come out in the order they are shown, even where their stamps do not."""
    ordered = np.sort(times)
    return ordered - ordered[:1]


def _check_size(width: int, height: int, sampling: Sampling) -> None:
    if width * height > sampling.max_pixels or max(width, height) > LONGEST_SIDE:
        raise DecodeError("video_too_large", f"The pictures are too large ({width} × {height} pixels).")


def _check_length(facts: MediaFacts, sampling: Sampling) -> None:
    if facts.duration > sampling.max_seconds:
        lasts = f"The video lasts {facts.duration:.0f} seconds; the limit is {sampling.max_seconds:.0f}."
        raise DecodeError("video_too_long", lasts)
    if (count := _segments(facts.duration, sampling)) > sampling.max_segments:
        told = f"The video would be cut into {count} segments of {sampling.segment_seconds:g} seconds"
        raise DecodeError("too_many_segments", f"{told}; the limit is {sampling.max_segments}.")


def _segments(duration: float, sampling: Sampling) -> int:
    return max(1, math.ceil((duration - 1e-3) / sampling.segment_seconds))


# --- three ways to fetch pictures; each yields those of `wanted` (ascending indexes into the survey's frames)


def _by_decord(path: Path, survey: _Survey, wanted: list[int], sampling: Sampling) -> Iterator[Picture]:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        if len(reader) != survey.facts.frames:
            raise _Damaged
        for index in wanted:
            picture: Picture = reader[index].asnumpy()
            if picture.shape != survey.shape:
                raise _Damaged
            yield picture
    except (decord.DECORDError, decord.DECORDLimitReachedError, AssertionError, RuntimeError, StopIteration) as error:
        raise _Damaged from error


def _by_seeking(path: Path, survey: _Survey, wanted: list[int], sampling: Sampling) -> Iterator[Picture]:
    """Decode on from the last picture, or jump where a key frame lies between it and the next one."""
    with _open(path, sampling) as (container, stream):
        frames, at = _decoded(container, stream, strict=True), survey.stamps[0]
        for index in wanted:
            target = survey.stamps[index]
            key, entry = survey.keys[max(bisect_right(survey.keys, target, key=itemgetter(0)) - 1, 0)]
            if at < key <= target:
                try:
                    container.seek(entry, stream=stream)
                except FFmpegError as error:
                    raise _Damaged from error
                frames = _decoded(container, stream, strict=True)
            frame = next((frame for frame in frames if frame.pts is None or frame.pts >= target), None)
            if frame is None or frame.pts != target:
                raise _Damaged
            at = target
            yield _rgb(frame, sampling)


def _by_decoding_through(path: Path, survey: _Survey, wanted: list[int], sampling: Sampling) -> Iterator[Picture]:
    with _open(path, sampling) as (container, stream):
        left = set(wanted)
        for index, (_, frame) in enumerate(_through(container, stream)):
            if index in left:
                yield _rgb(frame, sampling)


def _through(container: Any, stream: Any) -> Iterator[tuple[float, Any]]:
    """(seconds, frame) of all that can still be decoded; a frame without a stamp follows the one before it."""
    base, step = float(stream.time_base or 0), 1 / float(stream.average_rate or stream.guessed_rate or 25)
    time = -step
    for frame in _decoded(container, stream, strict=False):
        time = time + step if frame.pts is None else frame.pts * base
        yield time, frame


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """The packets up to the end, or to where the container is broken; without the empty one that flushes."""
    try:
        yield from (packet for packet in container.demux(stream) if packet.size)
    except MemoryError:
        raise
    except FFmpegError:
        return


def _decoded(container: Any, stream: Any, *, strict: bool) -> Iterator[Any]:
    """The frames in the order they are shown. A packet that does not decode is passed over, or raises where `strict`."""
    for packet in chain(_packets(container, stream), [None]):  # None: the last frames are still inside the decoder
        try:
            frames = stream.codec_context.decode(packet)
        except MemoryError:
            raise
        except FFmpegError as error:
            if strict:
                raise _Damaged from error
            continue
        yield from frames


def _rgb(frame: Any, sampling: Sampling) -> Picture:
    """(height, width, 3), turned upright. An HDR picture is made smaller where that loses nothing: its colours cost much."""
    if frame.color_trc in (PQ, HLG):
        scale = min(1.0, 2 * sampling.short_side / min(frame.width, frame.height))
        width, height = (max(1, round(side * scale)) for side in (frame.width, frame.height))
        matrix = None if frame.colorspace not in (0, 2) else "BT2020"  # 0, 2: not told
        wide = frame.reformat(width, height, "rgb48le", src_colorspace=matrix, interpolation="AREA", threads=1)
        picture = to_sdr(wide.to_ndarray(), frame.color_trc)
    else:
        picture = frame.to_ndarray(format="rgb24", threads=1)
    transposed, mirrored, upside_down = _orientation(frame)
    picture = picture.transpose(1, 0, 2) if transposed else picture
    return np.ascontiguousarray(picture[:: -1 if upside_down else 1, :: -1 if mirrored else 1])


def _orientation(frame: Any) -> tuple[bool, bool, bool]:
    """What turns the stored picture upright: rows become columns, then left and right change, then above and below.

    A display matrix ((a, b), (c, d)) shows what is stored at (x, y) at (a x + c y, b x + d y). One that does neither keep
    nor change the axes is garbage and turns nothing.
    """
    stored = frame.side_data.get("DISPLAYMATRIX")
    if stored is None:
        return UPRIGHT
    a, b, _, c, d = np.frombuffer(bytes(stored), np.int32)[:5].tolist()
    kept, changed = sorted((abs(a), abs(d))), sorted((abs(b), abs(c)))
    if kept[0] > 50 * changed[1]:
        return False, a < 0, d < 0
    return (True, c < 0, b < 0) if changed[0] > 50 * kept[1] else UPRIGHT


def _pixel(stream: Any, frame: Any) -> Pixel:
    """The container's word on the shape of a pixel, where it says something sane."""
    aspect = float(stream.sample_aspect_ratio or 1)
    if not 1 / LONGEST_PIXEL <= aspect <= LONGEST_PIXEL:
        return SQUARE
    return (1.0, aspect) if _orientation(frame)[0] else (aspect, 1.0)
