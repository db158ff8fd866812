"""The path of a search: generation → one vector of what is asked → first stage → exact rescoring → one page of hits."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

from backbone import rescore, threads
from indexer.index import Candidate, IndexView
from service.adapters.encoder import Encoder
from service.errors import PolyclipError
from service.search.allowed import Allowed, nearest
from service.search.clock import Clock
from service.search.filters import Filter
from service.search.frame_vectors import FrameVectors
from service.search.pins import Pins
from service.search.question import Asked, GenerationUnusable, Question, Vector, combined, resolve
from service.search.text_cache import TextCache, TextKey, TextVector
from service.search.together import Together
from service.search.views import Views
from service.storage import collection_rows
from service.storage.generation_rows import Generation
from service.storage.storage import Storage
from service.videos import video_rows
from service.videos.video_rows import Video

Result = TypeVar("Result")
SortBy = Literal["score", "created_at", "filename", "duration"]

RESOLVERS = 40  # threads that read which collection, generation and adapter a search is of
MOST_TOGETHER = 256  # of queries that are answered together
WIDENED = 3  # times that further videos are looked for, each time among four times as many segments of those not named yet


class TooManyTexts(PolyclipError):
    """The queries that are to be answered together have more texts than are taken at once."""

    code, status, hint = "too_many_texts", 422, "send fewer queries in one request"


@dataclass(frozen=True, slots=True)
class Hit:
    """`start` and `end` in seconds; `score` is a cosine, `rank` by it from 1; `segment` counts from 0 within the video."""

    rank: int
    video: Video
    start: float
    end: float
    score: float
    segment: int


@dataclass(frozen=True, slots=True)
class Found:
    """The first hits of a query, as many as were wanted and one more, and where they were looked for; `total`: all there are.

    `lacking_videos`: ready ones without vectors in the generation, where that is not the active one.
    """

    hits: Sequence[Hit]
    total: int
    collection: collection_rows.Collection
    generation: Generation
    encoder: Encoder
    total_videos: int
    pending_videos: int
    lacking_videos: int
    truncated: bool
    timings_ms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Query:
    """What is asked of a collection by its name, and how it is to be answered: arguments of `Searcher.answer`."""

    collection: str
    asked: Asked
    how: Mapping[str, Any]


class Searcher:
    """Answers queries; safe to use from several threads and from an event loop at once."""

    def __init__(self, storage: Storage, encoder: Encoder) -> None:
        self._storage, self._encoder = storage, encoder
        self.texts = TextCache(storage.settings.text_cache_bytes)
        self.views = Views(storage, encoder)
        self.frames = FrameVectors(storage.database, storage.settings.frame_cache_bytes)
        self._threads = ThreadPoolExecutor(os.cpu_count(), "search", threads.alone)  # more would only fight for the interpreter
        self._resolvers = ThreadPoolExecutor(RESOLVERS, "resolve", threads.alone)  # its own: uploads may hold all others
        self._pins = Pins(storage, encoder, self.views.beside)

    def close(self) -> None:
        for pool in (self._resolvers, self._threads):
            pool.shutdown(wait=False, cancel_futures=True)
        self.views.close()

    def search(self, tenant: str, collection_name: str, asked: str | Asked, **how: Any) -> Found:
        """At least the best `wanted` hits, if there are so many; arguments as of `_find`.

        Raises what `resolve` does, NothingLeft, BatcherFull, DeadlinePassed, LeaseTimeout, TimeoutError.
        """
        return asyncio.run(self.answer(tenant, collection_name, asked, **how))

    async def answer(self, tenant: str, collection_name: str, asked: str | Asked, **how: Any) -> Found:
        """`search` for an event loop: a caller that is cancelled leaves no row behind, and the database and the index are
        asked on other threads.
        """
        clock = Clock()
        query = Query(collection_name, Asked((asked,)) if isinstance(asked, str) else asked, how)
        resolved = await self._on_thread(self._resolve, tenant, query)
        return await self._answered(tenant, query, resolved, clock, Together() if len(query.asked.every_text) > 1 else None)

    async def answer_all(self, tenant: str, queries: Sequence[Query]) -> list[Found | BaseException]:
        """An answer to each query, or what it raised; their texts in one forward, their hits looked for one after the other.

        Raises TooManyTexts.
        """
        if (count := sum(len(query.asked.every_text) for query in queries)) > MOST_TOGETHER:
            raise TooManyTexts(f"the queries have {count} texts: at most {MOST_TOGETHER} are taken at once")

        def resolve_each() -> list[Question | Future[Encoder] | Exception]:
            found: list[Question | Future[Encoder] | Exception] = []
            for query in queries:
                try:
                    found.append(self._resolve(tenant, query))
                except Exception as error:
                    found.append(error)
            return found

        clocks, together, turn = [Clock() for _ in queries], Together(), asyncio.Semaphore(1)
        resolved = await self._on_thread(resolve_each)
        answers = (self._answered(tenant, *each, together, turn) for each in zip(queries, resolved, clocks, strict=True))
        return await asyncio.gather(*answers, return_exceptions=True)

    async def _answered(
        self,
        tenant: str,
        query: Query,
        resolved: Question | Future[Encoder] | Exception,
        clock: Clock,
        together: Together | None = None,
        turn: asyncio.Semaphore | None = None,
    ) -> Found:
        while isinstance(resolved, Future):  # its backbone is being loaded, which no thread waits for
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(resolved)), self._storage.settings.search_seconds)
            resolved = await self._on_thread(self._resolve, tenant, query)
        if isinstance(resolved, Exception):
            raise resolved
        clock.lap("resolve")
        encoded = await self._encode(resolved, clock, together)
        clock.lap("encode")
        given_up = threading.Event()
        find = partial(self._find, resolved, encoded, clock, given_up=given_up, **query.how)
        try:
            async with turn or nullcontext():
                return await asyncio.get_running_loop().run_in_executor(self._threads, copy_context().run, find)
        finally:
            given_up.set()

    async def _on_thread(self, ask: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._resolvers, copy_context().run, ask, *arguments)

    def _resolve(self, tenant: str, query: Query) -> Question | Future[Encoder]:
        """The question, or what has to be there first."""
        question = resolve(self._storage, self._encoder, self.texts, tenant, query.collection, query.asked)
        if isinstance(question, Question) and question.active:
            self._pins.keep(question.encoder, question.collection, question.generation)
        return question

    async def _encode(self, question: Question, clock: Clock, together: Together | None) -> TextVector:
        """The one vector of what is asked; of texts that are not kept and of a picture, in one batch with whatever waits."""
        waiting = [self.texts.get_or_run(k, partial(self._encode_text, question, k, clock, together)) for k in question.keys]
        picture = None if question.pixels is None else asyncio.ensure_future(self._encode_picture(question))
        try:
            texts = [await waiting[0]] if len(waiting) == 1 else await asyncio.gather(*waiting)
            frames = question.frames if picture is None else await picture
        finally:
            if picture is not None:
                picture.cancel()
        vector = combined(question, [text.vector for text in texts], frames)
        return TextVector(vector, any(text.truncated for text in texts))

    async def _encode_text(self, question: Question, key: TextKey, clock: Clock, together: Together | None) -> TextVector:
        encoder, tokens, seconds = question.encoder, question.tokens.get(key), self._storage.settings.search_seconds
        if tokens is None:
            tokens = await self._on_thread(encoder.backbone.tokenize, [key.text])
        async with encoder.leased(question.generation, seconds) as lease:
            clock.lap("adapter")
            row, deadline = (tokens.ids[0], lease), time.monotonic() + seconds
            if together is None:
                ticket = encoder.texts.submit(row, group=question.tenant, deadline=deadline)
            else:
                ticket = await together.submit(encoder.texts, row, question.tenant, deadline)
            vector = await asyncio.wrap_future(ticket)
            clock.took("queue", ticket.queued_seconds)
            return TextVector(vector, tokens.truncated[0])

    async def _encode_picture(self, question: Question) -> Vector:
        """(1, D): the picture as a frame, with the adapter that made the vectors that are searched."""
        assert question.pixels is not None
        seconds = self._storage.settings.search_seconds
        async with question.encoder.leased(question.maker, seconds) as lease:
            row, deadline = (question.pixels, lease), time.monotonic() + seconds
            return await question.encoder.frames.run(row, group=question.tenant, weight=len(question.pixels), deadline=deadline)

    def _find(
        self,
        question: Question,
        encoded: TextVector,
        clock: Clock,
        *,
        group_by: Literal["video", "segment"] = "video",
        where: Filter | None = None,
        exact: bool = True,
        wanted: int = 10,
        sort_by: SortBy = "score",
        descending: bool = False,
        given_up: threading.Event,
    ) -> Found:
        """The hits of a vector. With `exact`, candidates are rescored over their frames. `sort_by` gives the hits that were
        found another order, of `descending` or ascending values; by score the best is always first.
        """
        tenant, collection, generation = question.tenant, question.collection, question.generation
        view = self.views.view(tenant, generation)
        lacking = 0 if question.active else self._lacking(question, view)
        allowed = None
        if where is not None:
            seconds = self._storage.settings.search_seconds
            allowed = Allowed(self._storage.database, tenant, collection.id, where, given_up, seconds)
        candidates = self._pool(view, encoded.vector, allowed, group_by, question.left_out)
        clock.lap("search")
        if exact and candidates:
            candidates = self._rescore(tenant, generation, encoded.vector, candidates)
        clock.lap("rescore")
        everything = sort_by != "score"
        hits, total = self._hits(tenant, candidates, group_by, len(candidates) if everything else wanted + 1)
        if everything:
            hits = in_order(hits, sort_by, descending)[: wanted + 1]
        with self._storage.database.read() as connection:
            pending = video_rows.pending_videos(connection, tenant, collection.id)
        clock.lap("load")
        told = (view.videos, pending, lacking, encoded.truncated, clock.timings())
        return Found(hits, total, collection, generation, question.encoder, *told)

    def _lacking(self, question: Question, view: IndexView) -> int:
        """How many ready videos have no vectors in a generation that is not the active one. Raises GenerationUnusable."""
        with self._storage.database.read() as connection:
            ready = video_rows.ready_videos(connection, question.tenant, question.collection.id)
        if ready and not view.videos:
            raise GenerationUnusable(f"generation {question.generation.id} holds no vectors")
        return max(0, ready - view.videos)

    def _pool(
        self, view: IndexView, query: Vector, allowed: Allowed | None, group_by: str, left_out: Collection[str] = ()
    ) -> list[Candidate]:
        """What is ranked, the same for every page of a query: the nearest `candidates` segments; for hits by video also the
        nearest segment of further videos, up to so many videos, so that one of many segments keeps no other out.
        """
        size = k = self._storage.settings.candidates
        pool = nearest(view, query, k, allowed, left_out)
        named = {candidate.segment.video_id for candidate in pool}
        more = pool
        for _ in range(WIDENED if group_by == "video" else 0):
            if len(more) < k or len(named) >= size:
                break
            k *= 4
            more = nearest(view, query, k, allowed, named.union(left_out))
            for candidate in more:
                if candidate.segment.video_id not in named and len(named) < size:
                    named.add(candidate.segment.video_id)
                    pool.append(candidate)
        return sorted(pool, key=lambda candidate: -candidate.score)

    def _rescore(self, tenant: str, generation: Generation, query: Vector, candidates: Sequence[Candidate]) -> list[Candidate]:
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
            hits += [
                Hit(rank, videos[s.video_id], s.start, s.end, score, s.ordinal)
                for rank, (s, score) in enumerate(there, start=len(hits) + 1)
            ]
        return hits[:wanted], len(candidates) - gone


def in_order(hits: Sequence[Hit], sort_by: SortBy, descending: bool) -> list[Hit]:
    """Hits by something else than their rank, which decides between equals; those that lack it come last."""

    def value(hit: Hit) -> Any:
        if sort_by == "duration":
            return (hit.video.media or {}).get("duration")
        return hit.rank if sort_by == "score" else getattr(hit.video, sort_by)

    told = sorted((hit for hit in hits if value(hit) is not None), key=value, reverse=descending)
    return told + [hit for hit in hits if value(hit) is None]
