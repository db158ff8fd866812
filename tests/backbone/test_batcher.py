"""The micro-batcher: which rows share a batch, who waits for whom, and that no caller ever waits for ever.

Why it does not hold a batch back for more rows: measured with an encoder that sleeps for a + b·rows, closed-loop clients
with 0.05 or 0.2 ms of work of their own between queries (and 5 ms of thinking in some), medians of five paired runs on two
busy cores. Holding up to min(2 ms, a quarter of the last batch) until as many rows were there as in the last batch gave,
in queries/s against no hold: 1 client 0.99 to 1.02; 8 clients 0.92 to 1.07, but 1.30 at a = 4, b = 0.05 ms and callers that
come back within 0.05 ms; 32 clients 0.89 to 1.04. Up to min(0.5 ms, a tenth): 8 clients 0.97 to 1.03 (1.34 in that one case),
32 clients 0.84 to 0.94. Without a hold the callers' own work overlaps the encoding of the others' rows; with it, it does not.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, wait
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import backbone.batcher
from backbone.batcher import SIZES, Batcher, BatcherClosed, BatcherFailed, BatcherFull, DeadlinePassed, Ticket

SOON = 30  # seconds; no test waits for it


class Gate:
    """An encoder that doubles numbers, but only once it is opened; `batches` as they came, `entered` from the first on."""

    def __init__(self, check: Callable[[Sequence[int]], None] = lambda rows: None) -> None:
        self.batches: list[list[int]] = []
        self.entered, self.opened = threading.Event(), threading.Event()
        self._check = check

    def __call__(self, rows: Sequence[int]) -> list[int]:
        self.batches.append(list(rows))
        self.entered.set()
        assert self.opened.wait(SOON)
        self._check(rows)
        return [2 * row for row in rows]


def held(gate: Callable[[Sequence[Any]], Sequence[Any]], **options: Any) -> tuple[Batcher[int, int], Ticket[int]]:
    """A batcher that is encoding the row -1, so that all that is submitted now waits."""
    batcher: Batcher[int, int] = Batcher(gate, **{"limit": 8, **options})
    first = batcher.submit(-1)
    assert gate.entered.wait(SOON)  # type: ignore[attr-defined]
    return batcher, first


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The batcher's clock, moved by hand."""

    class Clock:
        now = 1000.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(backbone.batcher, "time", clock)
    yield clock


def test_a_lone_row_starts_at_once_and_rows_that_wait_are_encoded_together() -> None:
    gate = Gate()
    batcher, first = held(gate)  # `held` returns as the first row is being encoded, alone
    waiting = [batcher.submit(i) for i in range(12)]
    assert batcher.depth == 12
    gate.opened.set()
    assert [f.result(SOON) for f in [first, *waiting]] == [2 * i for i in range(-1, 12)]
    assert [len(rows) for rows in gate.batches] == [1, 8, 4]
    assert batcher.depth == 0
    assert batcher.close()


def test_a_batch_is_full_by_weight_and_a_row_over_the_limit_runs_alone() -> None:
    gate = Gate()
    batcher, _ = held(gate)
    futures = [batcher.submit(weight, weight=weight) for weight in (3, 5, 1, 20, 7, 1)]
    gate.opened.set()
    wait(futures, SOON)
    assert gate.batches[1:] == [[3, 5], [1], [20], [7, 1]]
    batcher.close()
    with pytest.raises(ValueError, match="weight"):
        batcher.submit(1, weight=0)


def test_a_tenant_with_a_thousand_rows_delays_the_row_of_another_by_one_batch() -> None:
    gate = Gate()
    batcher, _ = held(gate, limit=8)
    noisy = [batcher.submit(i, group="noisy") for i in range(1000)]
    quiet = batcher.submit(5000, group="quiet")
    gate.opened.set()
    assert quiet.result(SOON) == 10000
    assert 5000 in gate.batches[1]
    assert [f.result(SOON) for f in noisy] == [2 * i for i in range(1000)]
    assert quiet.batch_rows == 8
    batcher.close()


def test_the_turn_goes_on_from_batch_to_batch() -> None:
    """With more groups than a batch has rows, each is served once before any is served twice."""
    gate = Gate()
    batcher, _ = held(gate, limit=3)
    futures = [batcher.submit(10 * group + i, group=str(group)) for group in range(5) for i in range(2)]
    gate.opened.set()
    wait(futures, SOON)
    assert gate.batches[1:] == [[0, 10, 20], [30, 40, 1], [11, 21, 31], [41]]
    batcher.close()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 6)), max_size=30),
    limit=st.integers(1, 8),
    cancelled=st.sets(st.integers(0, 29)),
)
def test_every_batch_is_the_next_round_of_the_groups(rows: list[tuple[str, int]], limit: int, cancelled: set[int]) -> None:
    gate = Gate()
    batcher, _ = held(gate, limit=limit)
    futures = [batcher.submit(i, group=group, weight=weight) for i, (group, weight) in enumerate(rows)]
    for i in cancelled & set(range(len(rows))):
        assert futures[i].cancel()
    # A plain reference: turns in the order in which the groups came, withdrawn rows passed over.
    left = {group: [i for i, row in enumerate(rows) if row[0] == group and i not in cancelled] for group, _ in rows}
    turns, expected = [group for group in left if left[group]], []
    while turns:
        batch: list[int] = []
        while turns and (not batch or sum(rows[i][1] for i in batch) + rows[left[turns[0]][0]][1] <= limit):
            batch.append(left[turns[0]].pop(0))
            group = turns.pop(0)
            if left[group]:
                turns.append(group)
        expected.append(batch)
    gate.opened.set()
    assert batcher.close(SOON)
    assert gate.batches[1:] == expected
    assert [f.result(0) for i, f in enumerate(futures) if i not in cancelled] == [
        2 * i for i in range(len(rows)) if i not in cancelled
    ]
    assert batcher.depth == 0


def test_a_full_queue_refuses_over_all_and_of_one_group() -> None:
    gate = Gate()
    batcher, _ = held(gate, capacity=3, group_capacity=2)
    kept = [batcher.submit(i, group="a") for i in range(2)]
    with pytest.raises(BatcherFull, match="2 of them yours"):
        batcher.submit(2, group="a")
    kept.append(batcher.submit(3, group="b"))
    with pytest.raises(BatcherFull, match="3 rows are waiting") as refused:
        batcher.submit(4, group="c")
    assert refused.value.retry_after == 1.0  # no batch has ended yet: no pace is known
    assert batcher.refused == 2
    gate.opened.set()
    assert [f.result(SOON) for f in kept] == [0, 2, 6]
    batcher.close()


def test_who_is_refused_learns_when_the_queue_will_have_drained(clock: Any) -> None:
    gate = Gate()

    def encode(rows: Sequence[int]) -> Sequence[int]:
        results = gate(rows)
        clock.now += 0.5 * len(rows)
        return results

    batcher: Batcher[int, int] = Batcher(encode, limit=4, capacity=3)
    first = batcher.submit(-1)
    assert gate.entered.wait(SOON)
    gate.opened.set()
    first.result(SOON)
    gate.entered.clear()
    gate.opened.clear()
    batcher.submit(0)
    assert gate.entered.wait(SOON)
    for i in range(3):
        batcher.submit(i)
    with pytest.raises(BatcherFull) as refused:
        batcher.submit(9)
    assert refused.value.retry_after == pytest.approx(4 * 0.5)  # three that wait, one that runs
    gate.opened.set()
    assert batcher.close(SOON)


def test_a_row_whose_deadline_passes_while_it_waits_is_not_encoded(clock: Any) -> None:
    gate = Gate()
    batcher, _ = held(gate, limit=2)
    late = [batcher.submit(i, deadline=clock.now + 1) for i in range(5)]
    timely = [batcher.submit(i, deadline=deadline) for i, deadline in ((7, clock.now + 3), (8, None))]
    clock.now += 2
    gate.opened.set()
    assert [f.result(SOON) for f in timely] == [14, 16]
    for future in late:
        with pytest.raises(DeadlinePassed, match=r"waited for 2\.000 s"):
            future.result(SOON)
    assert gate.batches == [[-1], [7, 8]]
    assert batcher.expired == 5
    batcher.close()


def test_a_batch_of_expired_rows_alone_costs_no_encoding(clock: Any) -> None:
    gate = Gate()
    batcher, first = held(gate)
    late = batcher.submit(1, deadline=clock.now)
    gate.opened.set()
    with pytest.raises(DeadlinePassed):
        late.result(SOON)
    assert first.result(SOON) == -2
    assert batcher.submit(3).result(SOON) == 6
    assert gate.batches == [[-1], [3]]
    batcher.close()


def test_a_ticket_tells_how_long_it_waited_and_with_how_many_it_ran(clock: Any) -> None:
    gate = Gate()
    batcher, first = held(gate)
    early = batcher.submit(1)
    clock.now += 2
    late = batcher.submit(2)
    clock.now += 1
    gate.opened.set()
    batcher.close()
    assert [(t.queued_seconds, t.batch_rows) for t in (first, early, late)] == [(0, 1), (3, 2), (1, 2)]


def test_what_was_cancelled_is_not_encoded_and_gives_its_place_back() -> None:
    gate = Gate()
    batcher, first = held(gate, capacity=2)
    futures = [batcher.submit(i) for i in range(2)]
    assert futures[0].cancel()
    assert batcher.depth == 1
    assert not wait(futures[:1], SOON).not_done  # who waits for it is told
    futures.append(batcher.submit(2))  # would be refused
    assert not first.cancel()  # it runs
    gate.opened.set()
    assert [f.result(SOON) for f in (first, *futures[1:])] == [-2, 2, 4]
    batcher.close()
    assert gate.batches == [[-1], [1, 2]]
    assert batcher.cancelled == 1


def test_coroutines_and_threads_share_batches() -> None:
    gate = Gate()
    batcher, _ = held(gate)

    async def ask() -> list[int]:
        asked = [asyncio.ensure_future(batcher.run(i, group="loop")) for i in range(4)]
        await asyncio.sleep(0)
        other = batcher.submit(100, group="thread")
        gate.opened.set()
        return [*await asyncio.gather(*asked), other.result(SOON)]

    assert asyncio.run(ask()) == [0, 2, 4, 6, 200]
    assert sorted(gate.batches[1]) == [0, 1, 2, 3, 100]
    batcher.close()


def test_a_cancelled_task_withdraws_its_row() -> None:
    gate = Gate()
    batcher, first = held(gate)

    async def go_away() -> None:
        running, waiting = asyncio.wrap_future(first), asyncio.ensure_future(batcher.run(1))
        await asyncio.sleep(0)
        assert batcher.depth == 1
        for task in (waiting, running):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert batcher.depth == 0

    asyncio.run(go_away())
    gate.opened.set()
    assert first.result(SOON) == -2  # a row that runs is not lost for others who hold its ticket
    batcher.close()
    assert gate.batches == [[-1]]


def fails_on(*bad: int) -> Callable[[Sequence[int]], None]:
    def check(rows: Sequence[int]) -> None:
        if found := sorted(set(rows) & set(bad)):
            raise ValueError(f"{found} among {len(rows)}")

    return check


def test_one_bad_row_harms_no_other_and_costs_a_logarithm(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate(fails_on(37))
    batcher, _ = held(gate, limit=64)
    futures = [batcher.submit(i) for i in range(64)]
    gate.opened.set()
    with caplog.at_level(logging.CRITICAL + 1):
        wait(futures, SOON)
    assert [f.result(0) for i, f in enumerate(futures) if i != 37] == [2 * i for i in range(64) if i != 37]
    error = futures[37].exception(0)
    assert str(error) == "[37] among 1"
    first = error
    while first is not None and first.__context__ is not None:
        first = first.__context__
    assert str(first) == "[37] among 64"  # the first exception is not lost
    assert len(gate.batches) == 2 + 2 * math.log2(64)
    assert batcher.failures == 1 + math.log2(64)
    assert (batcher.batches, batcher.rows) == (2, 65)  # tries of a part are no batches
    batcher.close()


@settings(max_examples=40, deadline=None)
@given(bad=st.sets(st.integers(0, 15)), rows=st.integers(1, 16))
def test_each_bad_row_gets_its_own_exception(bad: set[int], rows: int) -> None:
    gate = Gate(fails_on(*bad))
    batcher, _ = held(gate, limit=16)
    logging.disable()
    futures = [batcher.submit(i) for i in range(rows)]
    gate.opened.set()
    assert batcher.close(SOON)
    logging.disable(logging.NOTSET)
    for i, future in enumerate(futures):
        if i in bad:
            assert str(future.exception(0)) == f"[{i}] among 1"
        else:
            assert future.result(0) == 2 * i


def test_a_batch_that_is_too_large_for_the_device_is_answered_in_parts(caplog: pytest.LogCaptureFixture) -> None:
    def check(rows: Sequence[int]) -> None:
        if len(rows) > 3:
            raise MemoryError(f"{len(rows)} rows")

    gate = Gate(check)
    batcher, _ = held(gate)
    futures = [batcher.submit(i) for i in range(8)]
    gate.opened.set()
    assert [f.result(SOON) for f in futures] == [2 * i for i in range(8)]
    assert [record.message for record in caplog.records] == ["a batch of 8 rows failed: it is tried in halves"]
    assert batcher.failures == 3  # of 8, and of both 4
    batcher.close()


def test_a_wrong_number_of_results_reaches_no_caller_as_a_result() -> None:
    def encode(rows: Sequence[int]) -> list[int]:
        return [0] * (len(rows) + 1)

    batcher: Batcher[int, int] = Batcher(encode, limit=8)
    with pytest.raises(ValueError, match="encode gave 2 results for 1 rows"):
        batcher.submit(1).result(SOON)
    batcher.close()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, asyncio.CancelledError, GeneratorExit])
def test_an_interrupted_encoder_strands_no_one_and_the_batcher_goes_on(interruption: type[BaseException]) -> None:
    def check(rows: Sequence[int]) -> None:
        if 3 in rows:
            raise interruption("stop")

    gate = Gate(check)
    batcher, _ = held(gate)
    futures = [batcher.submit(i) for i in range(5)]
    gate.opened.set()
    for future in futures:
        with pytest.raises(BatcherFailed, match="interrupted") as failed:
            future.result(SOON)
        assert isinstance(failed.value.__cause__, interruption)
    assert batcher.submit(1).result(SOON) == 2
    batcher.close()


def test_a_stop_iteration_of_the_encoder_reaches_coroutines() -> None:
    def encode(rows: Sequence[int]) -> list[int]:
        return [next(iter([]))]

    batcher: Batcher[int, int] = Batcher(encode, limit=8)
    with pytest.raises(BatcherFailed, match="StopIteration"):
        asyncio.run(asyncio.wait_for(batcher.run(1), SOON))
    batcher.close()


def test_a_broken_thread_settles_every_future_and_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    batcher, first = held(gate)
    futures = [batcher.submit(i, group=str(i)) for i in range(3)]

    def broken() -> bool:
        raise SystemExit("a fault of the batcher's own")

    monkeypatch.setattr(batcher, "_take", broken)
    gate.opened.set()
    assert first.result(SOON) == -2
    for future in futures:
        with pytest.raises(BatcherFailed, match="broke"):
            future.result(SOON)
    with pytest.raises(BatcherClosed):
        batcher.submit(1)
    assert batcher.close(SOON)


def test_a_callback_that_exits_strands_no_other_row() -> None:
    gate = Gate()
    batcher, _ = held(gate)

    def leave(_: Future[int]) -> None:
        raise SystemExit

    batcher.submit(0).add_done_callback(leave)
    other = batcher.submit(1)  # in the same batch
    gate.opened.set()
    assert other.result(SOON) == 2
    batcher.close()


def test_close_finishes_what_waits() -> None:
    gate = Gate()
    batcher, _ = held(gate, limit=1)
    futures = [batcher.submit(i) for i in range(4)]
    closer = threading.Thread(target=batcher.close)
    closer.start()
    gate.opened.set()
    closer.join(SOON)
    assert [f.result(0) for f in futures] == [0, 2, 4, 6]
    with pytest.raises(BatcherClosed):
        batcher.submit(9)
    assert batcher.close()  # once more is no error


def test_close_out_of_time_gives_up_what_waits_and_what_hangs() -> None:
    gate = Gate()
    batcher, first = held(gate)
    waiting = batcher.submit(1)
    assert not batcher.close(timeout=0)
    for future in (first, waiting):
        with pytest.raises(BatcherClosed):
            future.result(0)
    gate.opened.set()  # its late results disturb no one
    assert batcher.close(SOON)
    assert gate.batches == [[-1]]


def test_counters_tell_what_happened() -> None:
    gate = Gate()
    batcher, _ = held(gate, limit=64)
    for i in range(67):
        batcher.submit(i)
    gate.opened.set()
    batcher.close()
    assert (batcher.batches, batcher.rows) == (3, 68)  # of 1, 64 and 3
    assert dict(zip([*SIZES, None], batcher.batch_sizes, strict=True)) == {
        **dict.fromkeys([*SIZES, None], 0), 1: 1, 64: 1, 4: 1
    }  # fmt: skip


def test_a_settled_ticket_keeps_neither_its_row_nor_itself_alive() -> None:
    class Pixels:
        pass

    done = threading.Event()
    batcher: Batcher[Pixels, Pixels] = Batcher(lambda rows: [Pixels() for _ in rows], limit=8)
    gc.disable()
    try:
        row = Pixels()
        of_row, ticket = weakref.ref(row), batcher.submit(row)
        del row
        of_result = weakref.ref(ticket.result(SOON))
        batcher.submit(Pixels()).add_done_callback(lambda _: done.set())  # the thread has moved on
        assert done.wait(SOON)
        assert of_row() is None
        assert of_result() is not None
        batcher.close()
        del ticket
        assert of_result() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_every_future_is_settled_and_counted_once(seed: int) -> None:
    """Threads and a loop submit, cancel and set deadlines at random; the encoder fails and exits at random."""
    whims = random.Random(seed)
    futures: list[Ticket[int]] = []
    refused = Counter[str]()
    logging.disable()

    def encode(rows: Sequence[int]) -> list[int]:
        whim = whims.random()
        if whim < 0.1:
            raise SystemExit
        if whim < 0.3:
            raise ValueError(whim)
        return [2 * row for row in rows][: None if whim < 0.9 else -1]

    batcher: Batcher[int, int] = Batcher(encode, limit=8, capacity=60, group_capacity=25)

    def client(number: int) -> None:
        own = random.Random(1000 * seed + number)
        for i in range(150):
            past = time.monotonic() + own.choice([-1, 60])
            try:
                future = batcher.submit(i, group=str(number % 3), weight=own.randint(1, 4), deadline=own.choice([None, past]))
            except BatcherFull as full:
                assert full.retry_after > 0
                refused["full"] += 1
                wait(futures[-5:], SOON)
                continue
            futures.append(future)
            future.row = i  # type: ignore[attr-defined]
            if own.random() < 0.2:
                future.cancel()

    async def loop() -> list[Any]:
        return await asyncio.gather(*(batcher.run(i, group="loop") for i in range(20)), return_exceptions=True)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    answers = asyncio.run(loop())
    for thread in threads:
        thread.join()
    assert batcher.close(SOON)
    logging.disable(logging.NOTSET)
    assert all(future.done() for future in futures)
    seen = Counter[type]()
    for future in futures:
        try:
            assert future.result(0) == 2 * future.row  # type: ignore[attr-defined]
            seen[int] += 1
        except (ValueError, BatcherFailed, DeadlinePassed, CancelledError) as error:
            seen[type(error)] += 1
    assert seen[int] and seen[DeadlinePassed] == batcher.expired and seen[CancelledError] == batcher.cancelled
    assert all(isinstance(a, BatcherFull | ValueError | BatcherFailed) or a == 2 * i for i, a in enumerate(answers))
    full = sum(isinstance(a, BatcherFull) for a in answers)
    assert batcher.refused == refused["full"] + full
    assert batcher.rows + batcher.expired + batcher.cancelled == len(futures) + len(answers) - full
    assert sum(batcher.batch_sizes) == batcher.batches
    assert batcher.depth == 0
