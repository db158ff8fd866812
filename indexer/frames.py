"""The cached frames of a video: one stored zip of JPEGs with an index, written once, read by every embedding.

Embedding always reads these, the first time too, so that a new adapter needs no second decode and the same adapter
gives the same vectors again.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from backbone import Form, to_pixels
from indexer.media import LARGEST_FRAME, DecodedVideo

# a byte that changed may name another compression, a password or a place beyond the end
UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    Image.DecompressionBombError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class DamagedFrames(ValueError):
    """The archive is not readable as cached frames."""


@dataclass(frozen=True, slots=True)
class CachedSegment:
    """`start` and `end` in seconds; `frames` are the JPEGs' names in the archive, in order of time."""

    start: float
    end: float
    frames: tuple[str, ...]


def pack_frames(video: DecodedVideo, folder: Path) -> bytes:
    """The archive of a decoded video whose JPEGs lie in `folder`; equal input gives equal bytes."""
    index = [{"start": s.start, "end": s.end, "frames": list(s.frame_files)} for s in video.segments]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo("index.json"), json.dumps({"segments": index}))
        for segment in video.segments:
            for name in segment.frame_files:
                archive.writestr(zipfile.ZipInfo(name), (folder / name).read_bytes())
    return buffer.getvalue()


class FrameArchive:
    """A video's cached frames. Raises DamagedFrames where the bytes are not such an archive."""

    def __init__(self, data: bytes) -> None:
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
            index = json.loads(self._zip.read("index.json"))
            self.segments = tuple(
                CachedSegment(float(s["start"]), float(s["end"]), tuple(s["frames"])) for s in index["segments"]
            )
        except UNREADABLE as error:
            raise DamagedFrames(f"cached frames are damaged: {error}") from error

    def check(self) -> None:
        """Reads every frame against its checksum. Raises DamagedFrames."""
        try:
            for segment in self.segments:
                for name in segment.frames:
                    self._zip.read(name)
        except UNREADABLE as error:
            raise DamagedFrames(f"cached frames are damaged: {error}") from error

    def pixels(self, names: tuple[str, ...], form: Form | int) -> NDArray[np.uint8]:
        """(len(names), 3, side, side) uint8 RGB: the backbone's input (`to_pixels`). Raises DamagedFrames."""
        try:
            return np.stack([to_pixels(self._picture(name), form) for name in names])
        except UNREADABLE as error:
            raise DamagedFrames(f"cached frames are damaged: {error}") from error

    def short_side(self) -> int:
        """Of the first frame, in pixels. Raises DamagedFrames."""
        try:
            return min(self._picture(self.segments[0].frames[0]).size)
        except (*UNREADABLE, IndexError) as error:
            raise DamagedFrames(f"cached frames are damaged: {error}") from error

    def _picture(self, name: str) -> Image.Image:
        """Not decoded yet. Raises ValueError where it is larger than any frame that the decoder caches."""
        picture = Image.open(io.BytesIO(self._zip.read(name)), formats=("JPEG",))
        if picture.width * picture.height > LARGEST_FRAME:
            raise ValueError(f"{name} has {picture.width} × {picture.height} pixels")
        return picture

    def between(self, start: float | None, end: float | None, count: int) -> tuple[str, ...]:
        """`count` frame names spread uniformly over the segments that meet [start, end] seconds (None: open)."""
        met = [s for s in self.segments if (end is None or s.start < end) and (start is None or s.end > start)] or list(
            self.segments
        )
        names = [name for segment in met for name in segment.frames]
        return tuple(names[int((i + 0.5) * len(names) / count)] for i in range(count))
