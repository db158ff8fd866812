"""Micro-batching: callers of many threads hand in rows one by one, one thread encodes all that wait in one forward."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

Row = TypeVar("Row")
Result = TypeVar("Result")


class BatcherFull(RuntimeError):
    """More rows wait than the queue may hold: try again in a moment."""


@dataclass(slots=True)
class _Waiting(Generic[Row, Result]):
    row: Row
    weight: int
    future: Future[Result]


class Batcher(Generic[Row, Result]):
    """Runs `encode(rows) -> results` on a thread of its own, on everything that waits, up to `limit` of summed weight.

    A row is taken at once when the thread is idle: there is no artificial wait. Every future is settled: where a batch
    fails, its rows are tried one by one, and each future gets its own result or its own exception.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[Row]], Sequence[Result]],
        limit: int,
        capacity: int = 4096,
        name: str = "batcher",
    ) -> None:
        self._encode = encode
        self._limit = limit
        self._capacity = capacity
        self._queue: deque[_Waiting[Row, Result]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, row: Row, weight: int = 1) -> Future[Result]:
        """Raises BatcherFull where `capacity` rows wait already, RuntimeError after `close`."""
        waiting: _Waiting[Row, Result] = _Waiting(row, weight, Future())
        with self._wake:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            if len(self._queue) >= self._capacity:
                raise BatcherFull(f"{self._capacity} rows are waiting")
            self._queue.append(waiting)
            self._wake.notify()
        return waiting.future

    def close(self) -> None:
        """Finishes what waits, then ends the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._take():
            try:
                results = self._encode([w.row for w in batch])
            except Exception as error:
                self._one_by_one(batch, error)
            else:
                for waiting, result in zip(batch, results, strict=True):
                    waiting.future.set_result(result)

    def _take(self) -> list[_Waiting[Row, Result]]:
        with self._wake:
            while not self._queue and not self._closed:
                self._wake.wait()
            batch: list[_Waiting[Row, Result]] = []
            weight = 0
            while self._queue and (not batch or weight + self._queue[0].weight <= self._limit):
                waiting = self._queue.popleft()
                if waiting.future.set_running_or_notify_cancel():
                    batch.append(waiting)
                    weight += waiting.weight
            return batch if batch or not self._queue else self._take()

    def _one_by_one(self, batch: list[_Waiting[Row, Result]], error: Exception) -> None:
        if len(batch) == 1:
            batch[0].future.set_exception(error)
            return
        for waiting in batch:
            try:
                waiting.future.set_result(self._encode([waiting.row])[0])
            except Exception as own:
                waiting.future.set_exception(own)
