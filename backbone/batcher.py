"""Micro-batching: many callers hand in rows one by one, one thread encodes all that wait in one forward."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

Row = TypeVar("Row")
Result = TypeVar("Result")

FADING = 0.8  # weight of the past in the recent pace
SIZES = tuple(2**i for i in range(11))  # upper bounds of `batch_sizes`; the last of its counts has none

log = logging.getLogger(__name__)


class BatcherFull(RuntimeError):
    """More rows wait, over all or in the group, than may: try again in about `retry_after` seconds."""

    def __init__(self, detail: str, retry_after: float) -> None:
        super().__init__(detail)
        self.retry_after = retry_after


class DeadlinePassed(RuntimeError):
    """The row's deadline passed while it waited; it was not encoded."""


class BatcherClosed(RuntimeError):
    """The batcher takes no rows any more, or gave this one up when `close` ran out of time."""


class BatcherFailed(RuntimeError):
    """The encoder was interrupted (SystemExit and the like) or the thread broke; `__cause__` is what was raised."""


class Ticket(Future[Result], Generic[Result]):
    """The future of a row. Once the row is taken: `queued_seconds` that it waited, `batch_rows` of its batch."""

    queued_seconds: float = 0.0
    batch_rows: int = 0


@dataclass(frozen=True, slots=True)
class _Waiting(Generic[Row, Result]):
    ticket: Ticket[Result]
    row: Row
    weight: int
    deadline: float | None
    since: float


class Batcher(Generic[Row, Result]):
    """Runs `encode(rows) -> results` on a thread of its own, on what waits, up to `limit` of summed weight.

    Semantics: each batch takes one row of every group in turn until `limit` is reached, and the next batch goes on with
    the group whose turn it is: the first row of a group waits for the batch that runs and for one row of each other group.
    A row starts at once where the thread is idle; rows gather while a batch runs. Waiting for more rows was measured and is
    slower (`tests/backbone/test_batcher.py` has the figures).

    Every future is settled, whatever happens. A batch that fails is halved until the failing rows are alone: they get
    the exception (its `__context__` leads to the first one), the others their results.

    For metrics, counted since the start: `batches`, `rows`, `batch_sizes` (batches by rows, bounds `SIZES`),
    `failures` (calls of `encode` that raised), `refused`, `expired`, `cancelled` (while waiting).
    """

    def __init__(
        self,
        encode: Callable[[Sequence[Row]], Sequence[Result]],
        limit: int,
        *,
        capacity: int = 4096,
        group_capacity: int | None = None,
        name: str = "batcher",
    ) -> None:
        """`capacity` and `group_capacity` (default: the same) count waiting rows, over all and of one group."""
        self._encode = encode
        self._limit = limit
        self._capacity = capacity
        self._group_capacity = capacity if group_capacity is None else group_capacity
        self._groups: OrderedDict[str, OrderedDict[Future[Result], _Waiting[Row, Result]]] = OrderedDict()  # next one first
        self._depth = self._weight = 0  # of what waits
        self._batch: list[_Waiting[Row, Result]] = []  # what is being encoded
        self._recent_weight = self._recent_seconds = 0.0
        self._wake = threading.Condition()
        self._closed = False
        self.batches = self.rows = self.failures = self.refused = self.expired = self.cancelled = 0
        self.batch_sizes = [0] * (len(SIZES) + 1)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        """Rows that wait now."""
        return self._depth

    def submit(self, row: Row, *, group: str = "", weight: int = 1, deadline: float | None = None) -> Ticket[Result]:
        """Hands in a row for a group (a tenant); `deadline` in seconds of `time.monotonic`. Cancel the ticket to withdraw it.

        Raises BatcherFull, BatcherClosed, ValueError for a weight under 1. The ticket may hold DeadlinePassed,
        BatcherClosed, BatcherFailed or what `encode` raised.
        """
        return self.submit_all([row], group=group, weight=weight, deadline=deadline)[0]

    def submit_all(
        self, rows: Sequence[Row], *, group: str = "", weight: int = 1, deadline: float | None = None
    ) -> list[Ticket[Result]]:
        """`submit` of several rows at once, all or none of them: an idle thread takes them together, not the first alone."""
        if weight < 1:
            raise ValueError(f"the weight of a row is {weight}, not at least 1")
        tickets = [Ticket[Result]() for _ in rows]
        with self._wake:
            if self._closed:
                raise BatcherClosed("the batcher is closed")
            waits, theirs, more = self._depth, len(self._groups.get(group, ())), len(rows)
            if waits + more > self._capacity or theirs + more > self._group_capacity:
                self.refused += more
                raise BatcherFull(f"{waits} rows are waiting, {theirs} of them yours", self._time_to_drain())
            if not rows:
                return []
            queue, now = self._groups.setdefault(group, OrderedDict()), time.monotonic()
            for ticket, row in zip(tickets, rows, strict=True):
                queue[ticket] = _Waiting(ticket, row, weight, deadline, now)
            self._depth += more
            self._weight += weight * more
            self._wake.notify()
        for ticket in tickets:
            ticket.add_done_callback(lambda done: self._withdraw(group, done) if done.cancelled() else None)
        return tickets

    async def run(self, row: Row, *, group: str = "", weight: int = 1, deadline: float | None = None) -> Result:
        """`submit`, awaited. A task that is cancelled meanwhile withdraws its row. Raises what `submit` and its ticket do."""
        return await asyncio.wrap_future(self.submit(row, group=group, weight=weight, deadline=deadline))

    def close(self, timeout: float | None = None) -> bool:
        """Takes no more rows, finishes those that wait and ends the thread.

        After `timeout` seconds the rest gets BatcherClosed, the rows of a batch that still runs too; False then.
        """
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(timeout)
        if finished := not self._thread.is_alive():
            return finished
        self._abandon(partial(BatcherClosed, "the batcher was closed before the row was done"))
        return False

    def _run(self) -> None:
        try:
            while self._take():
                if self._batch:
                    self._encode_taken()
        except BaseException as error:
            log.critical("the thread of a batcher broke", exc_info=error)
            self._abandon(partial(_failed, "the batcher broke", error))

    def _take(self) -> bool:
        """Waits, then moves the rows of the next batch to `_batch`: none where all had expired. False once closed and empty."""
        expired, weight = [], 0
        with self._wake:
            while not self._depth and not self._closed:
                self._wake.wait()
            now = time.monotonic()
            while self._groups:
                group, queue = next(iter(self._groups.items()))
                waiting = next(iter(queue.values()))
                late = waiting.deadline is not None and waiting.deadline <= now
                if self._batch and not late and weight + waiting.weight > self._limit:
                    break
                if not self._remove(group, waiting.ticket):
                    continue
                if late:
                    expired.append(waiting)
                    continue
                self._batch.append(waiting)
                weight += waiting.weight
                if group in self._groups:
                    self._groups.move_to_end(group)
            going_on = bool(self._batch or expired or not self._closed)
            self.expired += len(expired)
            if rows := len(self._batch):
                self.batches += 1
                self.rows += rows
                self.batch_sizes[bisect_left(SIZES, rows)] += 1
        for waiting in self._batch:
            waiting.ticket.queued_seconds, waiting.ticket.batch_rows = now - waiting.since, rows
        for waiting in expired:
            _settle(waiting.ticket, DeadlinePassed(f"the row waited for {now - waiting.since:.3f} s, past its deadline"))
        return going_on

    def _encode_taken(self) -> None:
        """Encodes `_batch` and settles all its tickets."""
        batch, started = self._batch, time.monotonic()
        try:
            self._encode_and_settle(batch)
        except BaseException as error:  # SystemExit and the like: the callers of these rows would wait for ever
            log.error("encoding was interrupted", exc_info=error)
            for waiting in batch:
                _settle(waiting.ticket, _failed("encoding was interrupted", error))
        weight = sum(waiting.weight for waiting in batch)
        with self._wake:
            self._batch = []
            self._recent_weight = FADING * self._recent_weight + weight
            self._recent_seconds = FADING * self._recent_seconds + time.monotonic() - started

    def _encode_and_settle(self, batch: Sequence[_Waiting[Row, Result]]) -> None:
        """One bad row of n costs 2 log2 n more calls of `encode`."""
        try:
            results = self._encode([waiting.row for waiting in batch])
            if len(results) != len(batch):
                raise ValueError(f"encode gave {len(results)} results for {len(batch)} rows")
        except Exception as error:
            self.failures += 1
            if len(batch) == 1:
                _settle(batch[0].ticket, error)
                return
            if len(batch) == len(self._batch):
                log.warning("a batch of %d rows failed: it is tried in halves", len(batch), exc_info=error)
            self._encode_and_settle(batch[: len(batch) // 2])
            self._encode_and_settle(batch[len(batch) // 2 :])
        else:
            for waiting, result in zip(batch, results, strict=True):
                with suppress(BaseException):  # as in `_settle`
                    waiting.ticket.set_result(result)

    def _withdraw(self, group: str, ticket: Future[Result]) -> None:
        """Takes a cancelled row out of the queue."""
        with self._wake:
            if ticket in self._groups.get(group, ()):
                self._remove(group, ticket)

    def _remove(self, group: str, ticket: Future[Result]) -> bool:
        """Takes a row out of the queue. False for a cancelled one, which is told to `concurrent.futures.wait` here."""
        self._weight -= self._groups[group].pop(ticket).weight
        self._depth -= 1
        if not self._groups[group]:
            del self._groups[group]
        alive = ticket.set_running_or_notify_cancel()
        self.cancelled += not alive
        return alive

    def _time_to_drain(self) -> float:
        """Seconds until all that waits and runs now is done, at the pace of the last batches; 1 before the first."""
        if not self._recent_weight:
            return 1.0
        weight = self._weight + sum(waiting.weight for waiting in self._batch)
        return weight * self._recent_seconds / self._recent_weight

    def _abandon(self, error: Callable[[], Exception]) -> None:
        """Closes the batcher: every row that waits or runs gets an error."""
        with self._wake:
            self._closed = True
            waits = [(group, waiting) for group, queue in self._groups.items() for waiting in queue.values()]
            left = [*self._batch, *(waiting for group, waiting in waits if self._remove(group, waiting.ticket))]
        for waiting in left:
            _settle(waiting.ticket, error())


def _settle(ticket: Ticket[Result], error: Exception) -> None:
    if isinstance(error, StopIteration):  # asyncio's futures refuse it, and their callers would wait for ever
        error = _failed("encode raised StopIteration", error)
    with suppress(BaseException):  # settled by `close` already, or a callback of the caller's raised what is no Exception
        ticket.set_exception(error)


def _failed(detail: str, cause: BaseException) -> BatcherFailed:
    error = BatcherFailed(detail)
    error.__cause__ = cause
    return error
