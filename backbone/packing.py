"""Texts of different lengths without padding: where each token of a batch lies when only real ones are kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WORTH = 0.9  # of the padded batch: with more tokens than this the copies cost what the products save


@dataclass(frozen=True, slots=True)
class Packing:
    """A batch (B, T, d) as (N, d): the tokens up to each text's end, text after text.

    What works token by token (norms, products) is done on N rows; attention, and adapters that differ from row to row,
    see the padded batch. Beyond a text's end stand copies of its last token there: attention is causal, nobody reads them.
    """

    kept: Tensor  # (N,) places among the B · T
    source: Tensor  # (B, T) the packed row that stands at each place
    last: Tensor  # (B,) the packed row of each text's end

    @classmethod
    def of(cls, ends: Tensor) -> Packing | None:
        """For texts that end at `ends` (B,); None where they are about as long as the longest."""
        inside = torch.arange(int(ends.max()) + 1, device=ends.device) <= ends[:, None]  # (B, T)
        if int(inside.sum()) > WORTH * inside.numel():
            return None
        source = inside.flatten().cumsum(0).sub_(1).view_as(inside)
        return cls(inside.flatten().nonzero()[:, 0], source, source[:, -1])

    def pack(self, x: Tensor) -> Tensor:
        """x (B, T, d) → (N, d)."""
        return x.flatten(0, 1).index_select(0, self.kept)

    def pad(self, x: Tensor) -> Tensor:
        """x (N, d) → (B, T, d)."""
        return x.index_select(0, self.source.flatten()).view(*self.source.shape, -1)
