"""Batches rounded up to the sizes of the graphs against the backbone's own forward: on a CPU everything but the capture."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from backbone import Adapter, AdapterShape, AdapterStack, Backbone, FlatAdapter, Graphs, Slots, load_backbone

ON = [
    ("cpu", torch.float32, 1e-5),
    *(
        pytest.param(
            ("cuda", dtype, tolerance),
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")],
            id=f"cuda-{dtype}",
        )
        for dtype, tolerance in ((torch.float32, 1e-2), (torch.float16, 1e-2), (torch.bfloat16, 1e-2))
    ),
]
SHAPES = ((8, 16, "both"), (4, 0, "text"), (16, 128, "both"), (1, 0, "vision"))


@pytest.fixture(scope="module")
def plain() -> Backbone:
    return load_backbone("builtin")


def made(seed: int, plain: Backbone) -> Adapter:
    rank, shared, scope = SHAPES[seed % len(SHAPES)]
    shape = AdapterShape(plain.dims, rank, shared, scope)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    return shape.assemble({name: 0.1 * torch.randn(size, generator=generator) for name, size in shape.layout().items()})


@pytest.fixture(scope="module", params=ON, ids=lambda on: on[0])
def there(request: pytest.FixtureRequest, plain: Backbone) -> tuple[Graphs, AdapterStack, list[Adapter | None], float]:
    """Graphs for up to 12 texts and 6 frames, a stack of 9 slots and the adapters in it, and how near is near."""
    device, dtype, tolerance = request.param
    backbone = plain if device == "cpu" else load_backbone("builtin", device=device, dtype=dtype)
    stack = AdapterStack(plain.dims, 9, 16, device, dtype)
    adapters = [None if slot == 0 else made(slot, plain) for slot in range(9)]
    for slot, adapter in enumerate(adapters):
        if adapter is not None:
            stack.write(slot, FlatAdapter.of(adapter, plain.dims, pinned=device == "cuda"))
    return Graphs(backbone, stack, texts=12, frames=6), stack, adapters, tolerance


def near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.dtype == torch.float32 and found.device.type == "cpu"
    relative = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(relative.max()) <= tolerance


def batch(plain: Backbone, rows: int, seed: int) -> tuple[Tensor, Tensor, list[int]]:
    rng = np.random.default_rng(seed)
    texts = [" ".join(["ball"] * int(rng.choice((1, 3, 7, 20, 60)))) for _ in range(rows)]
    pixels = torch.from_numpy(rng.integers(0, 256, (rows, 3, 64, 64), dtype=np.uint8))
    return plain.tokenize(texts).ids, pixels, rng.integers(0, 9, rows).tolist()


@pytest.mark.parametrize("rows", [12, 1, 2, 3, 5, 6, 7])
def test_what_a_batch_is_filled_up_with_changes_nothing(
    plain: Backbone, there: tuple[Graphs, AdapterStack, list[Adapter | None], float], rows: int
) -> None:
    graphs, stack, adapters, tolerance = there
    for seed in (rows, 100 + rows):  # the second finds what the first left in the buffers
        tokens, pixels, index = batch(plain, rows, seed)
        own, slots = [adapters[slot] for slot in index], Slots(stack, torch.tensor(index))
        pixels = pixels[:6]
        with torch.inference_mode():
            near(graphs.encode_text(tokens, slots), plain.encode_text(tokens, own), tolerance)
            near(graphs.encode_text(tokens), plain.encode_text(tokens), tolerance)
            few = Slots(stack, slots.index[:6])
            near(graphs.encode_frames(pixels, few), plain.encode_frames(pixels, own[:6]), tolerance)
            near(graphs.encode_frames(pixels), plain.encode_frames(pixels), tolerance)


def test_a_slot_that_is_written_counts_from_the_next_batch_on(
    plain: Backbone, there: tuple[Graphs, AdapterStack, list[Adapter | None], float]
) -> None:
    graphs, stack, adapters, tolerance = there
    tokens, slots = plain.tokenize(["a red ball", "snow"]).ids, Slots(stack, torch.tensor([1, 2]))
    before, there_from = graphs.encode_text(tokens, slots), stack._memory.data_ptr()
    for adapter in (made(4, plain), adapters[1]):
        assert adapter is not None
        stack.write(1, FlatAdapter.of(adapter, plain.dims, pinned=stack.device.type == "cuda"))
        with torch.inference_mode():
            near(graphs.encode_text(tokens, slots), plain.encode_text(tokens, [adapter, adapters[2]]), tolerance)
    assert stack._memory.data_ptr() == there_from, "graphs read this memory"
    assert torch.equal(graphs.encode_text(tokens, slots), before), "the same kernels on the same values"


def test_what_no_graph_is_for_goes_to_the_backbone(
    plain: Backbone, there: tuple[Graphs, AdapterStack, list[Adapter | None], float]
) -> None:
    graphs, stack, adapters, tolerance = there
    known = len(graphs._captured)
    tokens, pixels, index = batch(plain, 13, 7)
    own, slots = [adapters[slot] for slot in index], Slots(stack, torch.tensor(index))
    device = stack.device
    away = [None if adapter is None else adapter.to(device) for adapter in own]
    with torch.inference_mode():
        near(graphs.encode_text(tokens, slots), plain.encode_text(tokens, own), tolerance)
        near(graphs.encode_frames(pixels, slots), plain.encode_frames(pixels, own), tolerance)
        near(graphs.encode_text(tokens[:3], away[:3]), plain.encode_text(tokens[:3], own[:3]), tolerance)
        near(graphs.encode_frames(pixels[:2].float()), plain.encode_frames(pixels[:2].float()), tolerance)
    assert len(graphs._captured) == known
    with pytest.raises(ValueError, match="1 slots for a batch of 2 rows"):
        graphs.encode_text(tokens[:2], Slots(stack, torch.tensor([1])))
    with pytest.raises(IndexError, match="of a stack of 9"):
        graphs.encode_text(tokens[:1], Slots(stack, torch.tensor([9])))
    with pytest.raises(ValueError, match=r"\(N, 3, 64, 64\)"):
        graphs.encode_frames(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_after_the_start_no_batch_waits_for_a_capture(
    plain: Backbone, there: tuple[Graphs, AdapterStack, list[Adapter | None], float]
) -> None:
    graphs, stack, _, _ = there
    graphs.warm()
    known = dict(graphs._captured)
    texts = {(rows, length) for rows in (1, 3, 6, 12) for length in (8, 16, 24, 32, 77)}
    assert known.keys() == texts | {(rows, 3, 64, 64) for rows in (1, 3, 6)}
    for rows in range(1, 13):
        tokens, pixels, index = batch(plain, rows, rows)
        graphs.encode_text(tokens, Slots(stack, torch.tensor(index)))
        graphs.encode_frames(pixels[:6], Slots(stack, torch.tensor(index[:6])))
    assert graphs._captured == known


def test_threads_that_share_the_graphs_get_their_own_vectors(
    plain: Backbone, there: tuple[Graphs, AdapterStack, list[Adapter | None], float]
) -> None:
    graphs, stack, _, tolerance = there
    jobs = [(t, p[:6], Slots(stack, torch.tensor(i))) for t, p, i in (batch(plain, rows, rows) for rows in (3, 3, 5, 6))]
    alone = [(graphs.encode_text(t, s), graphs.encode_frames(p, s)) for t, p, s in jobs]

    def work(number: int) -> None:
        tokens, pixels, slots = jobs[number]
        for _ in range(5):
            found = graphs.encode_text(tokens, slots), graphs.encode_frames(pixels, slots)
            for a, b in zip(found, alone[number], strict=True):  # not to the bit: OpenMP counts its threads for each thread
                near(a, b, tolerance)

    with ThreadPoolExecutor(len(jobs)) as threads:
        list(threads.map(work, range(len(jobs))))


def test_a_size_that_cannot_be_captured_is_computed_all_the_same(
    plain: Backbone, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    stack = AdapterStack(plain.dims, 3, 16)
    adapters = [made(seed, plain) for seed in (1, 2)]
    for slot, adapter in enumerate(adapters, 1):
        stack.write(slot, FlatAdapter.of(adapter, plain.dims))
    graphs = Graphs(plain, stack, texts=2, frames=2)
    monkeypatch.setattr(graphs, "_pool", object())  # as on a GPU
    monkeypatch.setattr("backbone.graphs._graph", fails)
    graphs.warm()
    assert "no CUDA graph of size (2, 8)" in caplog.text
    (tokens, pixels, _), slots = batch(plain, 2, 0), Slots(stack, torch.tensor([1, 2]))
    with torch.inference_mode():
        near(graphs.encode_text(tokens, slots), plain.encode_text(tokens, adapters), 1e-5)
        near(graphs.encode_frames(pixels, slots), plain.encode_frames(pixels, adapters), 1e-5)
