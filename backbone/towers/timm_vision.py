"""timm's vision towers as open_clip takes them: EVA's blocks (PE-Core, EVA02) and the plain ones (SigLIP)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.mlp import Mlp, SwiGLU
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block as PlainBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.linear import Linear
from backbone.packing import Packing
from backbone.towers.tower import Block, UnsupportedBackbone


class TimmBlock:
    """`x + s1 · attn(norm1(x))`, then `x + s2 · mlp(norm2(x))`; the scales s1 and s2 are 1 where a block has none.

    Raises UnsupportedBackbone for a block with parts of other kinds.
    """

    def __init__(self, name: str, block: Any) -> None:
        attn, mlp = block.attn, block.mlp
        known = (
            type(block) in (EvaBlock, PlainBlock)
            and type(attn) in (Attention, AttentionRope, EvaAttention)
            and type(mlp) in (Mlp, SwiGLU)
            and attn.gate is None
            and getattr(attn, "num_kv_groups", 1) == 1
            and not getattr(attn, "qkv_bias_separate", False)
            and isinstance(attn.q_norm, nn.Identity)
            and isinstance(attn.k_norm, nn.Identity)
        )
        if not known:
            raise UnsupportedBackbone(f"{name}: the vision tower has no blocks of a kind that is computed here")
        self._block = block

    def attention(
        self, x: Tensor, aside: Tensor | None, asking: Tensor | None, packing: Packing | None, linear: Linear
    ) -> Tensor:
        """`aside`: the rotary positions of all tokens, (T, 2 · d / heads), sine beside cosine."""
        block, attn = self._block, self._block.attn
        q, k, v = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in self._qkv(block.norm1(x), linear))
        if aside is not None:
            q, k = (apply_rot_embed_cat(part, aside, half=attn.rotate_half).type_as(v) for part in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, T, d)
        return self._scaled(_projected(attn.norm, mixed, attn.proj, linear), 1)

    def _qkv(self, x: Tensor, linear: Linear) -> tuple[Tensor, ...]:
        attn = self._block.attn
        if attn.qkv is None:
            return tuple(_through(part, x, linear) for part in (attn.q_proj, attn.k_proj, attn.v_proj))
        bias = attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias)).to(attn.qkv.weight.dtype)
        return linear(x.to(attn.qkv.weight.dtype), attn.qkv.weight, bias).chunk(3, dim=-1)

    def mlp(self, x: Tensor, linear: Linear) -> Tensor:
        block, mlp = self._block, self._block.mlp
        x = block.norm2(x)
        if isinstance(mlp, SwiGLU):
            h = mlp.act(_through(mlp.fc1_g, x, linear)) * _through(mlp.fc1_x, x, linear)
        else:
            h = mlp.act(_through(mlp.fc1, x, linear))
        return self._scaled(_projected(mlp.norm, h, mlp.fc2, linear), 2)

    def _scaled(self, h: Tensor, which: int) -> Tensor:
        if isinstance(self._block, PlainBlock):
            return getattr(self._block, f"ls{which}")(h)  # type: ignore[no-any-return]
        gamma = getattr(self._block, f"gamma_{which}")
        return h if gamma is None else gamma * h


class TimmVision:
    """open_clip's `TimmModel` over an `Eva` or a `VisionTransformer`. Raises UnsupportedBackbone for another one."""

    def __init__(self, name: str, visual: Any) -> None:
        trunk = visual.trunk
        if type(trunk) not in (Eva, VisionTransformer) or trunk.dynamic_img_size or getattr(trunk, "rope_mixed", False):
            raise UnsupportedBackbone(f"{name}: the vision tower is {type(trunk).__name__}, which is not computed here")
        self._visual, self._trunk = visual, trunk
        self.blocks: Sequence[Block] = [TimmBlock(name, block) for block in trunk.blocks]
        self.width: int = trunk.embed_dim

    def embed(self, inputs: Tensor) -> Tensor:
        trunk = self._trunk
        x = trunk._pos_embed(trunk.patch_embed(inputs))
        return trunk.norm_pre(x[0] if isinstance(trunk, Eva) else x)  # type: ignore[no-any-return]

    def aside(self, length: int) -> Tensor | None:
        """The rotary positions, with angle 0 for the tokens before the patches."""
        trunk = self._trunk
        rope = getattr(trunk, "rope", None)
        if rope is None:
            return None
        positions: Tensor = rope.get_embed() if hasattr(rope, "feat_shape") else rope.get_embed(trunk.patch_embed.grid_size)
        sine, cosine = positions.chunk(2, dim=-1)
        before = (0, 0, length - len(positions), 0)
        return torch.cat((F.pad(sine, before), F.pad(cosine, before, value=1.0)), dim=-1)

    def token(self, inputs: Tensor) -> Tensor | None:
        return None

    def pool(self, x: Tensor, inputs: Tensor | None) -> Tensor:
        return self._visual.head(self._trunk.forward_head(self._trunk.norm(x)))  # type: ignore[no-any-return]

    def compute_in(self, dtype: torch.dtype) -> None:
        for module in self._trunk.blocks.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)

    def facts(self) -> dict[str, Any]:
        trunk, block = self._trunk, self._trunk.blocks[0]
        rope = getattr(trunk, "rope", None)
        return {
            "heads": block.attn.num_heads,
            "activation": type(block.mlp.act).__name__,
            "pool": trunk.global_pool,
            "patch_size": trunk.patch_embed.patch_size[0],
            "trunk": [type(trunk).__name__, type(block.attn).__name__, type(block.mlp).__name__, type(rope).__name__],
        }


def _through(layer: nn.Linear, x: Tensor, linear: Linear) -> Tensor:
    return linear(x.to(layer.weight.dtype), layer.weight, layer.bias)


def _projected(norm: nn.Module, h: Tensor, layer: nn.Linear, linear: Linear) -> Tensor:
    """`layer(norm(h))`; the norm, where there is one, in float32."""
    return _through(layer, h if isinstance(norm, nn.Identity) else norm(h.float()), linear)
