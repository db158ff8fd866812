"""What a video is sampled with and what comes of it: values only, so that whoever reads them imports no decoder."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

Decoder = Literal["pyav", "decord", "auto"]
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
