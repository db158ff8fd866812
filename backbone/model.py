"""The frozen backbone: open_clip's two towers, run block by block, with adapters as arguments.

A `Backbone` never changes after it is loaded. Two calls with different adapters share nothing but the frozen weights,
so rows of different tenants can stand in one batch.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.adapter import Adapter, TowerAdapter, TowerDims
from backbone.images import Form
from backbone.linear import HalfWeights, Linear, Reordered, linear_of, onednn
from backbone.packing import Packing
from backbone.stack import Slots, stacked
from backbone.tokenizer import bounded
from backbone.towers import Apply, ResidualText, Tower, run_blocks, towers_of
from backbone.vocabulary import ByText, Offsets

Adapters = Adapter | Sequence[Adapter | None] | Slots | None
"""None: the frozen backbone. One adapter: for every row. A sequence: one for each row, None for the frozen backbone.
Slots: one for each row, from a stack on the device, for inference."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """What a tower's first `layers` frozen blocks made of a batch, without any adapter: `states` (B, T, width)."""

    states: Tensor
    layers: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokenised texts: `ids` (B, context_length) int64; `truncated[i]` is true where the end of a text was cut off."""

    ids: Tensor
    truncated: tuple[bool, ...]


class Backbone:
    """A frozen CLIP whose towers are computed here (`backbone.towers`).

    `name` is the architecture's name; `fingerprint` identifies architecture and weights (sha256 hex): vectors of two
    backbones are comparable only where the fingerprints are equal.

    `dtype` is what the blocks' products are computed in. Norms, softmax, sums over the residual stream and the vectors that
    come out are float32 always, and the fingerprint is that of the float32 weights: vectors of a half-precision backbone
    differ from them by less than 1e-2, and either searches what the other indexed. On a CPU, which has no fast float16,
    float16 means that the text tower's weights are kept so and multiplied in float32 (`HalfWeights`); where that loses
    nothing, it is done in any case.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        tokenizer: Any,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        resize_mode: str = "shortest",
        interpolation: str = "bicubic",
    ) -> None:
        self.name = name
        self.device = torch.device(device)
        frozen: Any = model.float().eval().requires_grad_(False).to(self.device)
        self._take(frozen)
        self._tokenizer = bounded(tokenizer)
        self._linear: Linear
        self._text_linear: Linear  # where no gradients are wanted
        self.dims = TowerDims(self._visual.width, len(self._visual.blocks), self._text.width, len(self._text.blocks))
        self.image_size: int = frozen.visual.image_size[0]
        self.form = Form(self.image_size, resize_mode, interpolation)
        self.context_length, self.embed_dim, self.causal = self._text.context_length, self._text.embed_dim, self._text.causal
        self._mean, self._std = mean, std
        shift = torch.tensor(mean, device=self.device).view(1, 3, 1, 1)
        scale = torch.tensor(std, device=self.device).view(1, 3, 1, 1)
        self._shift, self._scale = 255 * shift, 1 / (255 * scale)
        self.fingerprint = self._fingerprint()
        halves = self.device.type == "cpu" and dtype in (torch.float32, torch.float16) and HalfWeights.available()
        if halves and dtype == torch.float32:
            halves = HalfWeights.lossless(self._text.matrices)
        self._compute_in(torch.float32 if halves else dtype)
        if halves:
            self._text_linear = HalfWeights()

    @property
    def logit_scale(self) -> float:
        """exp(logit_scale): the frozen factor between a cosine and a logit."""
        return float(self._model.logit_scale.exp())

    @property
    def parameters(self) -> int:
        """Number of frozen values."""
        return sum(p.numel() for p in self._model.parameters())

    @property
    def tokens(self) -> int:
        """Number of token ids."""
        return len(self.token_embedding)

    @property
    def token_embedding(self) -> Tensor:
        """(N, text width), frozen: of N token ids."""
        return self._text.token_embedding

    def tokenize(self, texts: Sequence[str], words: int | None = None) -> Tokens:
        """Token ids, cut to the context length or to `words` tokens, start and end included; `truncated` says where.

        Only a causal tower gets fewer ids than its context length: another one also reads what follows a text.
        """
        length = min(words or self.context_length, self.context_length)
        ids: Tensor = self._tokenizer(list(texts), context_length=length)
        room = length - getattr(self._tokenizer, "specials", 2)  # the start and end tokens
        pad = getattr(self._tokenizer, "pad", 0)
        full = ids[:, -1] != 0  # where 0 fills up
        truncated = tuple(bool(full[i]) and len(self._tokenizer.encode(text)) > room for i, text in enumerate(texts))
        return Tokens(ids if self.causal else F.pad(ids, (0, self.context_length - length), value=pad), truncated)

    def trim(self, tokens: Tensor) -> Tensor:
        """tokens (B, L) cut after the end of the longest text: attention is causal, what follows changes nothing."""
        if not self.causal:
            return tokens
        return tokens[:, : int(self._text.ends(tokens).max()) + 1]

    def lengths(self, tokens: Tensor) -> Tensor:
        """tokens (B, L) → (B,) how many of each row are the text's own, start and end included: without the padding."""
        if self.causal:
            return self._text.ends(tokens) + 1
        own = tokens != tokens[:, -1:]  # two equal tokens or more at the end are padding
        last = tokens.shape[1] - own.flip(1).to(torch.int8).argmax(1)  # B: behind the last token that is another
        return torch.where(last < tokens.shape[1] - 1, last, tokens.shape[1])

    def encode_text(
        self, tokens: Tensor, adapters: Adapters = None, *, prefix: Prefix | None = None, recompute: bool = False
    ) -> Tensor:
        """tokens (B, L) int64 → (B, embed_dim) float32, unnormalised.

        `prefix`, from `text_prefix` of the same tokens, replaces the first layers. `recompute` keeps no activations
        inside the blocks for the backward pass. Raises ValueError if a sequence of adapters, or slots, has not B entries, and
        for a prefix beside vocabulary rows, which it has not.
        """
        tokens = self.trim(tokens)
        packing = None
        if self.causal and self.device.type == "cpu" and (prefix is None or prefix.layers < self.dims.text_layers):
            packing = Packing.of(self._text.ends(tokens))
        apply = self._tower("text", adapters, len(tokens))
        offsets = self._offsets(adapters)
        if prefix is not None and offsets is not None:
            raise ValueError("a prefix holds no vocabulary rows: the text is encoded from its tokens")
        return self.run_text(tokens.to(self.device), apply, prefix, packing, recompute, offsets)

    def run_text(
        self,
        tokens: Tensor,
        apply: Apply | None,
        prefix: Prefix | None = None,
        packing: Packing | None = None,
        recompute: bool = False,
        offsets: Offsets | None = None,
    ) -> Tensor:
        """`encode_text` of trimmed tokens on the device, with what is applied there; nothing in it waits for the device."""
        text: ResidualText = self._text
        length = tokens.shape[1]
        x, first = (self._embed_text(tokens, offsets), 0) if prefix is None else (prefix.states[:, :length], prefix.layers)
        x = x if packing is None else packing.pack(x)
        linear, pool = self._linear if torch.is_grad_enabled() else self._text_linear, text.token(tokens)
        x = run_blocks(
            x, text.blocks, linear, apply, text.aside(length), first, pool=pool, packing=packing, recompute=recompute
        )
        return text.pool(x, tokens)

    def encode_frames(self, pixels: Tensor | Prefix, adapters: Adapters = None, *, recompute: bool = False) -> Tensor:
        """pixels (N, 3, image_size, image_size), or their `frame_prefix` → (N, embed_dim) float32, unnormalised.

        uint8 pixels are normalised with the backbone's mean and standard deviation; floats are taken as normalised.
        `recompute` keeps no activations inside the blocks for the backward pass.
        Raises ValueError for pixels of another shape, or a sequence of adapters, or slots, that has not N entries.
        """
        rows = len(pixels.states if isinstance(pixels, Prefix) else pixels)
        return self.run_frames(pixels, self._tower("visual", adapters, rows), recompute)

    def run_frames(self, pixels: Tensor | Prefix, apply: Apply | None, recompute: bool = False) -> Tensor:
        """`encode_frames`, with pixels on the device and what is applied there; nothing in it waits for the device."""
        x, first = (pixels.states, pixels.layers) if isinstance(pixels, Prefix) else (self._embed_frames(pixels), 0)
        tower = self._visual
        aside, pool = tower.aside(x.shape[1]), tower.token(x)
        x = run_blocks(x, tower.blocks, self._linear, apply, aside, first, pool=pool, recompute=recompute)
        return tower.pool(x, None)

    def text_prefix(self, tokens: Tensor, layers: int) -> Prefix:
        """The first `layers` blocks over tokens (B, L), without adapters: states (B, L, text width), or (B, 1, …) after all
        of a tower that reads one token.
        """
        tokens = tokens.to(self.device)
        return self._prefix(self._text, self._text.embed(tokens), tokens, layers)

    def frame_prefix(self, pixels: Tensor, layers: int) -> Prefix:
        """The first `layers` blocks over pixels (N, 3, image_size, image_size), without adapters: states (N, T, width), or
        (N, 1, width) after all of a tower that reads one token.
        """
        x = self._embed_frames(pixels)
        return self._prefix(self._visual, x, x, layers)

    def _prefix(self, tower: Tower, x: Tensor, inputs: Tensor, layers: int) -> Prefix:
        pool = tower.token(inputs) if layers == len(tower.blocks) else None
        return Prefix(run_blocks(x, tower.blocks[:layers], self._linear, None, tower.aside(x.shape[1]), pool=pool), layers)

    def unfrozen(self) -> tuple[Backbone, dict[str, Tensor]]:
        """A copy whose weights take gradients, all but logit_scale, and those weights by name.

        For full fine-tuning, the baseline of the adapters; its fingerprint is `unfrozen`.
        """
        twin = copy.copy(self)
        twin._take(copy.deepcopy(self._model))
        twin.fingerprint, twin._text_linear = "unfrozen", twin._linear
        weights = {name: tensor for name, tensor in twin._model.named_parameters() if name != "logit_scale"}
        for tensor in weights.values():
            tensor.requires_grad_()
        return twin, weights

    def weights(self) -> dict[str, Tensor]:
        """Every stored tensor by open_clip's name: what `--pretrained FILE` reads."""
        return dict(self._model.state_dict())

    def _take(self, model: Any) -> None:
        self._model = model
        self._visual, self._text = towers_of(self.name, model)

    def _compute_in(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._linear = linear_of(self.device, dtype)
        self._text_linear = Reordered() if self._linear is onednn else self._linear
        for tower in (self._visual, self._text):
            tower.compute_in(dtype)
        if dtype != torch.float32:  # sums of products in float32, wherever the library might split them
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

    def _embed_text(self, tokens: Tensor, offsets: Offsets | None = None) -> Tensor:
        x = self._text.embed(tokens)  # (B, L, d)
        return x if offsets is None else x + offsets(tokens)

    def _embed_frames(self, pixels: Tensor) -> Tensor:
        side = self.image_size
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, side, side):
            raise ValueError(f"pixels must have shape (N, 3, {side}, {side}), not {tuple(pixels.shape)}")
        pixels = pixels.to(self.device)
        pixels = (pixels.float() - self._shift) * self._scale if pixels.dtype == torch.uint8 else pixels.float()
        return self._visual.embed(pixels)  # (N, T, d)

    def _tower(self, tower: str, adapters: Adapters, rows: int) -> Apply | None:
        """What `run_blocks` applies to a sub-layer's output; None where no row has an adapter on this tower."""
        if adapters is None:
            return None
        if isinstance(adapters, Adapter):
            return getattr(adapters, tower)  # type: ignore[no-any-return]
        if isinstance(adapters, Slots):
            stack = adapters.stack
            if len(adapters.index) != rows:
                raise ValueError(f"{len(adapters.index)} slots for a batch of {rows} rows")
            if stack.dims != self.dims or stack.device.type != self.device.type:
                raise ValueError(f"a stack for {stack.dims} on {stack.device}; the backbone is {self.dims} on {self.device}")
            return stack.rows(tower, adapters.index)
        if len(adapters) != rows:
            raise ValueError(f"{len(adapters)} adapters for a batch of {rows} rows")
        position: dict[int, int] = {}
        distinct: list[TowerAdapter | None] = []
        index = []
        for adapter in adapters:
            own: TowerAdapter | None = None if adapter is None else getattr(adapter, tower)
            if id(own) not in position:
                position[id(own)] = len(distinct)
                distinct.append(own)
            index.append(position[id(own)])
        if len(distinct) == 1:
            return distinct[0]
        return stacked(distinct, torch.tensor(index, device=self.device))

    def _offsets(self, adapters: Adapters) -> Offsets | None:
        """The vocabulary rows of a batch, whose number of rows `_tower` has checked; None where no adapter has any."""
        if adapters is None or isinstance(adapters, Adapter):
            return None if adapters is None else adapters.vocabulary
        if isinstance(adapters, Slots):
            return adapters.stack.vocabularies(adapters.index)
        rows = [None if adapter is None else adapter.vocabulary for adapter in adapters]
        return ByText(rows) if any(own is not None for own in rows) else None

    def _fingerprint(self) -> str:
        visual, text = self._visual.facts(), self._text.facts()
        architecture = {
            "dims": asdict(self.dims),
            **{fact: [visual.pop(fact), text.pop(fact)] for fact in ("heads", "activation", "pool")},
            "image_size": self.image_size,
            "context_length": self.context_length,
            "mean": self._mean,
            "std": self._std,
            **visual,
            **text,
            **self.form.facts(),
        }
        digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
        for name, tensor in sorted(self._model.state_dict().items()):
            values = np.ascontiguousarray(tensor.detach().float().cpu().numpy())
            digest.update(f"{name}{values.shape}".encode())
            digest.update(values.data)
        return digest.hexdigest()
