"""The towers' products: whichever library computes them, values and gradients are `F.linear`'s."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from backbone.linear import HalfWeights, Linear, Reordered, linear_of, onednn

here = pytest.mark.skipif(linear_of(torch.device("cpu"), torch.float32) is not onednn, reason="needs a torch with oneDNN")


def layer(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((*shape, 24), (40, 24), (40,)))
    return x, weight, bias


@here
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 5), (0,), (0, 5)])
@pytest.mark.parametrize("make", [lambda: onednn, Reordered])
def test_values_are_those_of_torch(make: type[Reordered], shape: tuple[int, ...]) -> None:
    x, weight, bias = layer(*shape)
    linear: Linear = make()
    with torch.no_grad():
        for _ in range(2):  # prepared the first time, found the second
            torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), atol=1e-5, rtol=1e-5)
        part, rest = linear(x, weight[:16], bias[:16]), linear(x, weight[16:], bias[16:])
        torch.testing.assert_close(torch.cat([part, rest], -1), F.linear(x, weight, bias), atol=1e-5, rtol=1e-5)


@here
@pytest.mark.parametrize("shape", [(7,), (3, 5)])
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, True), (True, True, True), (False, False, True)])
def test_gradients_are_those_of_torch(shape: tuple[int, ...], wanted: tuple[bool, bool, bool]) -> None:
    gradients = []
    for linear in (onednn, F.linear):
        tensors = [t.requires_grad_(own) for t, own in zip(layer(*shape), wanted, strict=True)]
        linear(*tensors).square().sum().backward()
        gradients.append([t.grad for t, own in zip(tensors, wanted, strict=True) if own])
        assert all((t.grad is not None) == own for t, own in zip(tensors, wanted, strict=True))
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-5)


@here
def test_autocast_has_torchs_own() -> None:
    """oneDNN's half precision is not on every processor, and autocast would hand it its tensors."""
    x, weight, bias = layer(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = onednn(x, weight, bias), F.linear(x, weight, bias)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_a_gpu_and_half_precision_have_torchs_own() -> None:
    assert linear_of(torch.device("cuda"), torch.float32) is F.linear
    assert linear_of(torch.device("cpu"), torch.bfloat16) is F.linear


def test_halved_weights_are_rounded_and_multiplied_in_float32() -> None:
    if not HalfWeights.available():
        pytest.skip("needs a torch with FBGEMM")
    x, weight, bias = layer(3, 5)
    assert not HalfWeights.lossless([weight]) and HalfWeights.lossless([weight.half().float()])
    torch.testing.assert_close(HalfWeights()(x, weight, bias), F.linear(x, weight.half().float(), bias), atol=1e-5, rtol=1e-5)
