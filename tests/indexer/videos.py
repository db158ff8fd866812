"""Makes small real video files whose pictures tell the time, so that a test can see which frame it was given."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Picture = NDArray[np.uint8]

TICKS = 90_000  # a second, in the time base of the frames


def clock(seconds: float, size: tuple[int, int]) -> Picture:
    """(height, width, 3): the left half counts steps of eight seconds, the right half the time within one."""
    width, height = size
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, : width // 2] = 20 + 10 * int(seconds // 8)
    picture[:, width // 2 :] = 20 + round(25 * (seconds % 8))
    return picture


def time_shown(file: Path) -> float:
    """The time, in seconds, that a picture of `clock` shows (to a tenth of a second)."""
    with Image.open(file) as image:
        picture = np.asarray(image.convert("L"), dtype=float)
    width = picture.shape[1]
    left, right = picture[:, width // 8 : width // 3].mean(), picture[:, -width // 3 : -width // 8].mean()
    return float(8 * round((left - 20) / 10) + (right - 20) / 25)


def corner(seconds: float, size: tuple[int, int]) -> Picture:
    """(height, width, 3): grey, with a red quarter at the upper left."""
    width, height = size
    picture = np.full((height, width, 3), 128, np.uint8)
    picture[: height // 2, : width // 2] = (255, 0, 0)
    return picture


def write_video(
    path: Path,
    *,
    seconds: float = 2.0,
    fps: int = 25,
    size: tuple[int, int] = (160, 120),
    codec: str = "libx264",
    times: Sequence[float] | None = None,
    picture: Any = clock,
    gop: int = 25,
    rotation: int = 0,
    matrix: Sequence[int] | None = None,
    pixels: str = "yuv420p",
    aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Writes `picture(seconds, size)` at each of `times` (default: evenly, `fps` a second); the name's ending picks the
    container. `rotation` (degrees, counter-clockwise), a whole `matrix` and the `aspect` of a pixel go into the header, not
    into the pixels."""
    times = [n / fps for n in range(round(seconds * fps))] if times is None else times
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream: Any = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = Fraction(1, fps if codec.startswith(("mpeg", "rv")) else TICKS)
        stream.options = {
            "libx264": {"preset": "ultrafast", "bf": "2"},
            "libx265": {"preset": "ultrafast", "x265-params": "log-level=none"},
            "libsvtav1": {"preset": "12", "svtav1-params": "lp=1"},
            "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
        }.get(codec, {}) | (options or {})
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        if matrix:
            stream.set_display_matrix(matrix)
        for at in times:
            frame: Any = av.VideoFrame.from_ndarray(picture(at, size), format="rgb24").reformat(format=pixels)
            frame.time_base = stream.codec_context.time_base
            frame.pts = round(at / frame.time_base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))  # SVT-AV1, run as root, leaves its caller above all others
    return path


def sideways(seconds: float, size: tuple[int, int]) -> Picture:
    """`corner`, turned a quarter counter-clockwise, as a phone stores it that was held upright."""
    return np.ascontiguousarray(np.rot90(corner(seconds, size[::-1])))


def write_sound(path: Path) -> Path:
    """One second of silence and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le" if path.suffix == ".wav" else "aac", rate=44100)
        for n in range(43):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.rate, frame.pts = 44100, 1024 * n
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def truncated(path: Path, share: float) -> Path:
    """Cuts the file after `share` of its bytes."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def garbled(path: Path, start: float, end: float) -> Path:
    """Overwrites the bytes between the shares `start` and `end` with noise (seeded)."""
    data = bytearray(path.read_bytes())
    first, last = int(len(data) * start), int(len(data) * end)
    data[first:last] = random.Random(0).randbytes(last - first)
    path.write_bytes(data)
    return path
