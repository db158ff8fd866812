"""Where adapters live: slots of the device's stack, host memory, blobs; fetched by digest, checked, counted while in use.

A caller leases an adapter for as long as its rows are in flight. A leased slot is never written; of the others the least
recently used goes first. Loads run on threads of their own, one for each digest however many ask. What finds no slot waits
in the order in which it became ready, and is not overtaken for good: for each adapter that waits, the least recently asked
of those in use is closed to new leases (they queue like everyone else) and gives up its slot when its last lease ends.
A row holds one lease, so more rows than slots wait, and never for each other.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from types import TracebackType

import torch

from adapters_store.artifact import AdapterMismatch, Artifact, DamagedAdapter, InvalidAdapter, unpack
from adapters_store.pins import Pins
from backbone import Adapter, Adapters, AdapterStack, FlatAdapter, Slots, TowerDims, threads
from backbone.stack import rank_of

LOADERS = 8
Fetch = Callable[[], bytes]


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
class _Entry:
    """An adapter on its way to the device, or there."""

    digest: str
    held: FlatAdapter | Adapter | None = None  # until it is there
    slot: int | None = None
    users: int = 0
    closed: bool = False  # gives up its slot after its last lease; in no table any more
    waiting: list[tuple[Future[Lease], float]] = field(default_factory=list)  # with the time of asking


class Lease:
    """The right to use an adapter, until `release` or the end of `with`: in `slot` of the stack, or, too large for it, as
    `adapter`. Whoever loses one unreleased loses the slot.
    """

    def __init__(self, residency: Residency, entry: _Entry, adapter: Adapter | None = None) -> None:
        self._residency, self._entry, self._over = residency, entry, False
        self.digest, self.slot, self.adapter = entry.digest, entry.slot, adapter

    @property
    def stack(self) -> AdapterStack:
        return self._residency.stack

    def release(self) -> None:
        """Only when the batch is done: its results on the host, or its work given to CUDA's default stream. Twice is once."""
        self._residency._release(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


class Residency:
    """The adapters of one backbone, for use from many threads. `capacity` adapters can be leased at a time.

    `stack_bytes` of the device are taken at once, for adapters of up to `rank` in `dtype`; larger ones are leased without a
    slot, as an `Adapter`, and live in host memory. `host_bytes` bound what is kept there (of what is in the stack too, so
    that to evict copies nothing). `pin_share` of the slots, 0 to 1, are what one owner may keep by pins.
    """

    def __init__(
        self,
        fingerprint: str,
        dims: TowerDims,
        device: torch.device | str,
        *,
        stack_bytes: int = 256 * 1024 * 1024,
        host_bytes: int = 1024 * 1024 * 1024,
        rank: int = 16,
        dtype: torch.dtype = torch.float32,
        pin_share: float = 0.25,
    ) -> None:
        slots = max(2, stack_bytes // AdapterStack.slot_bytes(dims, rank, dtype))
        self.stack = AdapterStack(dims, slots, rank, device, dtype)
        self.capacity = slots - 1
        self._fingerprint, self._host_budget = fingerprint, host_bytes
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}  # loading or resident, and open to leases
        self._resident: OrderedDict[str, _Entry] = OrderedDict()  # of those, the ones in a slot; last leased, last
        self._host: OrderedDict[str, FlatAdapter | Adapter] = OrderedDict()
        self._host_bytes = 0
        self._free = list(range(1, slots))
        self._queue: deque[_Entry] = deque()  # loaded, wanting a slot
        self._closing = 0  # entries in use that will give up their slot
        self._pins = Pins(self.capacity, pin_share)
        self._closed = False
        self._counters = Counters()
        self._loaders = ThreadPoolExecutor(LOADERS, "adapter-load", threads.alone)
        self._writer = ThreadPoolExecutor(1, "adapter-write", threads.alone)

    def lease(self, digest: str, fetch: Fetch, timeout: float | None = None) -> Lease:
        """A lease of the adapter of this digest, waited for; `fetch` reads its file where it is not in memory.

        Raises DamagedAdapter if the file is not what the digest names, AdapterMismatch if it is for another backbone, what
        `fetch` raises, and LeaseTimeout after `timeout` seconds. Who holds one lease and waits for another without a timeout
        may wait forever.
        """
        future = self.request(digest, fetch)
        try:
            return future.result(timeout)
        except TimeoutError:
            if future.cancel():
                raise LeaseTimeout(f"adapter {digest[:12]} found no slot, or was not loaded, in {timeout} s") from None
            return future.result()  # granted in this very moment, or the load's own error

    def request(self, digest: str, fetch: Fetch) -> Future[Lease]:
        """`lease` without waiting. A future that `cancel` cannot stop any more has a lease, which is to be released."""
        future: Future[Lease] = Future()
        with self._lock:
            entry = self._open(digest, fetch, [(future, time.monotonic())])
            if not (granted := self._granted(entry)):
                return future
        self._settle(entry, granted)
        return future

    def prefetch(self, digest: str, fetch: Fetch) -> None:
        """Loads an adapter before it is asked for: into a slot if one is idle, else into host memory."""
        with self._lock:
            self._open(digest, fetch, [])

    def pin(self, digest: str, holder: str, owner: str) -> None:
        """Keeps an adapter in its slot, once it is there, until its holder (a collection) unpins it or pins another one.

        Raises PinsExhausted where the owner (a tenant) has its share of the slots pinned, or where only one slot is left; the
        holder has no pin then.
        """
        with self._lock:
            self._pins.add(digest, holder, owner)
            self._place()

    def unpin(self, holder: str) -> None:
        """Ends the holder's pin, if it has one."""
        with self._lock:
            self._pins.remove(holder)
            self._place()

    def pins(self) -> Mapping[str, str]:
        """The owner of each holder of a pin: who is gone is to be unpinned."""
        with self._lock:
            return self._pins.owners()

    def states(self) -> Mapping[str, str]:
        """Each known digest: active (in a slot, leased or pinned), inactive (in a slot), loading (read, copied or waiting for
        a slot), offloaded (in host memory only).
        """
        with self._lock:
            states = dict.fromkeys(self._host, "offloaded")
            for digest, entry in self._entries.items():
                used = entry.users or digest in self._pins.digests
                states[digest] = "loading" if digest not in self._resident else "active" if used else "inactive"
            return states

    @property
    def counters(self) -> Counters:
        """A copy."""
        with self._lock:
            return replace(self._counters)

    @property
    def host_bytes(self) -> int:
        """Bytes of the adapters in host memory."""
        return self._host_bytes

    def close(self) -> None:
        """Waits for the loads that run, then cancels what waits for a lease."""
        with self._lock:
            self._closed = True
        self._loaders.shutdown(cancel_futures=True)
        self._writer.shutdown(cancel_futures=True)
        for entry in self._entries.values():
            for future, _ in entry.waiting:
                future.cancel()

    # The lock is held in the five functions that follow.

    def _open(self, digest: str, fetch: Fetch, waiting: list[tuple[Future[Lease], float]]) -> _Entry:
        """The entry of a digest with these added to who waits for it; its load is begun if it is new."""
        if self._closed:
            raise RuntimeError("the residency is closed")
        if digest in self._host:
            self._host.move_to_end(digest)
        if digest in self._resident:
            self._counters.hits += len(waiting)
        if (entry := self._entries.get(digest)) is not None:
            entry.waiting += waiting
            return entry
        entry = _Entry(digest, self._host.get(digest), waiting=waiting)
        if isinstance(entry.held, Adapter):
            self._counters.hits += len(waiting)
            return entry
        self._entries[digest] = entry
        if entry.held is None:
            self._loaders.submit(self._load, entry, fetch)
        else:
            self._counters.host_loads += 1
            self._queue.append(entry)
            self._place()
        return entry

    def _granted(self, entry: _Entry) -> list[Future[Lease]]:
        """Those who waited for an adapter that can be used now, counted as its users; `_settle` tells them."""
        if self._resident.get(entry.digest) is not entry and not isinstance(entry.held, Adapter):
            return []
        granted = [future for future, _ in entry.waiting if future.set_running_or_notify_cancel()]
        now = time.monotonic()
        self._counters.waited_seconds += sum(now - since for _, since in entry.waiting)
        entry.users += len(granted)
        entry.waiting.clear()
        return granted

    def _place(self) -> None:
        """Gives slots to loaded adapters, in order, as far as there are any; closes as many in use as adapters still wait."""
        while self._queue and not self._closed:
            entry = self._queue[0]
            slot = self._vacant()
            if slot is None and not all(future.cancelled() for future, _ in entry.waiting):
                break
            self._queue.popleft()
            if slot is None:  # nobody waits for it: it stays in host memory
                del self._entries[entry.digest]
            else:
                entry.slot = slot
                self._writer.submit(self._write, entry)
        unpinned = (entry for entry in self._resident.values() if entry.digest not in self._pins.digests)
        for entry in list(islice(unpinned, max(0, len(self._queue) - self._closing))):
            self._leave(entry)
            entry.closed = True
            self._closing += 1

    def _vacant(self) -> int | None:
        """A slot that is free now, or of the least recently leased adapter that nobody uses or pins; None if there is none."""
        if self._free:
            return self._free.pop()
        idle = next((e for e in self._resident.values() if not e.users and e.digest not in self._pins.digests), None)
        if idle is not None:
            self._leave(idle)
        return None if idle is None else idle.slot

    def _leave(self, entry: _Entry) -> None:
        del self._resident[entry.digest], self._entries[entry.digest]
        self._counters.evictions += 1

    def _keep(self, digest: str, held: FlatAdapter | Adapter) -> None:
        self._host[digest] = held
        self._host_bytes += _nbytes(held)
        while self._host_bytes > self._host_budget:
            self._host_bytes -= _nbytes(self._host.popitem(last=False)[1])

    # It is not held in those that follow.

    def _load(self, entry: _Entry, fetch: Fetch) -> None:
        try:
            artifact = _checked(fetch(), entry.digest)
            if artifact.backbone == self._fingerprint and artifact.shape.dims != self.stack.dims:
                raise AdapterMismatch(f"adapter {entry.digest[:12]} has towers of {artifact.shape.dims}, not {self.stack.dims}")
            adapter = artifact.adapter(self._fingerprint)
            large = max(rank_of(adapter.visual), rank_of(adapter.text)) > self.stack.rank
            held = adapter if large else FlatAdapter.of(adapter, self.stack.dims, pinned=self.stack.device.type == "cuda")
        except BaseException as error:
            self._fail(entry, error)
            return
        with self._lock:
            entry.held = held
            self._counters.blob_loads += 1
            self._keep(entry.digest, held)
            if large:
                del self._entries[entry.digest]
            else:
                self._queue.append(entry)
                self._place()
            granted = self._granted(entry)
        self._settle(entry, granted)

    def _write(self, entry: _Entry) -> None:
        try:
            assert entry.slot is not None and isinstance(entry.held, FlatAdapter)
            self.stack.write(entry.slot, entry.held)
        except BaseException as error:
            self._fail(entry, error)
            return
        with self._lock:
            entry.held = None
            self._resident[entry.digest] = entry
            granted = self._granted(entry)
            self._place()
        self._settle(entry, granted)

    def _fail(self, entry: _Entry, error: BaseException) -> None:
        with self._lock:
            self._counters.failures += 1
            del self._entries[entry.digest]
            if entry.slot is not None:
                self._free.append(entry.slot)
            self._place()
        for future, _ in entry.waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def _settle(self, entry: _Entry, granted: list[Future[Lease]]) -> None:
        for future in granted:
            try:
                adapter = entry.held.to(self.stack.device) if isinstance(entry.held, Adapter) else None
            except BaseException as error:  # the device is full
                future.set_exception(error)
            else:
                future.set_result(Lease(self, entry, adapter))

    def _release(self, lease: Lease) -> None:
        entry = lease._entry
        with self._lock:
            if lease._over:
                return
            lease._over = True
            entry.users -= 1
            if entry.slot is None:
                return
            if not entry.closed:
                self._resident.move_to_end(entry.digest)
            elif not entry.users:
                self._closing -= 1
                self._free.append(entry.slot)
            if not entry.users:
                self._place()


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


def _checked(data: bytes, digest: str) -> Artifact:
    """The adapter file of this digest; the sha256 is taken once, by `unpack`. Raises InvalidAdapter, DamagedAdapter."""
    try:
        artifact = unpack(data)
        intact = artifact.digest == digest
    except InvalidAdapter:
        if hashlib.sha256(data).hexdigest() == digest:
            raise
        intact = False
    if not intact:
        raise DamagedAdapter(f"the file of adapter {digest[:12]} is damaged: its sha256 differs")
    return artifact


def _nbytes(held: FlatAdapter | Adapter) -> int:
    if isinstance(held, FlatAdapter):
        return held.values.nbytes
    towers = [tower for tower in (held.visual, held.text) if tower is not None]
    return sum(t.nbytes for w in towers for t in (w.down_weight, w.down_bias, w.up_weight, w.up_bias))
