"""The path of a search: generation → text vector → first stage → exact rescoring → one page of hits."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from backbone import TEMPERATURE
from indexer.index import Candidate, IndexView, rescore
from service import catalog
from service.catalog import Collection, Generation, Video
from service.filters import matches
from service.runtime import Runtime

TAIL = 4096  # rows read at once when a view follows the table


class EmptyText(ValueError):
    """The text has nothing but white space."""


@dataclass(frozen=True, slots=True)
class Hit:
    """`start` and `end` in seconds; `score` is a cosine; `segment` counts from 0 within the video."""

    video: Video
    start: float
    end: float
    score: float
    segment: int


@dataclass(frozen=True, slots=True)
class Found:
    """All hits of a query that the candidates give, best first, and where they were looked for."""

    hits: Sequence[Hit]
    collection: Collection
    generation: Generation
    total_videos: int
    truncated: bool
    timings_ms: Mapping[str, float] = field(default_factory=dict)


class Searcher:
    """Answers queries; safe to use from several threads."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._texts: OrderedDict[tuple[str | None, str], tuple[NDArray[np.float32], bool]] = OrderedDict()
        self._views: OrderedDict[str, IndexView] = OrderedDict()
        self._lock = threading.Lock()

    def search(
        self,
        tenant: str,
        collection_name: str,
        text: str,
        *,
        group_by: Literal["video", "segment"] = "video",
        where: Mapping[str, Any] | None = None,
        exact: bool = True,
        wanted: int = 10,
    ) -> Found:
        """At least the best `wanted` hits, if there are so many. With `exact`, candidates are rescored over their frames.

        Raises NotFound, EmptyText, InvalidFilter, BatcherFull, OtherBackbone.
        """
        clock = _Clock()
        words = " ".join(text.split())
        if not words:
            raise EmptyText("the text is empty")
        with self._runtime.database.read() as connection:
            collection, generation = catalog.active_generation(connection, tenant, collection_name)
        clock.lap("resolve")
        query, truncated = self._text_vector(generation, words)
        clock.lap("encode")
        view = self._view(tenant, generation)
        allowed = self._allowed(tenant, collection, where)
        candidates = view.search(query, max(self._runtime.settings.candidates, 3 * wanted), allowed)
        clock.lap("search")
        if exact and candidates:
            candidates = self._rescore(tenant, generation, query, candidates)
        clock.lap("rescore")
        hits = self._hits(tenant, candidates, group_by)
        clock.lap("load")
        return Found(hits, collection, generation, view.videos, truncated, clock.timings())

    def _text_vector(self, generation: Generation, words: str) -> tuple[NDArray[np.float32], bool]:
        """(D,) unnormalised, and whether the text was cut; cached by the adapter's digest and the text."""
        adapter = self._runtime.adapter(generation)
        key = (generation.digest, words)
        with self._lock:
            if key in self._texts:
                self._texts.move_to_end(key)
                return self._texts[key]
        tokens = self._runtime.backbone.tokenize([words])
        entry = (self._runtime.texts.submit((tokens.ids[0], adapter)).result(), tokens.truncated[0])
        with self._lock:
            self._texts[key] = entry
            while len(self._texts) > self._runtime.settings.text_cache_entries:
                self._texts.popitem(last=False)
        return entry

    def _view(self, tenant: str, generation: Generation) -> IndexView:
        """The view of the generation's vectors, up to date with the table."""
        with self._lock:
            view = self._views.setdefault(generation.vector_set, IndexView(self._runtime.backbone.embed_dim))
            self._views.move_to_end(generation.vector_set)
        with self._runtime.database.read() as connection:
            while rows := catalog.segments_after(connection, tenant, generation.vector_set, view.last_seq, TAIL):
                view.apply(rows)
        with self._lock:
            while len(self._views) > 1 and sum(v.bytes for v in self._views.values()) > self._runtime.settings.view_bytes:
                self._views.popitem(last=False)
        return view

    def _allowed(self, tenant: str, collection: Collection, where: Mapping[str, Any] | None) -> set[str] | None:
        if where is None:
            return None
        with self._runtime.database.read() as connection:
            ready = catalog.videos_of(connection, tenant, collection.id, "ready")
        return {video.id for video in ready if matches(where, video)}

    def _rescore(
        self, tenant: str, generation: Generation, query: NDArray[np.float32], candidates: Sequence[Candidate]
    ) -> list[Candidate]:
        with self._runtime.database.read() as connection:
            frames = catalog.frame_vectors(connection, tenant, generation.vector_set, [c.seq for c in candidates])
        held = [c for c in candidates if c.seq in frames]  # a video may have been deleted since
        scores = rescore(query, [frames[c.seq] for c in held], TEMPERATURE)
        scored = [Candidate(c.seq, c.segment, float(s)) for c, s in zip(held, scores, strict=True)]
        return sorted(scored, key=lambda c: -c.score)

    def _hits(self, tenant: str, candidates: Sequence[Candidate], group_by: str) -> list[Hit]:
        if group_by == "video":
            best: dict[str, Candidate] = {}
            for candidate in candidates:
                best.setdefault(candidate.segment.video_id, candidate)
            candidates = list(best.values())
        with self._runtime.database.read() as connection:
            videos = catalog.videos_by_id(connection, tenant, {c.segment.video_id for c in candidates})
        return [
            Hit(videos[s.video_id], s.start, s.end, c.score, s.ordinal)
            for c in candidates
            if (s := c.segment).video_id in videos
        ]


class _Clock:
    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name] = round(1000 * (now - self._last), 3)
        self._last = now

    def timings(self) -> dict[str, float]:
        return {**self._laps, "total": round(1000 * (self._last - self._started), 3)}
