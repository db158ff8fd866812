"""The FAISS view of a vector set: rows of the database followed by sequence number, and the exact second stage.

A view holds the pooled vector of every live segment and can be thrown away and rebuilt at any time. It never sees torch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

TOMBSTONE = -1


def use_one_thread() -> None:
    """For this process: a flat search reads memory, which a second thread does not do faster (42 ms to 73, 200,000 × 512)."""
    faiss.omp_set_num_threads(1)


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a video in seconds; `ordinal` counts the video's segments from 0."""

    video_id: str
    ordinal: int
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """A segment that the first stage found; `score` is the cosine of the pooled vector."""

    seq: int
    segment: Segment
    score: float


class IndexView:
    """Exact inner-product search over pooled vectors; safe to use from several threads.

    `last_seq` is the sequence number up to which the rows have been applied.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.last_seq = 0
        self._index = faiss.IndexFlatIP(dim)
        self._seqs: list[int] = []  # row of the FAISS index → sequence number
        self._rows: dict[str, list[int]] = {}  # video → its live rows
        self._segments: dict[int, Segment] = {}  # live row → segment
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of live segments."""
        return len(self._segments)

    @property
    def videos(self) -> int:
        """Number of videos with live segments."""
        return len(self._rows)

    @property
    def bytes(self) -> int:
        """Memory of the vectors and, roughly, of the bookkeeping."""
        return self._index.ntotal * (self.dim * 4 + 300)

    def apply(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Follows rows of the table `segments` in order; rows seen before are passed over."""
        with self._lock:
            vectors = []
            for row in rows:
                if row["seq"] <= self.last_seq:
                    continue
                self.last_seq = row["seq"]
                if row["ordinal"] == TOMBSTONE:
                    for dead in self._rows.pop(row["video_id"], []):
                        del self._segments[dead]
                    continue
                position = len(self._seqs)
                self._seqs.append(row["seq"])
                self._rows.setdefault(row["video_id"], []).append(position)
                self._segments[position] = Segment(row["video_id"], row["ordinal"], row["start"], row["end"])
                vectors.append(np.frombuffer(row["pooled"], dtype=np.float16).astype(np.float32))
            if vectors:
                self._index.add(np.stack(vectors))

    def search(self, query: NDArray[np.float32], k: int, videos: set[str] | None = None) -> list[Candidate]:
        """The k live segments nearest to `query` (D,), best first; with `videos`, only of these."""
        norm = float(np.linalg.norm(query))
        with self._lock:
            if videos is None:
                allowed = None if len(self._segments) == len(self._seqs) else list(self._segments)
            else:
                allowed = [row for video in videos for row in self._rows.get(video, ())]
            live = len(self._segments) if allowed is None else len(allowed)
            if not live or not norm:
                return []
            params = None
            if allowed is not None:
                selector = faiss.IDSelectorBatch(np.asarray(allowed, dtype=np.int64))
                params = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
            scores, found = self._index.search((query / norm)[None].astype(np.float32), min(k, live), params=params)
            return [
                Candidate(self._seqs[row], self._segments[row], float(score))
                for row, score in zip(found[0], scores[0], strict=True)
                if row >= 0
            ]


def rescore(query: NDArray[np.float32], frames: Sequence[bytes], temperature: float) -> NDArray[np.float32]:
    """Exact text-conditioned similarity of `query` (D,) with each segment's stored frame vectors, (len(frames),).

    Semantics: `backbone.q_score` of one text, over (F, D) float16 frames; F may differ from segment to segment.
    """
    dim = len(query)
    scores = np.empty(len(frames), dtype=np.float32)
    norm = np.linalg.norm(query)
    for i, raw in enumerate(frames):
        vectors = np.frombuffer(raw, dtype=np.float16).reshape(-1, dim).astype(np.float32)  # (F, D)
        dots = vectors @ query
        weights = np.exp((dots - dots.max()) / temperature)
        pooled = (weights / weights.sum()) @ vectors
        scores[i] = pooled @ query / max(float(norm * np.linalg.norm(pooled)), 1e-12)
    return scores
