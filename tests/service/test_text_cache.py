"""The cache of text vectors: the keys, the bound in bytes, and one computation for all who ask at once."""

from __future__ import annotations

import asyncio
import threading
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbone.batcher import Batcher, BatcherFull, DeadlinePassed
from service.search.text_cache import OVERHEAD, TextCache, TextKey, TextVector, text_key

SOON = 30  # seconds; no test waits for it
KEY = text_key("tenant", "digest", "a dog runs")


def entry(value: float = 1.0, size: int = 4) -> TextVector:
    return TextVector(np.full(size, value, np.float32), False)


def never() -> TextVector:
    raise AssertionError("computed again")


def get(cache: TextCache, key: TextKey, compute: Callable[[], TextVector]) -> TextVector:
    """As a caller in a thread of its own."""

    async def run() -> TextVector:
        return compute()

    return asyncio.run(cache.get_or_run(key, run))


async def never_run() -> TextVector:
    return never()


class Crowd:
    """Callers of one key in threads of their own; the first is held while it computes, until `go` is set."""

    def __init__(self, cache: TextCache, size: int) -> None:
        self.cache, self.go, self.computing, self.calls = cache, threading.Event(), threading.Event(), 0
        self.pool = ThreadPoolExecutor(size)

    def first(self, outcome: TextVector | BaseException) -> Future[TextVector]:
        def compute() -> TextVector:
            self.calls += 1
            self.computing.set()
            assert self.go.wait(SOON)
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        future = self.pool.submit(get, self.cache, KEY, compute)
        assert self.computing.wait(SOON)
        return future

    def others(self, size: int, value: TextVector | None = None) -> list[Future[TextVector]]:
        """Waits until all of them wait for the first."""

        def compute() -> TextVector:
            self.calls += 1
            return value or never()

        futures = [self.pool.submit(get, self.cache, KEY, compute) for _ in range(size)]
        while self.cache.shared < size:
            assert not wait(futures, 0.001).done
        return futures


def test_a_key_is_the_adapter_and_the_text_without_needless_blanks() -> None:
    assert text_key("tenant", "frozen", "  a\tdog \n runs ") == text_key("tenant", "frozen", "a dog runs")
    assert text_key("tenant", "frozen", "a dog") != text_key("tenant", "digest", "a dog")
    assert text_key("tenant", "frozen", "A dog") != text_key("tenant", "frozen", "a dog")
    assert text_key("tenant", "frozen", " \t\n").text == ""


def test_an_entry_is_computed_once_and_never_serves_another_adapter() -> None:
    cache = TextCache(10_000)
    first = get(cache, KEY, entry)
    assert get(cache, KEY, never) is first
    other = get(cache, text_key("tenant", "frozen", KEY.text), lambda: entry(2))
    assert other.vector[0] == 2
    assert (cache.hits, cache.misses, cache.shared, len(cache)) == (1, 2, 0, 2)


def test_those_who_ask_at_the_same_time_get_the_one_computation() -> None:
    cache = TextCache(10_000)
    crowd = Crowd(cache, 9)
    first = crowd.first(entry())
    others = crowd.others(8)
    another = text_key("tenant", "frozen", "another")
    assert get(cache, another, entry).vector[0] == 1  # who asks for another key is not held up
    crowd.go.set()
    assert {id(f.result(SOON)) for f in (first, *others)} == {id(get(cache, KEY, never))}
    assert crowd.calls == 1
    assert (cache.misses, cache.shared) == (2, 8)


def test_a_failure_reaches_everyone_who_waited_and_is_not_kept() -> None:
    cache = TextCache(10_000)
    crowd = Crowd(cache, 4)
    futures = [crowd.first(ValueError("no such device")), *crowd.others(3)]
    crowd.go.set()
    for future in futures:
        with pytest.raises(ValueError, match="no such device"):
            future.result(SOON)
    assert crowd.calls == 1
    assert len(cache) == cache.bytes == 0
    assert get(cache, KEY, entry).vector[0] == 1


@pytest.mark.parametrize(
    "error",
    [BatcherFull("full", 1.0), DeadlinePassed(), CancelledError(), TimeoutError(), KeyboardInterrupt()],
)
def test_what_befell_one_caller_is_no_answer_for_another(error: BaseException) -> None:
    """One tenant's full queue, deadline or departure: one of those who waited computes, for all of them."""
    cache = TextCache(10_000)
    crowd = Crowd(cache, 4)
    first = crowd.first(error)
    others = crowd.others(3, entry(7))
    crowd.go.set()
    assert [f.result(SOON).vector[0] for f in others] == [7, 7, 7]
    with pytest.raises(type(error)):
        first.result(SOON)
    assert crowd.calls == 2


def test_coroutines_share_with_each_other_and_with_threads() -> None:
    cache = TextCache(10_000)

    async def ask() -> None:
        go = asyncio.Event()

        async def compute() -> TextVector:
            await go.wait()
            return entry(3)

        tasks = [asyncio.ensure_future(cache.get_or_run(KEY, compute))]
        tasks += [asyncio.ensure_future(cache.get_or_run(KEY, never_run)) for _ in range(3)]
        thread = asyncio.ensure_future(asyncio.to_thread(get, cache, KEY, never))
        while cache.shared < 4:
            await asyncio.sleep(0)
        go.set()
        answers = await asyncio.wait_for(asyncio.gather(*tasks, thread), SOON)
        assert {id(a) for a in answers} == {id(await cache.get_or_run(KEY, never_run))}

    asyncio.run(ask())
    assert (cache.misses, cache.shared, cache.hits) == (1, 4, 1)


def test_a_cancelled_task_disturbs_no_other_be_it_the_one_that_computes_or_one_that_waits() -> None:
    cache = TextCache(10_000)
    entered, opened = threading.Event(), threading.Event()

    def encode(rows: Sequence[int]) -> list[TextVector]:
        entered.set()
        assert opened.wait(SOON)
        return [entry(row) for row in rows]

    batcher: Batcher[int, TextVector] = Batcher(encode, limit=8)
    batcher.submit(0)
    assert entered.wait(SOON)

    async def ask() -> None:
        tasks = [asyncio.ensure_future(cache.get_or_run(KEY, partial(batcher.run, row))) for row in range(1, 5)]
        while cache.shared < 3:
            await asyncio.sleep(0)
        tasks[1].cancel()  # one that waits
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
        assert batcher.depth == 1
        tasks[0].cancel()  # the one that computes: its row is withdrawn, the next hands in its own
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        while not batcher.depth:
            await asyncio.sleep(0)
        opened.set()
        answers = await asyncio.wait_for(asyncio.gather(*tasks[2:]), SOON)
        assert [a.vector[0] for a in answers] == [3, 3]

    asyncio.run(ask())
    batcher.close()
    assert (batcher.rows, batcher.cancelled, cache.misses) == (2, 1, 2)


def test_a_failure_reaches_coroutines() -> None:
    cache = TextCache(10_000)

    async def ask() -> None:
        go = asyncio.Event()

        async def compute() -> TextVector:
            await go.wait()
            raise ValueError("no such device")

        tasks = [asyncio.ensure_future(cache.get_or_run(KEY, compute)) for _ in range(3)]
        while cache.shared < 2:
            await asyncio.sleep(0)
        go.set()
        answers = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), SOON)
        assert [str(a) for a in answers] == ["no such device"] * 3

    asyncio.run(ask())
    assert cache.misses == 1


@given(
    asked=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 60)), max_size=60),
    capacity=st.integers(0, 6 * (OVERHEAD + 200)),
)
def test_the_entries_used_last_are_kept_within_the_bytes(asked: list[tuple[int, int]], capacity: int) -> None:
    cache = TextCache(capacity)
    sizes: OrderedDict[int, int] = OrderedDict()  # a plain reference
    for number, dimensions in asked:
        key = text_key("tenant", "frozen", f"text {number}")
        computed: list[int] = []
        get(cache, key, lambda dims=dimensions, made=computed: made.append(1) or entry(size=dims))  # type: ignore[misc]
        assert bool(computed) == (number not in sizes)
        if computed:
            size = 4 * dimensions + key.text.__sizeof__() + OVERHEAD
            if size <= capacity:
                sizes[number] = size
            while sum(sizes.values()) > capacity:
                sizes.popitem(last=False)
        else:
            sizes.move_to_end(number)
        assert cache.bytes == sum(sizes.values()) <= capacity
        assert len(cache) == len(sizes)


def test_the_bytes_that_are_counted_are_those_that_are_taken() -> None:
    """Rows of a batch are views: to keep one as it is would keep the whole batch."""
    tracemalloc.start()
    cache, number = TextCache(1 << 30), 500
    before = tracemalloc.get_traced_memory()[0]
    for i in range(number):
        batch = np.zeros((64, 512), np.float32)
        key = text_key("tenant", str(i) * 20, f"a text of a number {i}")
        get(cache, key, partial(TextVector, batch[0], False))
    del batch
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert 0.75 * cache.bytes < taken < 1.05 * cache.bytes


def test_no_one_can_write_into_a_shared_vector() -> None:
    got = get(TextCache(10_000), KEY, entry)
    with pytest.raises(ValueError, match="read-only"):
        got.vector[0] = 5
