"""How x · weightᵀ + bias is computed: the towers' linear layers, where nearly all of a forward's time goes.

On a GPU, and in half precision, torch's own. On a CPU torch multiplies float32 with MKL, which leaves the wide registers of
processors other than Intel's unused; oneDNN, in torch as well, uses them: on an AMD EPYC (Zen 5) it takes 0.45 of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Linear = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x (…, d), weight (e, d), bias (e,) → (…, e), all of one dtype. Semantics: `F.linear`."""


def linear_of(device: torch.device, dtype: torch.dtype) -> Linear:
    """The fastest that has gradients in x, weight and bias."""
    onednn_here = device.type == "cpu" and dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return onednn if onednn_here and torch.backends.mkldnn.is_available() else F.linear


def onednn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear` in float32 on a CPU, by oneDNN. Under autocast torch's own: half precision is not on every processor."""
    if torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _OneDNN.apply(x, weight, bias)  # type: ignore[no-any-return]
    return _product(x, weight, bias)


class _OneDNN(torch.autograd.Function):
    """The operator has no gradients of its own: those of a linear layer are products again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            _product(gradient, weight.T) if of_x else None,
            _product(rows.T, x.flatten(0, -2).T) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


class _Prepared:
    """A linear layer of weights that never change, for inference: each is prepared when it is first met, in a copy.

    A single text reads all weights of its tower for a dozen tokens, so memory is what it waits for.
    """

    def __init__(self) -> None:
        self._prepared: dict[tuple[int, int], Any] = {}

    def _of(self, weight: Tensor, prepare: Callable[[Tensor], Any]) -> Any:
        key = weight.data_ptr(), len(weight)  # views of one weight differ in their length
        if (prepared := self._prepared.get(key)) is None:
            prepared = self._prepared[key] = prepare(weight.detach().contiguous())
        return prepared


class Reordered(_Prepared):
    """`onednn` with the weights in its own order of memory: a single text takes 0.7 of the time, 32 texts 0.95."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _product(x, self._of(weight, torch.ops.mkldnn._reorder_linear_weight), bias)


class HalfWeights(_Prepared):
    """Kept as float16 and multiplied in float32 (FBGEMM). Semantics: `F.linear(x, weight.half().float(), bias)`.

    A single text takes 0.9 of what it takes with `Reordered`, and the copies are half as large. OpenAI's weights and the
    built-in ones were published as float16: nothing is lost there.
    """

    @staticmethod
    def available() -> bool:
        return torch.backends.quantized.engine in ("x86", "fbgemm") and hasattr(torch.ops.quantized, "linear_dynamic_fp16")

    @staticmethod
    def lossless(weights: Iterable[Tensor]) -> bool:
        """Whether all of these float32 values are float16 values."""
        return all(torch.equal(weight.half().float(), weight) for weight in weights)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        packed = self._of(weight, lambda own: torch.ops.quantized.linear_prepack_fp16(own, bias.detach()))
        return torch.ops.quantized.linear_dynamic_fp16(x, packed)  # type: ignore[no-any-return]
