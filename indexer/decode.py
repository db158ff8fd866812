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
import zipfile
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import numpy as np
from av.error import FFmpegError
from PIL import Image, UnidentifiedImageError

from indexer.container import SQUARE, Damaged, Picture, Pixel, decoded, open_video, rgb, through
from indexer.media import ASPECT, LARGEST_FRAME, DecodedSegment, DecodedVideo, DecodeError, Decoder, MediaFacts, Sampling
from indexer.survey import Survey, check_length, in_order_shown, segment_count, survey_of, with_times, without_leaps

__all__ = ["DecodeError", "DecodedSegment", "DecodedVideo", "Decoder", "MediaFacts", "Sampling", "decode", "probe", "reopen"]

DEFAULT = Sampling()
Fetch = Callable[[Path, Survey, list[int], Sampling], Iterator[Picture]]


def probe(path: Path, sampling: Sampling = DEFAULT) -> MediaFacts:
    """The facts of the file at `path`, from its packets and its first frame. Raises DecodeError as `decode` does."""
    return survey_of(path, sampling).facts


def decode(path: Path, out: Path, sampling: Sampling = DEFAULT, *, decoder: Decoder = "pyav") -> DecodedVideo:
    """Samples the video at `path` into JPEG files in the folder `out`, which exists and is empty.

    A video up to `segment_seconds` is one segment, a longer one is cut into equal ones. Each segment gives exactly
    `frames_per_segment` frames: those shown at the centres of as many equal slices (a short clip repeats frames).

    `decoder`: `pyav`; `auto`, decord where it agrees with PyAV's survey of the file and PyAV elsewhere; `decord`, that alone.

    Raises DecodeError (`empty_file`, `unsupported_media`, `no_frames`, `video_too_long`, `video_too_large`,
    `too_many_segments`) for the file's faults, OSError for faults of this machine (a missing file, a full disk).
    """
    survey = survey_of(path, sampling)
    attempts: list[tuple[Fetch, bool]] = [
        (_by_decord, decoder != "pyav" and survey.decord),
        (_by_seeking, decoder != "decord" and bool(survey.stamps)),
    ]
    for attempt in (attempt for attempt, fit in attempts if fit):
        try:
            return _write(survey, attempt, path, out, sampling)
        except Damaged:
            for file in out.iterdir():
                file.unlink()
    if decoder == "decord":
        raise DecodeError("unsupported_media", "decord does not read this file as it is: the decoders pyav and auto may.")
    with open_video(path, sampling) as (container, stream):
        found = np.array([time for time, _ in through(container, stream)])
    times = without_leaps(found, found)
    survey = replace(survey, facts=with_times(survey.facts, times), times=in_order_shown(times))
    check_length(survey.facts, sampling)
    return _write(survey, _by_decoding_through, path, out, sampling)


def reopen(path: Path, out: Path, facts: MediaFacts, sampling: Sampling = DEFAULT) -> DecodedVideo:
    """Cached frames from outside (a zip as `indexer.frames` packs it), checked and written into the folder `out`.

    Every picture is decoded once, to check that it is a JPEG of a usual size, and thumbnails are made. A picture that takes
    long to read (too large, or progressive) is written anew, as `decode` would. Raises DecodeError (`frames_damaged`).
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
                    slow = image.width * image.height > LARGEST_FRAME or "progressive" in image.info
                    picture = _middle(np.asarray(image.convert("RGB")), SQUARE)
                    (out / name).write_bytes(_jpeg(picture, SQUARE, short=sampling.short_side) if slow else jpeg)
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


def _write(survey: Survey, attempt: Fetch, path: Path, out: Path, sampling: Sampling) -> DecodedVideo:
    """Cut, let `attempt` fetch the pictures in the order of their indexes, write them."""
    per, duration = sampling.frames_per_segment, survey.facts.duration
    count = segment_count(duration, sampling)
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


# --- three ways to fetch pictures; each yields those of `wanted` (ascending indexes into the survey's frames)


def _by_decord(path: Path, survey: Survey, wanted: list[int], sampling: Sampling) -> Iterator[Picture]:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        if len(reader) != survey.facts.frames:
            raise Damaged
        for index in wanted:
            picture: Picture = reader[index].asnumpy()
            if picture.shape != survey.shape:
                raise Damaged
            yield picture
    except (decord.DECORDError, decord.DECORDLimitReachedError, AssertionError, RuntimeError, StopIteration) as error:
        raise Damaged from error


def _by_seeking(path: Path, survey: Survey, wanted: list[int], sampling: Sampling) -> Iterator[Picture]:
    """Decode on from the last picture, or jump where a key frame lies between it and the next one."""
    with open_video(path, sampling) as (container, stream):
        frames, at = decoded(container, stream, strict=True), survey.stamps[0]
        for index in wanted:
            target = survey.stamps[index]
            key, entry = survey.keys[max(bisect_right(survey.keys, target, key=itemgetter(0)) - 1, 0)]
            if at < key <= target:
                try:
                    container.seek(entry, stream=stream)
                except FFmpegError as error:
                    raise Damaged from error
                frames = decoded(container, stream, strict=True)
            frame = next((frame for frame in frames if frame.pts is None or frame.pts >= target), None)
            if frame is None or frame.pts != target:
                raise Damaged
            at = target
            yield rgb(frame, sampling)


def _by_decoding_through(path: Path, survey: Survey, wanted: list[int], sampling: Sampling) -> Iterator[Picture]:
    with open_video(path, sampling) as (container, stream):
        left = set(wanted)
        for index, (_, frame) in enumerate(through(container, stream)):
            if index in left:
                yield rgb(frame, sampling)
