"""Text vectors by tenant, adapter and text: bounded by bytes, each computed once however many ask for it at the same time."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from backbone.batcher import BatcherFull, DeadlinePassed

OVERHEAD = 450  # bytes of an entry beside its text and its vector: key, digest, record, array header, place in the table
OF_THE_CALLER = (BatcherFull, DeadlinePassed, CancelledError, TimeoutError)  # these tell of who asked, not of the text


class TextKey(NamedTuple):
    """`encoder`: the adapter's digest, or the fingerprint of the frozen backbone; `text` normalised. The tenant is in it so
    that no answer's time tells what another one has searched.
    """

    tenant: str
    encoder: str
    text: str


@dataclass(frozen=True, slots=True)
class TextVector:
    """`vector` (D,) float32, unnormalised, read-only; `truncated`: the text was longer than the backbone reads."""

    vector: NDArray[np.float32]
    truncated: bool


class _GivenUp(Exception):
    """Who computed went away: another one has to."""


def text_key(tenant: str, encoder: str, text: str) -> TextKey:
    """The text is normalised: its ends cut, each run of white space one blank. Empty where there is nothing else."""
    return TextKey(tenant, encoder, " ".join(text.split()))


class TextCache:
    """The entries used last, up to `capacity` bytes (0: none); safe for threads and coroutines at once.

    While one caller computes a key, others who ask for it wait and get its value or its exception; a failure is not kept.
    Where the one that computes goes away, is refused by a full queue or is too late, those who wait try for themselves.

    To be read by metrics: `hits`, `shared` (waited for another's computation), `misses` (computed), `bytes`, `len()`.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[TextKey, TextVector] = OrderedDict()  # the one used last at the end
        self._flights: dict[TextKey, Future[TextVector]] = {}
        self._lock = threading.Lock()
        self.hits = self.shared = self.misses = self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: TextKey) -> bool:
        return key in self._entries

    async def get_or_run(self, key: TextKey, compute: Callable[[], Awaitable[TextVector]]) -> TextVector:
        """The entry of a key of `text_key`. A caller that is cancelled disturbs no other.

        Raises what `compute` raises, called here or by another caller.
        """
        while True:
            flight, first = self._join(key)
            if first:
                try:
                    return self._land(key, flight, await compute())
                except BaseException as error:
                    self._fail(key, flight, error)
                    raise
            try:
                return flight.result() if flight.done() else await asyncio.wrap_future(flight)
            except _GivenUp:
                continue

    def _join(self, key: TextKey) -> tuple[Future[TextVector], bool]:
        """The future of an entry, and whether it is the caller who must settle it."""
        with self._lock:
            if (flight := self._flights.get(key)) is not None:
                self.shared += 1
                return flight, False
            flight = Future()
            flight.set_running_or_notify_cancel()  # from now on no one who waits for it can cancel it
            if (entry := self._entries.get(key)) is not None:
                self.hits += 1
                self._entries.move_to_end(key)
                flight.set_result(entry)
                return flight, False
            self.misses += 1
            self._flights[key] = flight
            return flight, True

    def _land(self, key: TextKey, flight: Future[TextVector], entry: TextVector) -> TextVector:
        vector = entry.vector if entry.vector.base is None else entry.vector.copy()  # a view keeps a whole batch alive
        vector.setflags(write=False)
        entry = replace(entry, vector=vector)
        with self._lock:
            del self._flights[key]
            if (size := _size(key, entry)) <= self._capacity:
                self._entries[key] = entry
                self.bytes += size
            while self.bytes > self._capacity:
                self.bytes -= _size(*self._entries.popitem(last=False))
        flight.set_result(entry)
        return entry

    def _fail(self, key: TextKey, flight: Future[TextVector], error: BaseException) -> None:
        with self._lock:
            self._flights.pop(key, None)
        own = isinstance(error, OF_THE_CALLER) or not isinstance(error, Exception)
        flight.set_exception(_GivenUp() if own else error)


def _size(key: TextKey, entry: TextVector) -> int:
    return entry.vector.nbytes + sys.getsizeof(key.text) + OVERHEAD
