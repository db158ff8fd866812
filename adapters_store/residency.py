"""Which adapters are on the device: each is fetched by its digest, checked, and kept in a slot while it is leased.

A caller leases an adapter while its rows are encoded. A leased slot is never written; of the others the least recently used
one is taken first. Each digest is loaded once, however many ask for it, on threads of their own. Loaded adapters for which no
slot is free wait in line. For each of them one adapter in use, the least recently leased, is closed: new leases of it wait in
line as well, and its slot is free when its last lease is released. So no adapter waits for ever. A row holds one lease only,
so rows never wait for each other.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

import torch

from adapters_store.artifact import AdapterMismatch, Artifact, DamagedAdapter, InvalidAdapter, unpack
from adapters_store.lease import Counters, Entry, Lease, LeaseTimeout
from adapters_store.pins import Pins
from backbone import VOCABULARY_ROWS, Adapter, AdapterStack, FlatAdapter, TowerDims, threads
from backbone.stack import rank_of

LOADERS = 8
Fetch = Callable[[], bytes]


class Residency:
    """The adapters of one backbone; safe to use from several threads. `capacity` adapters can be leased at a time.

    `stack_bytes` of the device are taken at once, for adapters of up to `rank` in `dtype`; larger ones are leased without a
    slot, as an `Adapter`, and stay in host memory. `host_bytes` bound what is kept there, copies of what is in the stack among
    it, so that nothing is copied back when a slot is taken. `tokens` is how many token ids the backbone has; without them
    adapters with vocabulary rows have no slot either. One owner may pin `pin_share` (0 to 1) of the slots.
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
        tokens: int = 0,
        pin_share: float = 0.25,
    ) -> None:
        words = VOCABULARY_ROWS if tokens else 0
        slots = max(2, stack_bytes // AdapterStack.slot_bytes(dims, rank, dtype, words=words, tokens=tokens))
        self.stack = AdapterStack(dims, slots, rank, device, dtype, words=words, tokens=tokens)
        self.capacity = slots - 1
        self._fingerprint, self._host_budget = fingerprint, host_bytes
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}  # loading or resident, and open to leases
        self._resident: OrderedDict[str, Entry] = OrderedDict()  # of those, the ones in a slot; last leased, last
        self._host: OrderedDict[str, FlatAdapter | Adapter] = OrderedDict()
        self._host_bytes = 0
        self._free = list(range(1, slots))
        self._queue: deque[Entry] = deque()  # loaded, wanting a slot
        self._closing = 0  # entries in use that will give up their slot
        self._pins = Pins(self.capacity, pin_share)
        self._closed = False
        self._counters = Counters()
        self._loaders = ThreadPoolExecutor(LOADERS, "adapter-load", threads.alone)
        self._writer = ThreadPoolExecutor(1, "adapter-write", threads.alone)

    def lease(self, digest: str, fetch: Fetch, timeout: float | None = None) -> Lease:
        """A lease of the adapter of this digest, waited for; `fetch` reads its file where it is not in memory.

        Raises DamagedAdapter if the file is not what the digest names, AdapterMismatch if it is for another backbone, what
        `fetch` raises, and LeaseTimeout after `timeout` seconds. A caller that holds a lease and asks for another one gives a
        timeout: the two may wait for each other.
        """
        future = self.request(digest, fetch)
        try:
            return future.result(timeout)
        except TimeoutError:
            if future.cancel():
                raise LeaseTimeout(f"adapter {digest[:12]} found no slot, or was not loaded, in {timeout} s") from None
            return future.result()  # granted in this very moment, or the load's own error

    def request(self, digest: str, fetch: Fetch) -> Future[Lease]:
        """`lease` without waiting. Where `cancel` of the future returns False, it has a lease that must be released."""
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

    # Called with the lock held:

    def _open(self, digest: str, fetch: Fetch, waiting: list[tuple[Future[Lease], float]]) -> Entry:
        """The entry of a digest, with `waiting` added to its own; a new entry is loaded, or takes its place in the line."""
        if self._closed:
            raise RuntimeError("the residency is closed")
        if digest in self._host:
            self._host.move_to_end(digest)
        if digest in self._resident:
            self._counters.hits += len(waiting)
        if (entry := self._entries.get(digest)) is not None:
            entry.waiting += waiting
            return entry
        entry = Entry(digest, self._host.get(digest), waiting=waiting)
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

    def _granted(self, entry: Entry) -> list[Future[Lease]]:
        """If the adapter can be used now: the futures that waited for it, counted as its users. `_settle` gives them leases."""
        if self._resident.get(entry.digest) is not entry and not isinstance(entry.held, Adapter):
            return []
        granted = [future for future, _ in entry.waiting if future.set_running_or_notify_cancel()]
        now = time.monotonic()
        self._counters.waited_seconds += sum(now - since for _, since in entry.waiting)
        entry.users += len(granted)
        entry.waiting.clear()
        return granted

    def _place(self) -> None:
        """Gives the free slots to the adapters first in the line. For each that still waits then, closes one in use."""
        while self._queue and not self._closed:
            entry = self._queue[0]
            slot = self._vacant()
            if slot is None and not all(future.cancelled() for future, _ in entry.waiting):
                break
            self._queue.popleft()
            if slot is None:  # all its leases were cancelled: it stays in host memory
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
        """A free slot, or that of the least recently leased adapter without lease and pin; None if there is neither."""
        if self._free:
            return self._free.pop()
        idle = next((e for e in self._resident.values() if not e.users and e.digest not in self._pins.digests), None)
        if idle is not None:
            self._leave(idle)
        return None if idle is None else idle.slot

    def _leave(self, entry: Entry) -> None:
        del self._resident[entry.digest], self._entries[entry.digest]
        self._counters.evictions += 1

    def _keep(self, digest: str, held: FlatAdapter | Adapter) -> None:
        self._host[digest] = held
        self._host_bytes += _nbytes(held)
        while self._host_bytes > self._host_budget:
            self._host_bytes -= _nbytes(self._host.popitem(last=False)[1])

    # Called without it:

    def _load(self, entry: Entry, fetch: Fetch) -> None:
        try:
            artifact = _checked(fetch(), entry.digest)
            if artifact.backbone == self._fingerprint and artifact.shape.dims != self.stack.dims:
                raise AdapterMismatch(f"adapter {entry.digest[:12]} has towers of {artifact.shape.dims}, not {self.stack.dims}")
            adapter = artifact.adapter(self._fingerprint)
            large = max(rank_of(adapter.visual), rank_of(adapter.text)) > self.stack.rank
            large = large or len(artifact.shape.vocabulary) > self.stack.words
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

    def _write(self, entry: Entry) -> None:
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

    def _fail(self, entry: Entry, error: BaseException) -> None:
        with self._lock:
            self._counters.failures += 1
            del self._entries[entry.digest]
            if entry.slot is not None:
                self._free.append(entry.slot)
            self._place()
        for future, _ in entry.waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def _settle(self, entry: Entry, granted: list[Future[Lease]]) -> None:
        for future in granted:
            try:
                adapter = entry.held.to(self.stack.device) if isinstance(entry.held, Adapter) else None
            except BaseException as error:  # the device is full
                future.set_exception(error)
            else:
                future.set_result(Lease(entry, self.stack, self._release, adapter))

    def _release(self, lease: Lease) -> None:
        entry = lease.entry
        with self._lock:
            if lease.released:
                return
            lease.released = True
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
    rows = 0 if held.vocabulary is None else held.vocabulary.rows.nbytes
    return rows + sum(t.nbytes for w in towers for t in (w.down_weight, w.down_bias, w.up_weight, w.up_bias))
