"""The right to use an adapter, what it counts, and what a batch of leased rows is encoded with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch

from backbone import Adapter, Adapters, AdapterStack, FlatAdapter, Slots


class LeaseTimeout(TimeoutError):
    """No slot became free, or the adapter was not loaded, within the time that the caller had."""


@dataclass(slots=True)
class Counters:
    """Since the start: leases served at once, adapters brought to the device from host memory and from blobs, slots taken from
    one adapter for another, failed loads, seconds that leases waited."""

    hits: int = 0
    host_loads: int = 0
    blob_loads: int = 0
    evictions: int = 0
    failures: int = 0
    waited_seconds: float = 0.0


@dataclass(slots=True, eq=False)
class Entry:
    """An adapter that is being brought to the device, or is there."""

    digest: str
    held: FlatAdapter | Adapter | None = None  # its values in host memory, until it is in its slot
    slot: int | None = None
    users: int = 0  # leases that are not released
    closed: bool = False  # takes no more leases; its slot is free when the last one is released
    waiting: list[tuple[Future[Lease], float]] = field(default_factory=list)  # who asked for a lease, and when


class Lease(AbstractContextManager["Lease", None]):
    """The right to use an adapter, until `release` or the end of `with`: in `slot` of `stack`, or, if it is too large for a
    slot, as `adapter`. The slot cannot be used for another adapter before each of its leases is released.
    """

    def __init__(
        self, entry: Entry, stack: AdapterStack, give_back: Callable[[Lease], None], adapter: Adapter | None = None
    ) -> None:
        self.digest, self.slot, self.adapter, self.stack = entry.digest, entry.slot, adapter, stack
        self.entry, self.released, self._give_back = entry, False, give_back

    def release(self) -> None:
        """To be called when the batch is done: its results on the host, or its work given to CUDA's default stream. A second
        call does nothing.
        """
        self._give_back(self)

    def __exit__(self, *_: object) -> None:
        self.release()


def slots_of(leases: Sequence[Lease | None]) -> Adapters:
    """The leased adapters of a batch's rows as an argument of `encode_text` and `encode_frames`; None: the frozen backbone.

    Slots of the stack; where one has none, being too large, a plain sequence of adapters, slower for all of the batch.
    """
    held = [lease for lease in leases if lease is not None]
    if not held:
        return None
    stack = held[0].stack
    if all(lease.adapter is None for lease in held):
        return Slots(stack, torch.tensor([0 if lease is None else lease.slot or 0 for lease in leases]))
    distinct = {lease.digest: lease.adapter or stack.adapter(lease.slot or 0) for lease in held}
    return [None if lease is None else distinct[lease.digest] for lease in leases]
