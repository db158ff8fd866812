"""The first pass over a file: its packets, not decoded, tell the real time of every frame, whatever the header says."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from indexer.color import HLG, PQ
from indexer.container import Pixel, check_size, open_video, orientation, packets, pixel_of, rgb, through
from indexer.media import DecodeError, MediaFacts, Sampling

# decord can be given no such list, so it only sees files whose first bytes leave no doubt what they are.
DECORD_HEADS = re.compile(rb"....(ftyp|moov|mdat|wide|free|skip)|\x1a\x45\xdf\xa3|RIFF....AVI ", re.DOTALL)
LONGEST_GAP = 60.0  # seconds from one frame to the next, or ten times the usual: beyond it a stamp is wrong


@dataclass(frozen=True, slots=True)
class Survey:
    """The frames that the packets promise, in the order they are shown."""

    facts: MediaFacts
    times: NDArray[np.float64]  # (frames,) seconds from the first frame
    stamps: list[int]  # (frames,) in the stream's time base; empty where there are none, or they do not tell the order
    keys: list[tuple[int, int]]  # the key frames: (stamp shown at, stamp to seek to)
    pixel: Pixel
    shape: tuple[int, ...]  # of the pictures
    decord: bool  # worth trying


def survey_of(path: Path, sampling: Sampling) -> Survey:
    """Reads all packets and decodes the first frame. Raises DecodeError."""
    if path.stat().st_size == 0:
        raise DecodeError("empty_file", "The file is empty.")
    with open_video(path, sampling) as (container, stream):
        stamps: list[int] = []
        order: list[int] = []  # stamps of decoding
        lengths: list[int] = []
        keys: list[tuple[int, int]] = []
        base = float(stream.time_base or 0)
        # AVI stamps tell the order in the file: where frames are shown in another order, decord gives wrong ones
        usable, clean = not (container.format.name == "avi" and stream.codec_context.has_b_frames), True
        for packet in packets(container, stream):
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
    times = without_leaps(found, np.array(order) * base)
    if usable and stamps:
        facts = with_times(facts, times, lengths[int(np.argmax(times))] * base)
        check_length(facts, sampling)
    with open_video(path, sampling) as (container, stream):
        first = next((picture for _, picture in through(container, stream)), None)
        if first is None:
            raise DecodeError("no_frames", "The file opens as a video, but not one frame can be decoded.")
        shape, pixel = rgb(first, sampling).shape, pixel_of(stream, first)
        plain = first.side_data.get("DISPLAYMATRIX") is None and first.color_trc not in (PQ, HLG)
    width, height = (first.height, first.width) if orientation(first)[0] else (first.width, first.height)
    width, height = max(1, round(width * pixel[0])), max(1, round(height * pixel[1]))
    check_size(width, height, sampling)
    facts = replace(facts, width=width, height=height)
    with path.open("rb") as file:
        known = DECORD_HEADS.match(file.read(16)) is not None
    same_order = bool(np.array_equal(np.argsort(found, kind="stable"), np.argsort(times, kind="stable")))
    usual_stamps = usable and clean and bool(np.array_equal(found, times))
    in_order = sorted(stamps) if usable and keys and same_order else []
    return Survey(facts, in_order_shown(times), in_order, sorted(keys), pixel, shape, usual_stamps and known and plain)


def _usual_gap(times: NDArray[np.float64]) -> float:
    """The median of the seconds from a frame to the next; 0.04 where there is none."""
    gaps = np.diff(np.sort(times))
    return float(np.median(gaps[gaps > 0])) if gaps.any() else 0.04


def without_leaps(times: NDArray[np.float64], order: NDArray[np.float64]) -> NDArray[np.float64]:
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


def with_times(facts: MediaFacts, times: NDArray[np.float64], last: float = 0.0) -> MediaFacts:
    """`facts` with these frame times. `last`: the file's word for how long the last frame is shown, in seconds."""
    usual = _usual_gap(times)
    duration = round(float(np.ptp(times)) + (last if 0 < last <= max(LONGEST_GAP, 10 * usual) else usual), 9)
    return replace(facts, duration=duration, frames=len(times), fps=len(times) / duration)


def in_order_shown(times: NDArray[np.float64]) -> NDArray[np.float64]:
    """The times in ascending order, from 0: a decoder gives frames in the order they are shown."""
    ordered = np.sort(times)
    return ordered - ordered[:1]


def check_length(facts: MediaFacts, sampling: Sampling) -> None:
    if facts.duration > sampling.max_seconds:
        lasts = f"The video lasts {facts.duration:.0f} seconds; the limit is {sampling.max_seconds:.0f}."
        raise DecodeError("video_too_long", lasts)
    if (count := segment_count(facts.duration, sampling)) > sampling.max_segments:
        told = f"The video would be cut into {count} segments of {sampling.segment_seconds:g} seconds"
        raise DecodeError("too_many_segments", f"{told}; the limit is {sampling.max_segments}.")


def segment_count(duration: float, sampling: Sampling) -> int:
    return max(1, math.ceil((duration - 1e-3) / sampling.segment_seconds))
