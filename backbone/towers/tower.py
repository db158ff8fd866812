"""What a backbone needs of a tower, and the one loop over its blocks, so that adapters stand inside them as arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from backbone.linear import Linear
from backbone.packing import Packing
from backbone.stack import StackedTower

Apply = Callable[[Tensor, int], Tensor]  # h (B, T, d) and its place → h with the adapters on it


class UnsupportedBackbone(ValueError):
    """The architecture has blocks, or pools in a way, that are not computed here."""


class Block(Protocol):
    """One block: `x + attention(x)`, then `x + mlp(x)`. The two adapter places are the results of these two."""

    def attention(
        self, x: Tensor, aside: Tensor | None, asking: Tensor | None, packing: Packing | None, linear: Linear
    ) -> Tensor:
        """x (B, T, d), or (N, d) of a packing → the same shape, or (B, 1, d) of the tokens that are `asking` (B,)."""

    def mlp(self, x: Tensor, linear: Linear) -> Tensor:
        """x (…, d) → (…, d)."""


class Tower(Protocol):
    """A frozen tower. Its parts keep no tensors of their own: all are the model's.

    `embed` → the blocks → `pool`. `token` says which token alone is read after the last block, None where `pool` reads all.
    """

    width: int
    blocks: Sequence[Block]

    def embed(self, inputs: Tensor) -> Tensor:
        """Tokens (B, T) or pixels (B, 3, S, S) → (B, T, width)."""

    def aside(self, length: int) -> Tensor | None:
        """What the attention of every block reads beside `length` tokens: a mask, or rotary positions."""

    def token(self, inputs: Tensor) -> Tensor | None:
        """(B,) the position of the one token that `pool` reads."""

    def pool(self, x: Tensor, inputs: Tensor | None) -> Tensor:
        """(B, T, width), or (B, 1, width) of that token → (B, embed_dim)."""

    def compute_in(self, dtype: torch.dtype) -> None:
        """Keeps the weights of the blocks' products in `dtype`."""

    def facts(self) -> dict[str, Any]:
        """What its vectors depend on beside the weights; JSON."""


def run_blocks(
    x: Tensor,
    blocks: Sequence[Block],
    linear: Linear,
    apply: Apply | None,
    aside: Tensor | None,
    first: int = 0,
    *,
    pool: Tensor | None = None,
    packing: Packing | None = None,
    recompute: bool = False,
) -> Tensor:
    """x (B, T, d), or (N, d) of a packing, through a tower's blocks from `first` on; (B, 1, d) where `pool` (B,) says which
    token is wanted.

    Semantics: x + A(attention(x)), then x + A(mlp(x)), block by block. The last block computes the pooled token only: the
    others are not used after it.
    """

    def adapted(h: Tensor, place: int) -> Tensor:
        if apply is None or packing is None or h.ndim == 3 or not isinstance(apply, StackedTower):
            return h if apply is None else apply(h, place)
        return packing.pack(apply(packing.pad(h), place))

    def run(x: Tensor, layer: int) -> Tensor:
        block = blocks[layer]
        asking = pool if layer == len(blocks) - 1 else None
        h = block.attention(x, aside, asking, packing, linear)
        x = token_of(x, asking, packing) + adapted(h, 2 * layer)
        return x + adapted(block.mlp(x, linear), 2 * layer + 1)

    for layer in range(first, len(blocks)):
        x = checkpoint(run, x, layer, use_reentrant=False) if recompute else run(x, layer)
    return x


def token_of(x: Tensor, position: Tensor | None, packing: Packing | None) -> Tensor:
    """x (B, T, d) → (B, 1, d) at `position` (B,), or at the text's end in a packing; x itself where `position` is None."""
    if position is None:
        return x
    return (x[torch.arange(len(x), device=x.device), position] if packing is None else x[packing.last]).unsqueeze(1)
