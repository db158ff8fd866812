"""The path of a search inside one process: many adapters at once, too many at once, and callers that go away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from house import House as Workroom
from serving import new_tenant, wait_for

import adapters_store
from backbone import VOCABULARY_ROWS, Adapter, AdapterShape, AdapterStack, q_score
from backbone.batcher import BatcherFull, DeadlinePassed
from service.adapters.publish import publish
from service.cli.parts import Parts
from service.search import pins, query
from service.search.frame_vectors import FrameVectors
from service.search.query import Searcher
from service.settings import Settings
from service.storage import collection_rows, generation_rows, segment_rows, tenant_rows
from service.upkeep import delete
from service.videos import video_rows

VIDEOS, FRAMES = 20, 4


@dataclass(frozen=True, slots=True)
class Known:
    """A collection whose vectors and adapter the test knows."""

    tenant: str
    name: str
    adapter: Adapter | None
    frames: torch.Tensor  # (VIDEOS, FRAMES, D)
    digest: str | None


class House:
    """A data folder with collections of random vectors, each with an adapter of its own, and room for few of them."""

    def __init__(self, folder: Path, room: int, **settings: Any) -> None:
        self.parts = Parts.over(Settings(data=folder, threads=1, adapter_bytes=1, **settings))
        self.storage, self.encoder, self.decoders = self.parts.storage, self.parts.encoder, self.parts.decoders
        backbone = self.encoder.backbone
        size = AdapterStack.slot_bytes(backbone.dims, 16, words=VOCABULARY_ROWS, tokens=backbone.tokens)
        self.parts.close()
        limits: dict[str, Any] = {"adapter_bytes": (room + 1) * size, "adapter_max_rank": 24}
        self.parts = Parts.over(Settings(data=folder, threads=1, **limits, **settings))
        self.storage, self.encoder, self.decoders = self.parts.storage, self.parts.encoder, self.parts.decoders
        self.searcher = Searcher(self.storage, self.encoder)
        with self.storage.database.write() as connection:
            self.tenants = [tenant_rows.create_tenant(connection, name, {}) for name in ("acme", "borealis")]

    def add(self, number: int, rank: int | None = 8) -> Known:
        backbone, tenant = self.encoder.backbone, self.tenants[number % 2]
        rng = np.random.default_rng(number)
        frames = rng.normal(size=(VIDEOS, FRAMES, backbone.embed_dim)).astype(np.float16)
        pooled = frames.astype(np.float32).mean(1)
        pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
        name, digest, adapter, version = f"films-{number}", None, None, None
        with self.storage.database.write() as connection:
            collection = collection_rows.create_collection(connection, tenant, name, {}, backbone.fingerprint)
        if rank is not None:
            shape = AdapterShape(backbone.dims, rank, 8)
            tensors = {n: 20 * t for n, t in shape.initial(number).items()}
            packed = adapters_store.pack(shape, backbone.fingerprint, tensors)
            manifest = adapters_store.describe(packed)
            version = publish(self.storage, self.encoder, tenant.id, collection.id, packed, manifest).id
            adapter, digest = shape.assemble(tensors), manifest.digest
        with self.storage.database.write() as connection:
            generation = collection.active_generation_id
            if version is not None:
                row = generation_rows.add_generation(
                    connection, tenant.id, collection.id, version, backbone.fingerprint, None, "building"
                )
                generation = row["id"]
                collection_rows.switch(connection, tenant.id, collection.id, generation)
            for i in range(VIDEOS):
                video = f"vid_{number}_{i}"
                video_rows.add_video(connection, tenant.id, collection.id, video, f"{i}.mp4", video, 1, {}, [])
                video_rows.set_video(connection, tenant.id, video, status="ready", media={"duration": 5.0})
                row = {"ordinal": 0, "start": 0.0, "end": 5.0, "frames": frames[i].tobytes()}
                row["pooled"] = pooled[i].astype(np.float16).tobytes()
                segment_rows.add_segments(connection, tenant.id, video, generation, [row])
        return Known(tenant.id, name, adapter, torch.from_numpy(frames.astype(np.float32)), digest)

    def expected(self, known: Known, text: str) -> list[float]:
        """Scores of all its videos, best first, encoded alone with the adapter as a plain argument."""
        backbone = self.encoder.backbone
        with torch.inference_mode():
            query = backbone.encode_text(backbone.tokenize([text]).ids, known.adapter)
            return sorted(q_score(query, known.frames)[0].tolist(), reverse=True)

    async def scores(self, known: Known, text: str) -> list[float]:
        found = await self.searcher.answer(known.tenant, known.name, text, wanted=VIDEOS)
        assert {hit.video.collection_id for hit in found.hits} == {found.collection.id}
        return [hit.score for hit in found.hits]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path / "data", room=3)
    yield made
    made.parts.close()


def test_a_storm_of_queries_over_more_adapters_than_there_is_room_for(house: House) -> None:
    """Ranks differ, one is too large for the stack, one collection has no adapter; loads and evictions go on all the while."""
    known = [house.add(n, rank) for n, rank in enumerate([8, 4, 16, 8, None, 2, 24, 8, 8, 3])]
    rng = np.random.default_rng(0)
    asked = [(known[rng.integers(len(known))], f"a {word} ball {rng.integers(40)}") for word in ["red", "blue"] * 60]

    async def storm() -> list[list[float]]:
        return await asyncio.gather(*(house.scores(*question) for question in asked))

    for question, got in zip(asked, asyncio.run(storm()), strict=True):
        assert got == pytest.approx(house.expected(*question), abs=1e-4)
    counters = house.encoder.residency.counters
    assert counters.evictions > 0 and counters.failures == 0
    assert set(house.encoder.residency.states().values()) <= {"inactive", "offloaded"}, "every lease was given back"


def test_queries_of_several_threads_share_batches(house: House) -> None:
    known = [house.add(n) for n in range(3)]
    house.searcher.search(known[0].tenant, known[0].name, "warm up")
    before = house.encoder.texts.batches
    with ThreadPoolExecutor(2 * query.RESOLVERS) as pool:  # each with an event loop of its own
        asked = [(known[i % 3], f"text number {i}") for i in range(2 * query.RESOLVERS)]
        found = list(pool.map(lambda q: house.searcher.search(q[0].tenant, q[0].name, q[1], wanted=VIDEOS), asked))
    for question, answer in zip(asked, found, strict=True):
        assert [hit.score for hit in answer.hits] == pytest.approx(house.expected(*question), abs=1e-4)
        assert {"queue", "encode", "search", "rescore", "total"} <= set(answer.timings_ms)
    assert house.encoder.texts.batches - before < len(asked)


def test_the_same_text_is_encoded_once_for_an_adapter_and_anew_for_another(house: House) -> None:
    first, second = house.add(0), house.add(2)
    for _ in range(3):
        house.searcher.search(first.tenant, first.name, "a red  ball ")
        house.searcher.search(first.tenant, first.name, "a red ball")
    assert (house.searcher.texts.misses, house.searcher.texts.hits) == (1, 5)
    house.searcher.search(second.tenant, second.name, "a red ball")
    assert house.searcher.texts.misses == 2


def test_a_caller_that_goes_away_leaves_nothing_behind(house: House) -> None:
    known = house.add(0)
    batcher, started = house.encoder.texts, []

    async def leave() -> None:
        task = asyncio.create_task(house.scores(known, "never mind"))
        while not house.encoder.residency.states():
            await asyncio.sleep(0.001)
        started.append(time.monotonic())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    assert house.searcher.search(known.tenant, known.name, "never mind").hits, "the next one computes it"
    assert batcher.depth == 0
    assert "active" not in house.encoder.residency.states().values()


def test_a_pinned_collection_keeps_its_adapter_on_the_device(house: House) -> None:
    known = [house.add(n) for n in range(6)]
    with house.storage.database.write() as connection:
        collection = collection_rows.collection_named(connection, known[0].tenant, known[0].name)
        collection_rows.change_collection(connection, known[0].tenant, collection.id, {"pinned": True})
    for each in known:
        house.searcher.search(each.tenant, each.name, "a red ball")
    states = house.encoder.residency.states()
    assert states[str(known[0].digest)] == "active"
    assert sorted(states.values()).count("offloaded") == 3
    with house.storage.database.write() as connection:
        collection_rows.change_collection(connection, known[0].tenant, collection.id, {})
    house.searcher.search(known[0].tenant, known[0].name, "a red ball")
    assert house.encoder.residency.states()[str(known[0].digest)] == "inactive"


@pytest.mark.parametrize("whole_tenant", [False, True])
def test_pins_end_with_their_collection_and_with_their_tenant(
    house: House, whole_tenant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, other = house.add(0), house.add(1)
    with house.storage.database.write() as connection:
        collection = collection_rows.collection_named(connection, known.tenant, known.name)
        collection_rows.change_collection(connection, known.tenant, collection.id, {"pinned": True})
    house.searcher.search(known.tenant, known.name, "a red ball")
    assert list(house.encoder.residency.pins()) == [collection.id]
    with house.storage.database.write() as connection:
        if whole_tenant:
            delete.delete_tenant(connection, known.tenant)
        else:
            delete.delete_collection(connection, known.tenant, collection.id)
    monkeypatch.setattr(pins, "PINS_SECONDS", 0.0)
    house.searcher.search(other.tenant, other.name, "a red ball")  # any search has it looked for
    wait_for("the pin's end", lambda: not house.encoder.residency.pins())


def test_what_waits_too_long_and_what_finds_no_room_is_refused(tmp_path: Path) -> None:
    house = House(tmp_path / "data", room=3, queue_texts=2, search_seconds=0.2)
    known = house.add(0, rank=None)
    backbone, encode = house.encoder.backbone, house.encoder.backbone.encode_text

    def slow(*arguments: Any, **options: Any) -> torch.Tensor:
        time.sleep(0.5)
        return encode(*arguments, **options)

    backbone.encode_text = slow  # type: ignore[method-assign]

    async def crowd() -> list[Any]:
        asked = (house.scores(known, f"text {i}") for i in range(6))
        return await asyncio.gather(*asked, return_exceptions=True)

    outcomes = asyncio.run(crowd())
    kinds = {type(outcome) for outcome in outcomes}
    assert list in kinds and BatcherFull in kinds and kinds <= {list, BatcherFull, DeadlinePassed}
    assert all(o.retry_after > 0 for o in outcomes if isinstance(o, BatcherFull))
    house.parts.close()


def test_frame_vectors_are_read_once_and_kept_within_their_bytes(house: House) -> None:
    known = house.add(0)
    with house.storage.database.read() as connection:
        _, generation = collection_rows.active_generation(connection, known.tenant, known.name)
        seqs = [row["seq"] for row in segment_rows.segments_after(connection, known.tenant, generation.vector_set, 0, 100)]
    row = known.frames[0].numel() * 2
    cache = FrameVectors(house.storage.database, 3 * row)
    kept = cache.get(known.tenant, generation.vector_set, seqs[:2])
    assert list(kept) == seqs[:2] and cache.bytes == 2 * row
    with house.storage.database.write() as connection:
        video_rows.mark_video_deleted(connection, known.tenant, "vid_0_0")  # its rows are gone from the table
    assert list(cache.get(known.tenant, generation.vector_set, seqs[:3])) == seqs[:3], "two from memory, one read"
    cache.get(known.tenant, generation.vector_set, seqs[2:5])
    assert cache.bytes == 3 * row, "the least recently used are forgotten"
    assert list(cache.get(known.tenant, generation.vector_set, seqs[:2])) == seqs[1:2], "the deleted one is nowhere now"


def test_a_video_deleted_behind_the_index_is_in_no_page_and_in_no_total(house: House) -> None:
    known = house.add(0)
    first = house.searcher.search(known.tenant, known.name, "a red ball", wanted=5)
    assert (len(first.hits), first.total) == (6, VIDEOS), "one more than wanted tells that there is a next page"
    best = first.hits[0].video.id
    with house.storage.database.write() as connection:
        video_rows.set_video(connection, known.tenant, best, deleted_at="2026-01-01T00:00:00Z")  # no tombstone yet
    again = house.searcher.search(known.tenant, known.name, "a red ball", wanted=5)
    assert [hit.video.id for hit in again.hits] == [hit.video.id for hit in first.hits[1:]] + [again.hits[-1].video.id]
    assert (len(again.hits), again.total) == (6, VIDEOS - 1)


def test_a_text_that_another_tenant_has_searched_is_encoded_anew(client: Any) -> None:
    texts, text = client.app.state.services.searcher.texts, "a text that two tenants search"
    for _ in range(2):
        searcher = new_tenant(client)
        films = searcher.collection()
        before = texts.misses
        for _ in range(2):
            searcher.search(films, text)
        assert texts.misses == before + 1


def test_a_video_of_many_segments_keeps_no_other_out_and_pages_are_of_one_list(tmp_path: Path) -> None:
    with Workroom(tmp_path / "data", candidates=20, segment_seconds=1.0) as house:
        collection = house.add_collection("films")
        names = {house.add_video(collection, 0, seconds=120.0).id, *(house.add_video(collection, n).id for n in range(1, 12))}
        with closing(Searcher(house.storage, house.encoder)) as searcher:
            for text in ("a red ball", "night", "colour number 0"):
                found = searcher.search(house.tenant.id, "films", text, wanted=50)
                assert {hit.video.id for hit in found.hits} == names
                assert found.total == len(found.hits) == 12
                for how in ({}, {"group_by": "segment"}, {"group_by": "segment", "exact": False}):
                    whole = searcher.search(house.tenant.id, "films", text, wanted=200, **how)
                    order = [(hit.video.id, hit.segment) for hit in whole.hits]
                    assert len(set(order)) == len(order) == whole.total
                    assert [hit.score for hit in whole.hits] == sorted((hit.score for hit in whole.hits), reverse=True)
                    for wanted in (1, 3, 7, 20):
                        page = searcher.search(house.tenant.id, "films", text, wanted=wanted, **how)
                        assert [(hit.video.id, hit.segment) for hit in page.hits] == order[: wanted + 1]
                        assert page.total == whole.total
