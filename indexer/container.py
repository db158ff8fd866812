"""What PyAV reads of a file: the container, its packets, the frames that they decode to, and upright pictures of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from numpy.typing import NDArray

from indexer.color import HLG, PQ, to_sdr
from indexer.formats import DEMUXERS
from indexer.media import DecodeError, Sampling

Picture = NDArray[np.uint8]  # (height, width, 3) RGB, upright; its pixels may not be square
Pixel = tuple[float, float]  # how wide and how high a pixel of a Picture is shown
SQUARE = (1.0, 1.0)
UPRIGHT = (False, False, False)
LONGEST_SIDE = 16384  # pixels
LONGEST_PIXEL = 10  # times its other side; a longer one is an error of the file and taken as square


class Damaged(Exception):
    """The frames that come out are not those that the packets promised."""


@contextmanager
def open_video(path: Path, sampling: Sampling) -> Iterator[tuple[Any, Any]]:
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
        check_size(stream.codec_context.width, stream.codec_context.height, sampling)
        stream.codec_context.thread_count = 1
        yield container, stream


def check_size(width: int, height: int, sampling: Sampling) -> None:
    if width * height > sampling.max_pixels or max(width, height) > LONGEST_SIDE:
        raise DecodeError("video_too_large", f"The pictures are too large ({width} × {height} pixels).")


def through(container: Any, stream: Any) -> Iterator[tuple[float, Any]]:
    """(seconds, frame) of all that can still be decoded; a frame without a stamp follows the one before it."""
    base, step = float(stream.time_base or 0), 1 / float(stream.average_rate or stream.guessed_rate or 25)
    time = -step
    for frame in decoded(container, stream, strict=False):
        time = time + step if frame.pts is None else frame.pts * base
        yield time, frame


def packets(container: Any, stream: Any) -> Iterator[Any]:
    """The packets up to the end of the container, or to where it is broken. The empty one at the end is left out."""
    try:
        yield from (packet for packet in container.demux(stream) if packet.size)
    except MemoryError:
        raise
    except FFmpegError:
        return


def decoded(container: Any, stream: Any, *, strict: bool) -> Iterator[Any]:
    """The frames in the order they are shown. A packet that does not decode is passed over, or raises where `strict`."""
    for packet in chain(packets(container, stream), [None]):  # None: the last frames are still inside the decoder
        try:
            frames = stream.codec_context.decode(packet)
        except MemoryError:
            raise
        except FFmpegError as error:
            if strict:
                raise Damaged from error
            continue
        yield from frames


def rgb(frame: Any, sampling: Sampling) -> Picture:
    """(height, width, 3), turned upright. An HDR picture is made smaller where that loses nothing: its colours cost much."""
    if frame.color_trc in (PQ, HLG):
        scale = min(1.0, 2 * sampling.short_side / min(frame.width, frame.height))
        width, height = (max(1, round(side * scale)) for side in (frame.width, frame.height))
        matrix = None if frame.colorspace not in (0, 2) else "BT2020"  # 0, 2: not told
        wide = frame.reformat(width, height, "rgb48le", src_colorspace=matrix, interpolation="AREA", threads=1)
        picture = to_sdr(wide.to_ndarray(), frame.color_trc)
    else:
        picture = frame.to_ndarray(format="rgb24", threads=1)
    transposed, mirrored, upside_down = orientation(frame)
    picture = picture.transpose(1, 0, 2) if transposed else picture
    return np.ascontiguousarray(picture[:: -1 if upside_down else 1, :: -1 if mirrored else 1])


def orientation(frame: Any) -> tuple[bool, bool, bool]:
    """What turns the stored picture upright: rows become columns, then left and right change, then above and below.

    A display matrix ((a, b), (c, d)) shows what is stored at (x, y) at (a x + c y, b x + d y). One that is no turn by quarters
    is ignored.
    """
    stored = frame.side_data.get("DISPLAYMATRIX")
    if stored is None:
        return UPRIGHT
    a, b, _, c, d = np.frombuffer(bytes(stored), np.int32)[:5].tolist()
    kept, changed = sorted((abs(a), abs(d))), sorted((abs(b), abs(c)))
    if kept[0] > 50 * changed[1]:
        return False, a < 0, d < 0
    return (True, c < 0, b < 0) if changed[0] > 50 * kept[1] else UPRIGHT


def pixel_of(stream: Any, frame: Any) -> Pixel:
    """The shape of a pixel as the container tells it; square where that is beyond LONGEST_PIXEL."""
    aspect = float(stream.sample_aspect_ratio or 1)
    if not 1 / LONGEST_PIXEL <= aspect <= LONGEST_PIXEL:
        return SQUARE
    return (1.0, aspect) if orientation(frame)[0] else (aspect, 1.0)
