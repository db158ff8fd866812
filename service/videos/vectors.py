"""The vectors of a video: as rows of `segments`, as a safetensors file, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

Rows = Sequence[Mapping[str, Any]]  # ordinal, start, end, pooled, frames: as `segment_rows.add_segments` takes them


class InvalidVectors(ValueError):
    """The rows or the file cannot be the vectors of this video."""


def pack(rows: Rows, dim: int) -> bytes:
    """Checked rows of S segments and together N frames: `segments` (S, 2) in seconds, `frames_per_segment` (S,), and `pooled`
    (S, dim) and `frames` (N, dim) in float16.
    """
    frames = [np.frombuffer(row["frames"], np.float16).reshape(-1, dim) for row in rows]
    tensors: dict[str, NDArray[Any]] = {
        "segments": np.array([(row["start"], row["end"]) for row in rows], np.float64),
        "frames_per_segment": np.array([len(f) for f in frames], np.int64),
        "pooled": np.stack([np.frombuffer(row["pooled"], np.float16) for row in rows]),
        "frames": np.concatenate(frames),
    }
    return safetensors.numpy.save(tensors)


def unpack(data: bytes, dim: int, segments: Sequence[tuple[float, float, int]]) -> list[dict[str, Any]]:
    """The rows in a file from anywhere, for a video with these segments: start, end, frames. Raises InvalidVectors."""
    count, total = len(segments), sum(frames for _, _, frames in segments)
    wanted: dict[str, Any] = {
        "segments": ((count, 2), np.float64),
        "frames_per_segment": ((count,), np.int64),
        "pooled": ((count, dim), np.float16),
        "frames": ((total, dim), np.float16),
    }
    try:
        tensors = safetensors.numpy.load(data)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InvalidVectors(f"not a safetensors file of vectors: {str(error)[:100]}") from error
    if (found := {name: (t.shape, t.dtype) for name, t in tensors.items()}) != wanted:
        raise InvalidVectors(f"{count} segments of {dim} need other names, types or shapes of vectors: {found}"[:300])
    theirs = zip(tensors["segments"].tolist(), tensors["frames_per_segment"].tolist(), strict=True)
    if [(start, end, frames) for (start, end), frames in theirs] != list(segments):
        raise InvalidVectors("the vectors are not those of the cached frames")
    frames = np.split(tensors["frames"], np.cumsum(tensors["frames_per_segment"])[:-1])
    rows = [
        {"ordinal": i, "start": start, "end": end, "pooled": tensors["pooled"][i].tobytes(), "frames": frames[i].tobytes()}
        for i, (start, end, _) in enumerate(segments)
    ]
    check(rows, dim, count)
    return rows


def check(rows: Rows, dim: int, segments: int) -> None:
    """Raises InvalidVectors unless these are the rows of a video with so many segments, in order."""
    if [row["ordinal"] for row in rows] != list(range(segments)):
        raise InvalidVectors(f"there are vectors of {len(rows)} segments, the video has {segments}")
    for row in rows:
        pooled, frames = row["pooled"] or b"", row["frames"] or b""
        if len(pooled) != 2 * dim or not frames or len(frames) % (2 * dim):
            raise InvalidVectors(f"segment {row['ordinal']} has vectors of another size than {dim}")
        mean = np.frombuffer(pooled, np.float16).astype(np.float32)
        if not (np.isfinite(mean).all() and np.isfinite(np.frombuffer(frames, np.float16)).all()):
            raise InvalidVectors(f"segment {row['ordinal']} has vectors that are not finite")
        if mean.any() and abs(float(np.linalg.norm(mean)) - 1) > 0.01:
            raise InvalidVectors(f"segment {row['ordinal']} has a pooled vector that is not of length 1")
