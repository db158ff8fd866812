"""open_clip's own towers: plain residual blocks, of text and of vision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, text_global_pool
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.linear import Linear
from backbone.packing import Packing
from backbone.stack import SLOPE
from backbone.towers.tower import Block, UnsupportedBackbone, token_of


class ResidualBlock:
    """`x + ls_1(attn(ln_1(x)))`, then `x + ls_2(mlp(ln_2(x)))`."""

    def __init__(self, block: Any) -> None:
        self._block = block

    def attention(
        self, x: Tensor, aside: Tensor | None, asking: Tensor | None, packing: Packing | None, linear: Linear
    ) -> Tensor:
        block = self._block
        return block.ls_1(_attention(block.attn, block.ln_1(x), aside, asking, packing, linear))  # type: ignore[no-any-return]

    def mlp(self, x: Tensor, linear: Linear) -> Tensor:
        block = self._block
        return block.ls_2(_mlp(block.mlp, block.ln_2(x), linear))  # type: ignore[no-any-return]


class _ResidualTower:
    """What the two have in common. Raises UnsupportedBackbone for blocks of another kind."""

    def __init__(self, name: str, holder: Any, which: str) -> None:
        resblocks: Any = getattr(getattr(holder, "transformer", None), "resblocks", ())
        if not len(resblocks) or any(type(block) is not ResidualAttentionBlock for block in resblocks):
            raise UnsupportedBackbone(f"{name}: the {which} tower has no plain residual blocks")
        self._holder, self._resblocks = holder, resblocks
        self.blocks: Sequence[Block] = [ResidualBlock(block) for block in resblocks]
        self.width: int = resblocks[0].ln_1.normalized_shape[0]

    def compute_in(self, dtype: torch.dtype) -> None:
        for block in self._resblocks:
            block.attn.to(dtype)
            block.mlp.to(dtype)

    def facts(self) -> dict[str, Any]:
        block = self._resblocks[0]
        return {"heads": block.attn.num_heads, "activation": type(block.mlp[1]).__name__}


class ResidualVision(_ResidualTower):
    """open_clip's `VisionTransformer`."""

    def __init__(self, name: str, visual: Any) -> None:
        super().__init__(name, visual, "vision")
        self._single = visual.attn_pool is None and visual.pool_type == "tok"

    def embed(self, inputs: Tensor) -> Tensor:
        return self._holder._embeds(inputs)  # type: ignore[no-any-return]

    def aside(self, length: int) -> Tensor | None:
        return None

    def token(self, inputs: Tensor) -> Tensor | None:
        """Zeros, the class token's position."""
        return torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device) if self._single else None

    def pool(self, x: Tensor, inputs: Tensor | None) -> Tensor:
        pooled, _ = self._holder._pool(x)
        return pooled @ self._holder.proj  # type: ignore[no-any-return]

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"pool": self._holder.pool_type, "patch_size": self._holder.patch_size[0]}


class ResidualText(_ResidualTower):
    """open_clip's `TextTransformer`, or the text tower that lies open in its `CLIP`.

    `causal`: what follows a text's end changes nothing, so that it may be cut, packed or filled up.
    """

    def __init__(self, name: str, text: Any, flat: bool) -> None:
        super().__init__(name, text, "text")
        if getattr(text, "cls_emb", None) is not None or getattr(text, "use_pad_mask", False):
            raise UnsupportedBackbone(f"{name}: text towers with a class token or a padding mask are not supported")
        # open_clip's CLIP class renames two attributes of its text tower
        self._pool: str = text.text_pool_type if flat else text.pool_type
        self._eos_id: int = (text.text_eos_id if flat else text.eos_id) or 0
        self._single = self._pool in ("argmax", "eos")
        self.context_length: int = text.context_length
        self.causal = text.attn_mask is not None and self._single
        projection = text.text_projection
        linear = isinstance(projection, nn.Linear)
        self.embed_dim: int = (
            self.width if projection is None else projection.weight.shape[0] if linear else projection.shape[1]
        )

    @property
    def matrices(self) -> list[Tensor]:
        return [p for block in self._resblocks for p in block.parameters() if p.ndim == 2]

    @property
    def token_embedding(self) -> Tensor:
        """(ids, width)."""
        return self._holder.token_embedding.weight  # type: ignore[no-any-return]

    def ends(self, tokens: Tensor) -> Tensor:
        """(B,) position of each text's end token, where the tower pools."""
        return tokens.argmax(dim=-1) if self._pool == "argmax" else tokens.eq(self._eos_id).int().argmax(dim=-1)

    def embed(self, inputs: Tensor) -> Tensor:
        text = self._holder
        return text.token_embedding(inputs) + text.positional_embedding[: inputs.shape[1]]  # type: ignore[no-any-return]

    def aside(self, length: int) -> Tensor | None:
        mask = self._holder.attn_mask
        return None if mask is None else mask[:length, :length]

    def token(self, inputs: Tensor) -> Tensor | None:
        return self.ends(inputs) if self._single else None

    def pool(self, x: Tensor, inputs: Tensor | None) -> Tensor:
        x, projection = self._holder.ln_final(x), self._holder.text_projection
        pooled = x[:, 0] if self._single else text_global_pool(x, inputs, self._pool)  # (B, d)
        if isinstance(projection, nn.Linear):
            return projection(pooled)  # type: ignore[no-any-return]
        return pooled if projection is None else pooled @ projection

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"pool": self._pool, "causal": self._holder.attn_mask is not None}


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
        q = linear(token_of(x, asking, packing), of_q, bias_q).unflatten(2, heads).transpose(1, 2)  # (B, heads, 1, d / heads)
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
