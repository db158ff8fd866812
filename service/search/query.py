"""The path of a search: generation → text vector → first stage → exact rescoring → one page of hits."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import structlog
from numpy.typing import NDArray

from adapters_store import Lease, PinsExhausted
from backbone import Tokens, rescore, threads
from backbone.batcher import DeadlinePassed
from indexer.index import Candidate, IndexView
from service.adapters.encoder import Encoder
from service.errors import PolyclipError
from service.search.filters import Filter
from service.search.frame_vectors import FrameVectors
from service.search.text_cache import TextCache, TextKey, TextVector, text_key
from service.search.views import Views
from service.storage import collection_rows
from service.storage.collection_rows import Collection
from service.storage.generation_rows import Generation
from service.storage.rows import NotFound
from service.storage.storage import Storage
from service.videos import video_rows
from service.videos.video_rows import Video

Result = TypeVar("Result")

log = structlog.get_logger()

RESOLVERS = 40  # threads that read which collection, generation and adapter a search is of
PINS_SECONDS = 60.0  # after which a search has it looked for pins of collections that are gone
WIDENED = 3  # times that further videos are looked for, each time among four times as many segments of those not named yet


class EmptyText(PolyclipError):
    """The text has nothing but white space."""

    code, status, hint = "empty_text", 422, "send a text with words"


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
    """The best hits of a query, as many as were wanted and one more, and where they were looked for; `total`: all there are."""

    hits: Sequence[Hit]
    total: int
    collection: Collection
    generation: Generation
    total_videos: int
    pending_videos: int
    truncated: bool
    timings_ms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Question:
    """What is asked, of which collection, and with which generation: adapter and vectors, read in one step."""

    tenant: str
    collection: Collection
    generation: Generation
    encoder: Encoder
    key: TextKey
    tokens: Tokens | None  # None where the text's vector is kept already


class Searcher:
    """Answers queries; safe to use from several threads and from an event loop at once."""

    def __init__(self, storage: Storage, encoder: Encoder) -> None:
        self._storage, self._encoder = storage, encoder
        self.texts = TextCache(storage.settings.text_cache_bytes)
        self.views = Views(storage, encoder)
        self.frames = FrameVectors(storage.database, storage.settings.frame_cache_bytes)
        self._threads = ThreadPoolExecutor(os.cpu_count(), "search", threads.alone)  # more would only fight for the interpreter
        self._resolvers = ThreadPoolExecutor(RESOLVERS, "resolve", threads.alone)  # its own: uploads may hold all others
        self._pinned: dict[str, str] = {}  # collection → digest that a pin was asked for
        self._pins_checked = time.monotonic()
        self._lock = threading.Lock()

    def close(self) -> None:
        for pool in (self._resolvers, self._threads):
            pool.shutdown(wait=False, cancel_futures=True)
        self.views.close()

    def search(self, tenant: str, collection_name: str, text: str, **how: Any) -> Found:
        """At least the best `wanted` hits, if there are so many; arguments as of `_find`.

        Raises NotFound, EmptyText, InvalidFilter, OtherBackbone, BatcherFull, DeadlinePassed, LeaseTimeout, TimeoutError.
        """
        return asyncio.run(self.answer(tenant, collection_name, text, **how))

    async def answer(self, tenant: str, collection_name: str, text: str, **how: Any) -> Found:
        """`search` for an event loop: a caller that is cancelled leaves no row behind, and the database and the index are
        asked on other threads.
        """
        clock = _Clock()
        question = await self._on_thread(self._resolve, tenant, collection_name, text)
        while isinstance(question, Future):  # its backbone is being loaded, which no thread waits for
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(question)), self._storage.settings.search_seconds)
            question = await self._on_thread(self._resolve, tenant, collection_name, text)
        clock.lap("resolve")
        encoded = await self.texts.get_or_run(question.key, partial(self._encode, question, clock))
        clock.lap("encode")
        given_up = threading.Event()
        find = partial(self._find, question, encoded, clock, given_up=given_up, **how)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, copy_context().run, find)
        finally:
            given_up.set()

    async def _on_thread(self, ask: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._resolvers, copy_context().run, ask, *arguments)

    def _resolve(self, tenant: str, collection_name: str, text: str) -> _Question | Future[Encoder]:
        """The question, or what has to be there first."""
        with self._storage.database.read() as connection:
            collection, generation = collection_rows.active_generation(connection, tenant, collection_name)
        key = text_key(tenant, generation.digest or generation.backbone, text)
        if not key.text:
            raise EmptyText("the text is empty")
        loading = self._encoder.request_encoder(generation.backbone)
        if not loading.done():
            return loading
        encoder = loading.result()
        self._pin(encoder, collection, generation)
        tokens = None if key in self.texts else encoder.backbone.tokenize([key.text])  # not on the event loop
        return _Question(tenant, collection, generation, encoder, key, tokens)

    async def _encode(self, question: _Question, clock: _Clock) -> TextVector:
        """The text's vector, encoded with the collection's adapter in one batch with whatever waits."""
        seconds, encoder = self._storage.settings.search_seconds, question.encoder
        tokens = question.tokens
        if tokens is None:
            tokens = await self._on_thread(encoder.backbone.tokenize, [question.key.text])
        request = encoder.request_lease(question.generation)
        try:
            lease: Lease | None = None
            if request is not None:
                lease = await asyncio.wait_for(asyncio.wrap_future(request), seconds)
            clock.lap("adapter")
            row, deadline = (tokens.ids[0], lease), time.monotonic() + seconds
            ticket = encoder.texts.submit(row, group=question.tenant, deadline=deadline)
            vector = await asyncio.wrap_future(ticket)
            clock.took("queue", ticket.queued_seconds)
            return TextVector(vector, tokens.truncated[0])
        finally:
            if request is not None:
                _give_back(request)

    def _find(
        self,
        question: _Question,
        encoded: TextVector,
        clock: _Clock,
        *,
        group_by: Literal["video", "segment"] = "video",
        where: Filter | None = None,
        exact: bool = True,
        wanted: int = 10,
        given_up: threading.Event,
    ) -> Found:
        """The hits of an encoded text. With `exact`, candidates are rescored over their frames."""
        tenant, collection, generation = question.tenant, question.collection, question.generation
        view = self.views.view(tenant, generation)
        allowed = self._allowed(tenant, collection, where, given_up)
        candidates = self._pool(view, encoded.vector, allowed, group_by)
        clock.lap("search")
        if exact and candidates:
            candidates = self._rescore(tenant, generation, encoded.vector, candidates)
        clock.lap("rescore")
        hits, total = self._hits(tenant, candidates, group_by, wanted + 1)
        with self._storage.database.read() as connection:
            pending = video_rows.pending_videos(connection, tenant, collection.id)
        clock.lap("load")
        return Found(hits, total, collection, generation, view.videos, pending, encoded.truncated, clock.timings())

    def _pin(self, encoder: Encoder, collection: Collection, generation: Generation) -> None:
        """Keeps a collection's adapter on the device where its settings ask for it."""
        wanted = generation.digest if collection.settings.get("pinned") else None
        with self._lock:
            if self._pinned and time.monotonic() - self._pins_checked > PINS_SECONDS:
                self._pins_checked = time.monotonic()
                self.views.beside(self.release_pins)
            if self._pinned.get(collection.id) == wanted:
                return
            if wanted is None:
                self._unpin(collection.id)
                return
            self._pinned[collection.id] = wanted  # where it is refused too: it is not asked for again with every search
            try:
                encoder.residency.pin(wanted, collection.id, collection.tenant_id)
            except PinsExhausted as error:
                log.warning("adapter_not_pinned", collection=collection.id, reason=str(error))

    def release_pins(self) -> None:
        """Ends the pins of collections that are gone, alone or with their tenant; what was refused may be asked for again."""
        with self._lock:
            pins = {c: owner for each in self._encoder.resident for c, owner in each.residency.pins().items()}
            self._pinned = {collection: digest for collection, digest in self._pinned.items() if collection in pins}
        for collection, tenant in pins.items():
            try:
                with self._storage.database.read() as connection:
                    collection_rows.collection_name(connection, tenant, collection)
            except NotFound:
                with self._lock:
                    self._unpin(collection)

    def _unpin(self, collection: str) -> None:
        for each in self._encoder.resident:
            each.residency.unpin(collection)
        self._pinned.pop(collection, None)

    def _allowed(self, tenant: str, collection: Collection, where: Filter | None, given_up: threading.Event) -> set[str] | None:
        """Ids of the videos that a filter lets through; None without a filter. Raises DeadlinePassed."""
        if where is None:
            return None
        allowed: set[str] = set()
        deadline = time.monotonic() + self._storage.settings.search_seconds
        with self._storage.database.read() as connection:
            for video, values in video_rows.filterable(connection, tenant, collection.id, where.metadata):
                if given_up.is_set() or time.monotonic() > deadline:
                    raise DeadlinePassed("the filter took too long")
                if where.matches(values):
                    allowed.add(video)
        return allowed

    def _pool(self, view: IndexView, query: NDArray[np.float32], allowed: set[str] | None, group_by: str) -> list[Candidate]:
        """What is ranked, the same for every page of a query: the nearest `candidates` segments; for hits by video also the
        nearest segment of further videos, up to so many videos, so that one of many segments keeps no other out.
        """
        size = k = self._storage.settings.candidates
        pool = view.search(query, k, allowed)
        named = {candidate.segment.video_id for candidate in pool}
        more = pool
        for _ in range(WIDENED if group_by == "video" else 0):
            if len(more) < k or len(named) >= size:
                break
            k *= 4
            more = view.search(query, k, allowed, without=named)
            for candidate in more:
                if candidate.segment.video_id not in named and len(named) < size:
                    named.add(candidate.segment.video_id)
                    pool.append(candidate)
        return sorted(pool, key=lambda candidate: -candidate.score)

    def _rescore(
        self, tenant: str, generation: Generation, query: NDArray[np.float32], candidates: Sequence[Candidate]
    ) -> list[Candidate]:
        frames = self.frames.get(tenant, generation.vector_set, [c.seq for c in candidates])
        held = [c for c in candidates if c.seq in frames]  # a video may have been deleted since
        scores = rescore(query, [frames[c.seq] for c in held])
        scored = [Candidate(c.seq, c.segment, float(s)) for c, s in zip(held, scores, strict=True)]
        return sorted(scored, key=lambda c: -c.score)

    def _hits(self, tenant: str, candidates: Sequence[Candidate], group_by: str, wanted: int) -> tuple[list[Hit], int]:
        """The first `wanted` hits, and the number of all; a video that has been deleted since is in neither."""
        if group_by == "video":
            best: dict[str, Candidate] = {}
            for candidate in candidates:
                best.setdefault(candidate.segment.video_id, candidate)
            candidates = list(best.values())
        hits: list[Hit] = []
        gone = taken = 0
        while len(hits) < wanted and taken < len(candidates):
            part = candidates[taken : taken + wanted]
            taken += len(part)
            with self._storage.database.read() as connection:
                videos = video_rows.videos_by_id(connection, tenant, {c.segment.video_id for c in part})
            there = [(c.segment, c.score) for c in part if c.segment.video_id in videos]
            gone += len(part) - len(there)
            hits += [Hit(videos[s.video_id], s.start, s.end, score, s.ordinal) for s, score in there]
        return hits[:wanted], len(candidates) - gone


def _give_back(request: Future[Lease]) -> None:
    """Releases a lease, or withdraws what is not granted yet."""
    if not request.cancel():
        request.add_done_callback(lambda done: None if done.exception() else done.result().release())


class _Clock:
    """Milliseconds of each stage; `took` moves a part of the stage that runs to a name of its own."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name] = self._laps.get(name, 0.0) + 1000 * (now - self._last)
        self._last = now

    def took(self, name: str, seconds: float) -> None:
        self._laps[name] = 1000 * seconds
        self._last += seconds

    def timings(self) -> dict[str, float]:
        total = 1000 * (self._last - self._started)
        return {name: round(value, 3) for name, value in {"queue": 0.0, **self._laps, "total": total}.items()}
