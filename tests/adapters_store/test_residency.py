"""Three tiers of adapters under leases: who gets a slot, who waits, and what nobody may ever see."""

import hashlib
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters_store import (
    AdapterMismatch,
    InvalidAdapter,
    Lease,
    LeaseTimeout,
    PinsExhausted,
    Residency,
    pack,
    slots_of,
    unpack,
)
from backbone import Adapter, AdapterShape, AdapterStack, FlatAdapter, Slots, TowerDims, load_backbone

DIMS = TowerDims(24, 2, 16, 2)
FINGERPRINT = "f" * 64


def packed(seed: int, rank: int = 4, scope: str = "both") -> bytes:
    shape = AdapterShape(DIMS, rank, 8 if scope == "both" else 0, scope)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    return pack(shape, FINGERPRINT, {n: torch.randn(s, generator=generator) for n, s in shape.layout().items()})


FILES = {
    hashlib.sha256(data).hexdigest(): data
    for data in (packed(i, (4, 2, 6, 3)[i % 4], ("both", "text", "both", "vision")[i % 4]) for i in range(100))
}
DIGESTS = list(FILES)
ADAPTERS: dict[str, Adapter] = {digest: unpack(data).adapter(FINGERPRINT) for digest, data in FILES.items()}
LARGE = packed(7, rank=12)


def fetch(digest: str) -> Callable[[], bytes]:
    return lambda: FILES[digest]


def forbidden() -> bytes:
    raise AssertionError("no blob is read")


def residency(capacity: int, host_bytes: int = 1 << 30, fingerprint: str = FINGERPRINT) -> Residency:
    stack_bytes = (capacity + 1) * AdapterStack.slot_bytes(DIMS, 8)
    return Residency(fingerprint, DIMS, "cpu", stack_bytes=stack_bytes, host_bytes=host_bytes, rank=8)


@pytest.fixture
def make() -> Iterator[Callable[..., Residency]]:
    made: list[Residency] = []

    def one(*arguments: object, **named: object) -> Residency:
        made.append(residency(*arguments, **named))  # type: ignore[arg-type]
        return made[-1]

    yield one
    for each in made:
        each.close()


def apply(lease: Lease, h: Tensor) -> Tensor:
    """Both kinds of a lease through the text tower's first place, in a batch beside the frozen backbone."""
    adapters = slots_of([lease, None])
    if isinstance(adapters, Slots):
        rows = adapters.stack.rows("text", adapters.index)
        return h if rows is None else rows(torch.stack([h, h]), 0)[0]
    assert isinstance(adapters, list) and adapters[0].text is not None
    return adapters[0].text(h, 0)  # type: ignore[no-any-return]


def expected(digest: str, h: Tensor) -> Tensor:
    text = ADAPTERS[digest].text
    return h if text is None else text(h, 0)


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < limit, "it never came true"
        time.sleep(0.001)


def test_the_first_lease_reads_the_blob_and_the_next_find_it_in_its_slot(make: Callable[..., Residency]) -> None:
    store = make(3)
    a = DIGESTS[0]
    with store.lease(a, fetch(a), 10) as lease:
        assert lease.slot and lease.adapter is None and lease.digest == a
        assert store.states() == {a: "active"}
        torch.testing.assert_close(apply(lease, torch.ones(5, 16)), expected(a, torch.ones(5, 16)))
    assert store.states() == {a: "inactive"}
    with store.lease(a, forbidden, 10) as again, store.lease(a, forbidden, 10) as beside:
        assert again.slot == beside.slot == lease.slot
    assert (store.counters.blob_loads, store.counters.hits) == (1, 2)


def test_the_least_recently_used_goes_to_host_memory_and_comes_back_without_a_blob(make: Callable[..., Residency]) -> None:
    store = make(2)
    a, b, c, d = DIGESTS[:4]
    for digest in (a, b, a, c):
        store.lease(digest, fetch(digest), 10).release()
    assert store.states() == {a: "inactive", b: "offloaded", c: "inactive"}
    with store.lease(b, forbidden, 10) as lease:
        torch.testing.assert_close(apply(lease, torch.ones(5, 16)), expected(b, torch.ones(5, 16)))
        store.lease(d, fetch(d), 10).release()
        assert store.states() == {a: "offloaded", b: "active", c: "offloaded", d: "inactive"}
    assert (store.counters.host_loads, store.counters.blob_loads, store.counters.evictions) == (1, 4, 3)


def test_host_memory_keeps_to_its_budget(make: Callable[..., Residency]) -> None:
    room = 3 * FlatAdapter.of(ADAPTERS[DIGESTS[2]], DIMS).values.nbytes
    store = make(1, host_bytes=room)
    for digest in DIGESTS[:20]:
        store.lease(digest, fetch(digest), 10).release()
        assert store.host_bytes <= room
    assert 3 <= sum(state == "offloaded" for state in store.states().values()) < 19
    nothing = make(1, host_bytes=0)
    nothing.lease(DIGESTS[0], fetch(DIGESTS[0]), 10).release()
    assert nothing.states() == {DIGESTS[0]: "inactive"}


def test_one_load_serves_all_who_ask_at_once(make: Callable[..., Residency]) -> None:
    store = make(2)
    gate, reads = threading.Event(), Counter[str]()
    a, b = DIGESTS[:2]

    def slowly() -> bytes:
        reads[a] += 1
        gate.wait(10)
        return FILES[a]

    futures = [store.request(a, slowly) for _ in range(20)]
    until(lambda: reads[a] == 1)
    assert store.states() == {a: "loading"}
    with store.lease(b, fetch(b), 10):  # a load blocks nobody else
        assert not any(future.done() for future in futures)
    gate.set()
    leases = [future.result(10) for future in futures]
    assert len({lease.slot for lease in leases}) == 1 and reads[a] == 1
    for lease in leases:
        lease.release()
    assert store.states()[a] == "inactive"


def test_a_load_that_fails_tells_all_who_wait_and_leaves_nothing(make: Callable[..., Residency]) -> None:
    store = make(1)
    a, gate = DIGESTS[0], threading.Event()

    def broken() -> bytes:
        gate.wait(10)
        raise OSError("no such blob")

    futures = [store.request(a, broken) for _ in range(5)]
    gate.set()
    for future in futures:
        with pytest.raises(OSError, match="no such blob"):
            future.result(10)
    assert store.states() == {} and store.counters.failures == 1
    store.lease(a, fetch(a), 10).release()  # and the slot is there for the next


def test_a_file_is_checked_before_anyone_gets_it(make: Callable[..., Residency]) -> None:
    a, b = DIGESTS[:2]
    with pytest.raises(InvalidAdapter, match="damaged"):
        make(1).lease(a, fetch(b), 10)
    with pytest.raises(AdapterMismatch):
        make(1, fingerprint="0" * 64).lease(a, fetch(a), 10)
    garbage = b"garbage"
    with pytest.raises(InvalidAdapter, match="not an adapter file"):
        make(1).lease(hashlib.sha256(garbage).hexdigest(), lambda: garbage, 10)


def test_a_copy_that_fails_gives_its_slot_back(make: Callable[..., Residency], monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(1)
    a, b = DIGESTS[:2]
    with monkeypatch.context() as patch:
        patch.setattr(store.stack, "write", lambda slot, adapter: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.lease(a, fetch(a), 10)
    assert store.states() == {a: "offloaded"}
    with store.lease(b, fetch(b), 10) as lease:
        torch.testing.assert_close(apply(lease, torch.ones(5, 16)), expected(b, torch.ones(5, 16)))


def test_a_hundred_adapters_on_eight_slots_are_all_answered(make: Callable[..., Residency]) -> None:
    store = make(8)
    h = torch.randn(5, 16)

    def answer(digest: str) -> None:
        with store.lease(digest, fetch(digest), 60) as lease:
            torch.testing.assert_close(apply(lease, h), expected(digest, h), atol=1e-5, rtol=1e-5)
            time.sleep(0.002)

    with ThreadPoolExecutor(100) as threads:
        for future in [threads.submit(answer, digest) for digest in DIGESTS]:
            future.result(60)
    assert store.counters.blob_loads == 100
    assert set(store.states().values()) == {"inactive", "offloaded"} and len(store.states()) == 100


def test_slots_are_given_in_the_order_of_asking(make: Callable[..., Residency]) -> None:
    store = make(1)
    a, *others = DIGESTS[:6]
    for digest in others:
        store.lease(digest, fetch(digest), 10).release()  # into host memory, so that all are ready when asked for
    first = store.lease(a, fetch(a), 10)
    futures = [store.request(digest, forbidden) for digest in others]
    first.release()
    for i, future in enumerate(futures):
        lease = future.result(10)
        assert not any(later.done() for later in futures[i + 1 :])
        lease.release()


def test_a_favourite_in_endless_use_does_not_starve_the_others(make: Callable[..., Residency]) -> None:
    """Its leases overlap, so that it never has no user; the other gets the slot when those before it end."""
    store = make(1)
    favourite, other = DIGESTS[:2]
    held = store.lease(favourite, fetch(favourite), 10)
    wanted = store.request(other, fetch(other))
    until(lambda: store.states().get(favourite) != "active")  # closed: it waits like everyone else
    overlapping = store.request(favourite, forbidden)
    assert not wanted.done() and not overlapping.done()
    torch.testing.assert_close(apply(held, torch.ones(5, 16)), expected(favourite, torch.ones(5, 16)))
    held.release()
    wanted.result(10).release()
    overlapping.result(10).release()


def test_who_waits_too_long_is_told_and_costs_no_slot(make: Callable[..., Residency]) -> None:
    store = make(1)
    a, b, c = DIGESTS[:3]
    with store.lease(a, fetch(a), 10):
        with pytest.raises(LeaseTimeout, match="found no slot"):
            store.lease(b, fetch(b), 0.05)
        waiting = store.request(c, fetch(c))
    waiting.result(10).release()
    assert store.states()[b] == "offloaded", "nobody waits for it any more"

    def late() -> bytes:
        raise TimeoutError("the blob store is slow")

    with pytest.raises(TimeoutError, match="the blob store is slow") as caught:
        store.lease(DIGESTS[9], late, 10)
    assert not isinstance(caught.value, LeaseTimeout)


def test_a_pinned_adapter_stays_and_one_slot_is_left_for_the_others(make: Callable[..., Residency]) -> None:
    store = make(2)
    a, b, *rest = DIGESTS[:6]
    store.pin(a, "collection 1", "tenant 1")
    store.pin(a, "collection 2", "tenant 2")
    store.lease(a, fetch(a), 10).release()
    with pytest.raises(PinsExhausted, match="1 adapters are pinned in a stack of 2"):
        store.pin(b, "collection 3", "tenant 3")
    for digest in rest:
        store.lease(digest, fetch(digest), 10).release()
    assert store.states()[a] == "active"
    store.unpin("collection 1")
    assert store.states()[a] == "active"
    store.unpin("collection 2")
    store.unpin("collection 4, which has none")
    for digest in rest:
        store.lease(digest, fetch(digest), 10).release()
    assert store.states()[a] == "offloaded" and store.pins() == {}


def test_one_tenant_pins_its_share_and_the_others_still_can(make: Callable[..., Residency]) -> None:
    store = make(8)
    a, b, c = DIGESTS[:3]
    store.pin(a, "a1", "greedy")
    store.pin(b, "b1", "greedy")
    store.pin(a, "a2", "greedy")  # takes no further slot
    with pytest.raises(PinsExhausted, match="2 adapters pinned; one may pin 2"):
        store.pin(c, "c1", "greedy")
    store.pin(c, "c2", "modest")
    assert store.pins() == {"a1": "greedy", "b1": "greedy", "a2": "greedy", "c2": "modest"}


def test_a_collection_has_one_pin_and_what_a_tenant_that_goes_had_is_free_again(make: Callable[..., Residency]) -> None:
    store = make(4)
    a, b, c = DIGESTS[:3]
    for digest in (a, b):
        store.pin(digest, "collection 1", "tenant 1")  # the second one replaces the first
        store.lease(digest, fetch(digest), 10).release()
    assert store.states() == {a: "inactive", b: "active"}
    with pytest.raises(PinsExhausted):
        store.pin(c, "collection 2", "tenant 1")
    for holder, owner in store.pins().items():
        if owner == "tenant 1":
            store.unpin(holder)
    assert store.states() == {a: "inactive", b: "inactive"}
    store.pin(c, "collection 2", "tenant 1")


def test_prefetch_takes_an_idle_slot_and_never_one_in_use(make: Callable[..., Residency]) -> None:
    store = make(1)
    a, b = DIGESTS[:2]
    store.prefetch(a, fetch(a))
    until(lambda: store.states() == {a: "inactive"})
    with store.lease(a, forbidden, 10):
        store.prefetch(b, fetch(b))
        until(lambda: store.states() == {a: "active", b: "offloaded"})
        store.lease(a, forbidden, 10).release()
    store.prefetch(b, forbidden)
    until(lambda: store.states() == {a: "offloaded", b: "inactive"})


def test_an_adapter_too_large_for_the_stack_is_leased_without_a_slot(make: Callable[..., Residency]) -> None:
    store = make(1)
    digest, a = hashlib.sha256(LARGE).hexdigest(), DIGESTS[0]
    h = torch.randn(5, 16)
    small = store.lease(a, fetch(a), 10)
    with store.lease(digest, lambda: LARGE, 10) as lease, store.lease(digest, forbidden, 10) as again:
        assert lease.slot is None and again.slot is None
        text = unpack(LARGE).adapter(FINGERPRINT).text
        assert text is not None
        torch.testing.assert_close(apply(lease, h), text(h, 0))
        rows = slots_of([None, small, lease, small, again])
        assert isinstance(rows, list) and rows[0] is None and rows[1] is rows[3] and rows[2] is rows[4]
        assert rows[1].text is not None
        torch.testing.assert_close(rows[1].text(h, 0), expected(a, h))
    small.release()
    assert store.states() == {digest: "offloaded", a: "inactive"}


def test_what_a_batch_is_given(make: Callable[..., Residency]) -> None:
    store = make(2)
    a, b = DIGESTS[:2]
    with store.lease(a, fetch(a), 10) as one, store.lease(b, fetch(b), 10) as two:
        batch = slots_of([two, None, one, two])
        assert isinstance(batch, Slots) and batch.stack is store.stack
        assert batch.index.tolist() == [two.slot, 0, one.slot, two.slot]
    assert slots_of([None, None]) is None and slots_of([]) is None


def test_released_twice_is_released_once(make: Callable[..., Residency]) -> None:
    store = make(1)
    a, b = DIGESTS[:2]
    one, two = store.lease(a, fetch(a), 10), store.lease(a, forbidden, 10)
    one.release()
    one.release()
    waiting = store.request(b, fetch(b))
    with pytest.raises(TimeoutError):
        waiting.result(0.05)
    two.release()
    waiting.result(10).release()


def test_after_close_nobody_hangs() -> None:
    store = residency(1)
    a, b = DIGESTS[:2]
    lease = store.lease(a, fetch(a), 10)
    waiting = store.request(b, fetch(b))
    until(lambda: store.host_bytes > 0 and b in store.states())
    store.close()
    assert waiting.cancelled()
    lease.release()
    with pytest.raises(RuntimeError, match="closed"):
        store.lease(b, fetch(b), 1)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 9), st.sampled_from([0, 9000, 1 << 20]))
def test_under_a_storm_every_answer_is_right_and_no_slot_in_use_is_written(
    seed: int, capacity: int, known: int, host: int
) -> None:
    store = residency(capacity, host_bytes=host)
    leased: Counter[int] = Counter()
    guard = threading.Lock()
    wrongs: list[str] = []
    plain_write = store.stack.write

    def watched(slot: int, adapter: FlatAdapter) -> None:
        with guard:
            if leased[slot]:
                wrongs.append(f"slot {slot} written under {leased[slot]} leases")
        plain_write(slot, adapter)

    store.stack.write = watched  # type: ignore[method-assign]

    def client(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        for _ in range(12):
            digest = DIGESTS[min(int(rng.expovariate(0.4)), known - 1)]
            h = torch.full((3, 16), rng.random())
            action = rng.random()
            if action < 0.1:
                store.prefetch(digest, fetch(digest))
                continue
            if action < 0.2:
                try:
                    store.pin(digest, str(number), str(number % 2))
                except PinsExhausted:
                    store.unpin(str(number - 1))
                continue
            if action < 0.3:
                store.unpin(str(number))
                continue
            try:
                lease = store.lease(digest, (lambda: b"torn") if action < 0.4 else fetch(digest), 0.001 if action < 0.5 else 30)
            except (InvalidAdapter, LeaseTimeout) as error:
                if action >= 0.5 and isinstance(error, LeaseTimeout):
                    wrongs.append("starved")
                continue  # a torn file of another client is no fault of this one's
            assert lease.slot is not None
            with guard:
                leased[lease.slot] += 1
            for _ in range(rng.randrange(3)):
                if not torch.allclose(apply(lease, h), expected(digest, h), atol=1e-5, rtol=1e-5):
                    wrongs.append(f"{digest[:6]} in slot {lease.slot}")
                time.sleep(rng.random() * 0.002)
            with guard:
                leased[lease.slot] -= 1
            lease.release()

    with ThreadPoolExecutor(6) as threads:
        clients: list[Future[None]] = [threads.submit(client, number) for number in range(6)]
        wait_for(clients, 60)
    for each in clients:
        each.result(0)
    until(lambda: "loading" not in store.states().values())
    store.close()
    assert not wrongs
    entries = store._resident.values()
    assert not store._closing and not store._queue and not any(entry.users or entry.waiting for entry in entries)
    assert sorted(store._free + [entry.slot or 0 for entry in entries]) == list(range(1, capacity + 1)), "no slot is lost"


def test_batches_of_leased_rows_on_three_slots_equal_one_by_one() -> None:
    """The service's way: a client holds one lease from before its row waits until it has the answer; rows are encoded in
    whatever batches come about, with a real backbone.
    """
    backbone = load_backbone("builtin", device="cpu")
    shapes = [AdapterShape(backbone.dims, rank, 0, scope) for rank in (4, 20, 8) for scope in ("text", "vision", "both")]
    files = [pack(s, backbone.fingerprint, {n: 0.1 * torch.randn(size) for n, size in s.layout().items()}) for s in shapes]
    digests = [hashlib.sha256(data).hexdigest() for data in files]
    tokens = backbone.tokenize([f"{'big ' * i}ball" for i in range(4)]).ids
    with torch.inference_mode():
        answers = [backbone.encode_text(tokens, unpack(data).adapter(backbone.fingerprint)) for data in files]
    stack_bytes = 4 * AdapterStack.slot_bytes(backbone.dims, 16)
    store = Residency(backbone.fingerprint, backbone.dims, "cpu", stack_bytes=stack_bytes, host_bytes=3_000_000)
    assert store.capacity == 3
    rows: queue.SimpleQueue[tuple[int, Lease, Future[Tensor]] | None] = queue.SimpleQueue()
    sizes: list[int] = []

    def encoder() -> None:
        while (row := rows.get()) is not None:
            batch = [row]
            with suppress(queue.Empty):
                while (row := rows.get_nowait()) is not None:
                    batch.append(row)
            sizes.append(len(batch))
            try:
                with torch.inference_mode():
                    ids = torch.stack([tokens[text] for text, _, _ in batch])
                    vectors = backbone.encode_text(ids, slots_of([lease for _, lease, _ in batch]))
                for (_, _, future), vector in zip(batch, vectors, strict=True):
                    future.set_result(vector)
            except Exception as error:
                for _, _, future in batch:
                    future.set_exception(error)
            if row is None:
                return

    def client(number: int) -> None:
        rng = random.Random(number)
        for _ in range(8):
            which, text = min(int(rng.expovariate(0.4)), len(files) - 1), rng.randrange(4)
            with store.lease(digests[which], lambda which=which: files[which], 60) as lease:  # type: ignore[misc]
                future: Future[Tensor] = Future()
                rows.put((text, lease, future))
                torch.testing.assert_close(future.result(60), answers[which][text], atol=1e-4, rtol=1e-4)

    encoding = threading.Thread(target=encoder)
    encoding.start()
    try:
        with ThreadPoolExecutor(12) as threads:
            for each in [threads.submit(client, number) for number in range(12)]:
                each.result(60)
    finally:
        rows.put(None)
        encoding.join()
        store.close()
    assert max(sizes) > 2 and store.counters.evictions > 3
