"""Linear layers on a CPU whose weights are kept as float16 and multiplied in float32 (FBGEMM).

A single text reads all weights of its tower for a dozen tokens, so memory is what it waits for, and half the bytes are half the
time. OpenAI's weights and the built-in ones were published as float16: nothing is lost. Only for inference: no gradients.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class HalfWeights:
    """`linear` of weights that never change, each packed when it is first met."""

    def __init__(self) -> None:
        self._packed: dict[tuple[int, int], Any] = {}

    @staticmethod
    def available() -> bool:
        return torch.backends.quantized.engine in ("x86", "fbgemm") and hasattr(torch.ops.quantized, "linear_dynamic_fp16")

    @staticmethod
    def lossless(weights: Iterable[Tensor]) -> bool:
        """Whether all of these float32 values are float16 values."""
        return all(torch.equal(weight.half().float(), weight) for weight in weights)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x (…, d) float32 → (…, e). Semantics: `F.linear(x, weight.half().float(), bias)`."""
        key = weight.data_ptr(), len(weight)  # views of one weight differ in their length
        if (packed := self._packed.get(key)) is None:
            packed = self._packed[key] = torch.ops.quantized.linear_prepack_fp16(weight.detach().contiguous(), bias.detach())
        return torch.ops.quantized.linear_dynamic_fp16(x, packed)  # type: ignore[no-any-return]
