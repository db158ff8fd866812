"""A tower's residual blocks, computed here and not in open_clip, so that adapters stand inside them as arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from backbone.linear import Linear
from backbone.packing import Packing
from backbone.stack import SLOPE, StackedTower

Apply = Callable[[Tensor, int], Tensor]  # h (B, T, d) and its place → h with the adapters on it


def run_blocks(
    x: Tensor,
    blocks: Sequence[Any],
    linear: Linear,
    apply: Apply | None,
    mask: Tensor | None,
    first: int = 0,
    *,
    pool: Tensor | None = None,
    packing: Packing | None = None,
    recompute: bool = False,
) -> Tensor:
    """x (B, T, d), or (N, d) of a packing, through a tower's blocks from `first` on; (B, 1, d) where `pool` (B,) says which
    token is wanted.

    Semantics: x + A(attn(ln_1(x))), then x + A(mlp(ln_2(x))), block by block. The last block computes
    the pooled token only: the others are not used after it.
    """

    def adapted(h: Tensor, place: int) -> Tensor:
        if apply is None or packing is None or h.ndim == 3 or not isinstance(apply, StackedTower):
            return h if apply is None else apply(h, place)
        return packing.pack(apply(packing.pad(h), place))

    def run(x: Tensor, layer: int) -> Tensor:
        block = blocks[layer]
        asking = pool if layer == len(blocks) - 1 else None
        h = block.ls_1(_attention(block.attn, block.ln_1(x), mask, asking, packing, linear))
        x = _token(x, asking, packing) + adapted(h, 2 * layer)
        h = block.ls_2(_mlp(block.mlp, block.ln_2(x), linear))
        return x + adapted(h, 2 * layer + 1)

    for layer in range(first, len(blocks)):
        x = checkpoint(run, x, layer, use_reentrant=False) if recompute else run(x, layer)
    return x


def _token(x: Tensor, position: Tensor | None, packing: Packing | None) -> Tensor:
    """x (B, T, d) → (B, 1, d) at `position` (B,), or at the text's end in a packing; x itself where `position` is None."""
    if position is None:
        return x
    return (x[torch.arange(len(x), device=x.device), position] if packing is None else x[packing.last]).unsqueeze(1)


def _attention(
    attn: nn.MultiheadAttention,
    x: Tensor,
    mask: Tensor | None,
    asking: Tensor | None,
    packing: Packing | None,
    linear: Linear,
) -> Tensor:
    """x (B, T, d) or (N, d) → the same shape, or (B, 1, d) of the tokens that are `asking` (B,).

    Semantics: `attn(x, x, x, attn_mask=mask)`, without its copies to (T, B, d) and back, in the weights' dtype.
    """
    x, width = x.to(attn.in_proj_weight.dtype), x.shape[-1]
    heads = (attn.num_heads, width // attn.num_heads)
    if asking is None:
        qkv = linear(x, attn.in_proj_weight, attn.in_proj_bias)  # (B, T, 3d)
        qkv = qkv if packing is None else packing.pad(qkv)
        q, k, v = qkv.unflatten(2, (3, *heads)).permute(2, 0, 3, 1, 4).unbind()  # (B, heads, T, d / heads)
    else:
        (of_q, of_kv), (bias_q, bias_kv) = (t.split((width, 2 * width)) for t in (attn.in_proj_weight, attn.in_proj_bias))
        q = linear(_token(x, asking, packing), of_q, bias_q).unflatten(2, heads).transpose(1, 2)  # (B, heads, 1, d / heads)
        kv = linear(x, of_kv, bias_kv)
        kv = kv if packing is None else packing.pad(kv)
        k, v = kv.unflatten(2, (2, *heads)).permute(2, 0, 3, 1, 4).unbind()
        mask = None if mask is None else mask[asking][:, None, None]  # (B, 1, 1, T)
    mixed = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask.to(q.dtype))
    mixed = mixed.transpose(1, 2).flatten(2)  # (B, T, d)
    mixed = mixed if packing is None or asking is not None else packing.pack(mixed)
    return linear(mixed, attn.out_proj.weight, attn.out_proj.bias)


def _mlp(mlp: Any, x: Tensor, linear: Linear) -> Tensor:
    """x (…, d) → (…, d). Semantics: `mlp(x)`, in the weights' dtype.

    h · sigmoid(1.702 h) is silu(1.702 h) / 1.702, in one pass over h and two factors, which torch's product takes in.
    """
    expand, activation, project = mlp
    x = x.to(expand.weight.dtype)
    if not isinstance(activation, QuickGELU):
        return linear(activation(linear(x, expand.weight, expand.bias)), project.weight, project.bias)
    rows = x.flatten(0, -2)  # (B · T, d)
    if linear is F.linear:
        h = torch.addmm(expand.bias, rows, expand.weight.T, beta=SLOPE, alpha=SLOPE)  # (B · T, 4d)
        return torch.addmm(project.bias, F.silu(h), project.weight.T, alpha=1 / SLOPE).view_as(x)
    h = linear(rows, expand.weight, expand.bias).mul_(SLOPE)
    return linear(F.silu(h).mul_(1 / SLOPE), project.weight, project.bias).view_as(x)
