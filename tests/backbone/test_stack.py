"""Batches over a stack of adapters against a loop over their rows, and against the backbone one row at a time."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from backbone import Adapter, AdapterShape, AdapterStack, Backbone, FlatAdapter, Slots, TowerDims, load_backbone
from backbone.stack import blocks, stacked

SMALL = TowerDims(visual_width=192, visual_layers=6, text_width=128, text_layers=4)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")],
    ),
]
POPULARITIES: dict[str, Callable[[int, np.random.Generator], list[int]]] = {
    "distinct": lambda n, rng: list(range(n)),
    "uniform": lambda n, rng: rng.integers(0, 5, n).tolist(),
    "zipf": lambda n, rng: (np.minimum(rng.zipf(1.5, n), 6) - 1).tolist(),
    "identical": lambda n, rng: [1] * n,
    "skewed": lambda n, rng: [0] * (n - 1) + [2],
}
KINDS = [(8, 16, "both"), (4, 0, "text"), (16, 128, "both"), (1, 0, "vision"), (5, 0, "both")]


def made(seed: int, kind: int) -> Adapter:
    """Large enough to change the outputs, biases too."""
    rank, shared, scope = KINDS[kind % len(KINDS)]
    shape = AdapterShape(SMALL, rank, shared, scope)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    return shape.assemble({name: 0.1 * torch.randn(size, generator=generator) for name, size in shape.layout().items()})


def filled(count: int, device: str = "cpu") -> tuple[AdapterStack, list[Adapter | None]]:
    """A stack of `count` slots of mixed ranks and scopes, each written twice, and the adapters that are in it now."""
    stack = AdapterStack(SMALL, max(count, 2), 16, device)
    pinned = device == "cuda"
    for slot in range(1, stack.slots):
        stack.write(slot, FlatAdapter.of(made(1000 + slot, slot + 2), SMALL, pinned))
    adapters: list[Adapter | None] = [None]
    for slot in range(1, stack.slots):
        adapters.append(made(slot, slot))
        stack.write(slot, FlatAdapter.of(made(slot, slot), SMALL, pinned))
    return stack, adapters


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found.cpu(), expected.cpu(), atol=tolerance * float(expected.abs().max()), rtol=tolerance)


def naive(h: Tensor, rows: list[Adapter | None], tower: str, place: int) -> Tensor:
    """h[b] + quick_gelu(h[b] · downᵀ + down_bias) · upᵀ + up_bias, row by row."""
    out = []
    for row, adapter in zip(h, rows, strict=True):
        own = None if adapter is None else getattr(adapter, tower)
        if own is not None:
            z = row @ own.down_weight[place].T + own.down_bias[place]
            row = row + (z * torch.sigmoid(1.702 * z)) @ own.up_weight[place].T + own.up_bias[place]
        out.append(row)
    return torch.stack(out)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("builtin", device="cpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_a_stack_computes_what_a_loop_over_the_rows_does(popularity: str, size: int, device: str) -> None:
    rng = np.random.default_rng(size)
    stack, adapters = filled(max(size, 6), device)
    index = POPULARITIES[popularity](size, rng)
    rows = [adapters[slot] for slot in index]
    for tower, width in (("visual", 192), ("text", 128)):
        apply = stack.rows(tower, torch.tensor(index))
        for tokens in (1, 9):
            h = torch.randn(size, tokens, width, generator=torch.Generator().manual_seed(size))
            for place in (0, 3, 7):
                found = h if apply is None else apply(h.to(device), place)
                close(found, naive(h, rows, tower, place))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("size", [1, 2, 7, 32, 64])
def test_a_batch_of_slots_equals_one_by_one(backbone: Backbone, popularity: str, size: int, device: str) -> None:
    rng = np.random.default_rng(size)
    there = backbone if device == "cpu" else load_backbone("builtin", device=device)
    stack, adapters = filled(max(size, 6), device)
    index = POPULARITIES[popularity](size, rng)
    rows = [adapters[slot] for slot in index]
    tokens = backbone.tokenize([" ".join(["ball"] * int(rng.integers(1, 12))) for _ in range(size)]).ids
    frames = torch.from_numpy(rng.integers(0, 256, (min(size, 32), 3, 64, 64), dtype=np.uint8))
    tolerance = 1e-5 if device == "cpu" else 1e-2
    with torch.inference_mode():
        texts = torch.cat([backbone.encode_text(tokens[i : i + 1], row) for i, row in enumerate(rows)])
        close(there.encode_text(tokens, Slots(stack, torch.tensor(index))), texts, tolerance)
        images = torch.cat([backbone.encode_frames(frames[i : i + 1], rows[i]) for i in range(len(frames))])
        close(there.encode_frames(frames, Slots(stack, torch.tensor(index[: len(frames)]))), images, tolerance)


def test_what_a_batch_needs_decides_the_way_it_is_computed() -> None:
    stack = AdapterStack(SMALL, 5)
    for slot, kind in ((1, 0), (2, 1), (3, 3), (4, 2)):  # rank 8 both, rank 4 text, rank 1 vision, rank 16 both
        stack.write(slot, FlatAdapter.of(made(slot, kind), SMALL))

    def way(tower: str, *index: int) -> tuple[str, int] | None:
        apply = stack.rows(tower, torch.tensor(index))
        return None if apply is None else (type(apply).__name__, getattr(apply, "rank", None) or apply.down_weight.shape[1])  # type: ignore[union-attr]

    assert way("text", 0, 0) is None, "the frozen backbone"
    assert way("text", 0, 3) is None and way("visual", 2, 2) is None, "no row changes this tower"
    assert way("text", 2, 2) == ("TowerAdapter", 4), "one adapter, of its own rank"
    assert way("visual", 0, 3, 2) == ("StackedTower", 1), "no more of the padding than the largest needs"
    assert way("text", 1, 2) == ("StackedTower", 8)
    assert way("text", 1, 4) == ("StackedTower", 16)


def test_slot_0_is_the_zero_adapter_always() -> None:
    stack, _ = filled(3)
    flat = FlatAdapter.of(made(1, 0), SMALL)
    for slot in (0, -1, 3):
        with pytest.raises(ValueError, match=f"slot {slot} cannot be written"):
            stack.write(slot, flat)
    assert stack.adapter(0) == Adapter(None, None)
    assert not stack._memory[0].any()


def test_a_slot_after_a_copy_that_failed_is_whole_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = AdapterStack(SMALL, 3)
    stack.write(2, FlatAdapter.of(made(9, 2), SMALL))
    large, middle, small = (FlatAdapter.of(made(i, kind), SMALL) for i, kind in enumerate((2, 0, 3)))
    stack.write(1, large)
    copied = Tensor.copy_

    def torn(self: Tensor, source: Tensor) -> Tensor:
        copied(self[:3], source[:3])
        raise RuntimeError("torn")

    monkeypatch.setattr(Tensor, "copy_", torn)
    with pytest.raises(RuntimeError, match="torn"):
        stack.write(1, middle)
    monkeypatch.undo()
    stack.write(1, small)
    h = torch.randn(2, 3, 192)
    apply = stack.rows("visual", torch.tensor([1, 2]))
    assert apply is not None
    close(apply(h, 1), naive(h, [made(2, 3), made(9, 2)], "visual", 1))
    assert stack.rows("text", torch.tensor([1, 0])) is None


def test_a_stack_refuses_what_it_cannot_hold(backbone: Backbone) -> None:
    for slots, rank in ((1, 8), (4, 0), (4, 129)):
        with pytest.raises(ValueError, match="two slots or more"):
            AdapterStack(SMALL, slots, rank)
    stack = AdapterStack(SMALL, 3, rank=8)
    with pytest.raises(ValueError, match="rank 8"):
        stack.write(1, FlatAdapter.of(made(0, 2), SMALL))
    tokens = backbone.tokenize(["a"]).ids
    with pytest.raises(ValueError, match="2 slots for a batch of 1 rows"):
        backbone.encode_text(tokens, Slots(stack, torch.tensor([0, 1])))
    for slot in (3, -1):
        with pytest.raises(IndexError, match="of a stack of 3"):
            backbone.encode_text(tokens, Slots(stack, torch.tensor([slot])))
    other = AdapterStack(TowerDims(192, 6, 128, 5), 3)
    with pytest.raises(ValueError, match="text_layers=5"):
        backbone.encode_text(tokens, Slots(other, torch.tensor([0])))


def test_a_flat_adapter_is_one_buffer_of_its_own_values() -> None:
    adapter = made(3, 0)
    flat = FlatAdapter.of(adapter, SMALL)
    assert flat.ranks == (8, 8) and flat.values.is_contiguous() and not flat.values.requires_grad
    visual, text = flat.towers(flat.values)
    assert adapter.visual is not None and adapter.text is not None and visual is not None and text is not None
    assert torch.equal(visual, blocks(adapter.visual, 8)) and torch.equal(text, blocks(adapter.text, 8))
    assert FlatAdapter.of(made(3, 1), SMALL).towers(FlatAdapter.of(made(3, 1), SMALL).values)[0] is None


def test_a_bottleneck_wider_than_the_tower_runs_too() -> None:
    dims = TowerDims(8, 1, 8, 1)
    wide, narrow = AdapterShape(dims, 11, 0), AdapterShape(dims, 2, 0)
    pair = [shape.assemble({n: torch.randn(s) for n, s in shape.layout().items()}) for shape in (wide, narrow)]
    h = torch.randn(3, 4, 8)
    found = stacked([pair[0].text, None, pair[1].text], torch.tensor([2, 1, 0]))(h, 1)
    close(found, naive(h, [pair[1], None, pair[0]], "text", 1))


def test_gradients_of_a_mixed_batch_are_those_of_its_adapters() -> None:
    shape = AdapterShape(SMALL, 4, 0, "text")
    tensors = {name: torch.randn(size).requires_grad_() for name, size in shape.layout().items()}
    adapter, h = shape.assemble(tensors), torch.randn(3, 5, 128, requires_grad=True)
    leaves = [h, *tensors.values()]

    def gradients(out: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(out.square().sum(), leaves))

    mixed = gradients(stacked([adapter.text, None], torch.tensor([0, 1, 0]))(h, 3))
    for found, expected in zip(mixed, gradients(naive(h, [adapter, None, adapter], "text", 3)), strict=True):
        close(found, expected)


def test_no_gradient_reaches_an_adapter_through_a_stack_and_none_is_wrong(backbone: Backbone) -> None:
    shape = AdapterShape(SMALL, 4)
    tensors = {name: torch.randn(size).requires_grad_() for name, size in shape.layout().items()}
    stack = AdapterStack(SMALL, 3)
    stack.write(1, FlatAdapter.of(shape.assemble(tensors), SMALL))
    out = backbone.encode_text(backbone.tokenize(["a", "b"]).ids, Slots(stack, torch.tensor([0, 1])))
    with pytest.raises(RuntimeError, match="does not require grad"):
        out.sum().backward()
    h = torch.randn(1, 3, 128, requires_grad=True)
    apply = stack.rows("text", torch.tensor([1]))
    assert apply is not None
    out = apply(h, 0)
    stack.write(2, FlatAdapter.of(made(5, 0), SMALL))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
