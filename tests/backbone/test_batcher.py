import threading
import time
from collections.abc import Sequence

import pytest

from backbone.batcher import Batcher, BatcherFull


def test_rows_that_wait_are_encoded_together() -> None:
    batches: list[int] = []
    gate = threading.Event()

    def encode(rows: Sequence[int]) -> list[int]:
        gate.wait(5)
        batches.append(len(rows))
        return [row * 2 for row in rows]

    batcher: Batcher[int, int] = Batcher(encode, limit=8)
    first = batcher.submit(0)
    time.sleep(0.05)  # the thread holds the first row now
    waiting = [batcher.submit(i) for i in range(1, 13)]
    gate.set()
    assert [f.result(5) for f in [first, *waiting]] == [2 * i for i in range(13)]
    assert batches == [1, 8, 4]
    batcher.close()


def test_one_bad_row_harms_no_other() -> None:
    gate = threading.Event()

    def encode(rows: Sequence[int]) -> list[int]:
        gate.wait(5)
        if 3 in rows:
            raise ValueError("three")
        return list(rows)

    batcher: Batcher[int, int] = Batcher(encode, limit=8)
    futures = [batcher.submit(i) for i in range(5)]
    gate.set()
    assert [f.result(5) for f in futures[:3]] == [0, 1, 2]
    assert futures[4].result(5) == 4
    with pytest.raises(ValueError, match="three"):
        futures[3].result(5)
    batcher.close()


def test_a_full_queue_refuses() -> None:
    gate = threading.Event()

    def encode(rows: Sequence[int]) -> list[int]:
        gate.wait(5)
        return list(rows)

    batcher: Batcher[int, int] = Batcher(encode, limit=1, capacity=2)
    batcher.submit(0)
    time.sleep(0.05)
    kept = [batcher.submit(1), batcher.submit(2)]
    with pytest.raises(BatcherFull):
        batcher.submit(3)
    gate.set()
    assert [f.result(5) for f in kept] == [1, 2]
    batcher.close()


def test_what_was_cancelled_is_not_encoded_and_close_finishes_the_rest() -> None:
    gate, seen = threading.Event(), []

    def encode(rows: Sequence[int]) -> list[int]:
        gate.wait(5)
        seen.extend(rows)
        return list(rows)

    batcher: Batcher[int, int] = Batcher(encode, limit=1)
    futures = [batcher.submit(i) for i in range(4)]
    time.sleep(0.05)
    assert futures[2].cancel()
    gate.set()
    batcher.close()
    assert seen == [0, 1, 3]
    assert futures[3].result(0) == 3
    with pytest.raises(RuntimeError):
        batcher.submit(9)
