"""Texts of different lengths in one batch, without padding, against each of them alone."""

import pytest
import torch
from torch import Tensor

from backbone import AdapterShape, AdapterStack, Backbone, FlatAdapter, Slots, load_backbone
from backbone.packing import Packing

TEXTS = ["ball", "a red ball and two blue boxes on the left of a snowy field", "", "snow " * 70, "two boxes"]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("builtin")


def shaped(backbone: Backbone) -> tuple[AdapterShape, list[dict[str, Tensor]]]:
    shape = AdapterShape(backbone.dims, 4, 8)
    generator = torch.Generator().manual_seed(0)
    return shape, [{n: 0.1 * torch.randn(s, generator=generator) for n, s in shape.layout().items()} for _ in range(3)]


def test_packing_keeps_each_text_up_to_its_end() -> None:
    packing = Packing.of(torch.tensor([1, 4, 0]))
    assert packing is not None
    x = torch.arange(15.0).view(3, 5, 1)
    assert packing.pack(x).flatten().tolist() == [0, 1, 5, 6, 7, 8, 9, 10]
    assert packing.pad(packing.pack(x))[..., 0].tolist() == [[0, 1, 1, 1, 1], [5, 6, 7, 8, 9], [10] * 5]
    assert packing.pack(x)[packing.last].flatten().tolist() == [1, 9, 10]
    assert Packing.of(torch.tensor([4, 4, 4, 3])) is None, "nothing to gain"


def test_a_batch_of_different_lengths_equals_one_by_one(backbone: Backbone) -> None:
    shape, tensors = shaped(backbone)
    adapters = [None, *(shape.assemble(t) for t in tensors)]
    stack = AdapterStack(backbone.dims, 4)
    for slot, adapter in enumerate(adapters[1:], 1):
        assert adapter is not None
        stack.write(slot, FlatAdapter.of(adapter, backbone.dims))
    tokens = backbone.tokenize(TEXTS).ids
    assert Packing.of(tokens.argmax(-1)) is not None
    index = torch.tensor([1, 0, 3, 2, 1])
    mixed = [adapters[slot] for slot in index]
    with torch.inference_mode():
        alone = torch.cat([backbone.encode_text(row[None], own) for row, own in zip(tokens, mixed, strict=True)])
        torch.testing.assert_close(backbone.encode_text(tokens, Slots(stack, index)), alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(backbone.encode_text(tokens, mixed), alone, atol=1e-5, rtol=1e-5)
        for same in (None, adapters[2]):
            alone = torch.cat([backbone.encode_text(row[None], same) for row in tokens])
            torch.testing.assert_close(backbone.encode_text(tokens, same), alone, atol=1e-5, rtol=1e-5)
            for layers in (0, 2, backbone.dims.text_layers):
                prefix = backbone.text_prefix(tokens, layers)
                expected = backbone.run_text(backbone.trim(tokens), None if same is None else same.text, prefix)
                found = backbone.encode_text(tokens, same, prefix=prefix)
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_do_not_change_with_the_packing(backbone: Backbone, recompute: bool) -> None:
    shape, (tensors, *_) = shaped(backbone)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors.values()]
    adapter, again = (shape.assemble(dict(zip(tensors, leaves, strict=True))) for _ in range(2))
    tokens = backbone.tokenize(TEXTS).ids
    packed = backbone.encode_text(tokens, adapter, recompute=recompute)
    padded = backbone.run_text(backbone.trim(tokens), again.text)
    found = torch.autograd.grad(packed.square().sum(), leaves, allow_unused=True)
    expected = torch.autograd.grad(padded.square().sum(), leaves, allow_unused=True)
    for name, a, b in zip(tensors, found, expected, strict=True):
        assert (a is None) == (b is None) == name.startswith("visual")
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max()), rtol=1e-4)
