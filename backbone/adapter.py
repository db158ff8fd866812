"""The Cross-Modal Adapter (Jiang et al. 2022, arXiv 2211.09623, section 3.3) as a value.

In every residual block of a tower two adapters stand, each on a sub-layer's output before the residual sum:

    x = x + A(attn(ln_1(x)))        place 2·layer
    x = x + A(mlp(ln_2(x)))         place 2·layer + 1
    A(h) = h + W_up · quick_gelu(W_down · h + b_down) + b_up

The last `shared` rows of W_up and b_up are one matrix for both towers at paired layers. An adapter is stored in the
layout of the paper's released code (`AdapterShape.layout`) and computed in the fused form (`Adapter`), where each tower
has its whole W_up. Nothing here is a module: adapters are arguments of `Backbone.encode_text` and `encode_frames`.

Beyond the paper, an adapter may have vocabulary rows (`backbone.vocabulary`): the tensor `vocabulary_rows`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from backbone.vocabulary import Vocabulary

Scope = Literal["both", "text", "vision"]
Start = Literal["identity", "small"]
Tensors = Mapping[str, Tensor]


def quick_gelu(h: Tensor) -> Tensor:
    """h · sigmoid(1.702 h), the activation of OpenAI's CLIP and of the paper's adapters."""
    return h * torch.sigmoid(1.702 * h)


@dataclass(frozen=True, slots=True)
class TowerDims:
    """Widths and depths of a backbone's two towers: all that an adapter's shape depends on."""

    visual_width: int
    visual_layers: int
    text_width: int
    text_layers: int


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """What fixes every tensor of an adapter: the towers, the bottleneck's rank r, the shared rows d_s, and the token ids that
    have a vocabulary row.

    Raises ValueError for a rank below 1, for `shared` outside 0 … the narrower tower's width, for shared rows in an adapter
    of one tower only, and for ids that are negative, not in ascending order, or of an adapter that leaves the text tower alone.
    """

    dims: TowerDims
    rank: int = 8
    shared: int = 16
    scope: Scope = "both"
    vocabulary: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if self.scope not in ("both", "text", "vision"):
            raise ValueError(f"scope must be both, text or vision, not {self.scope!r}")
        widest = min(self.dims.visual_width, self.dims.text_width)
        if not 0 <= self.shared <= widest:
            raise ValueError(f"shared must be between 0 and {widest}, the narrower tower's width, not {self.shared}")
        if self.shared and self.scope != "both":
            raise ValueError(f"an adapter of scope {self.scope} has no other tower to share with: shared must be 0")
        if self.vocabulary and self.scope == "vision":
            raise ValueError("an adapter of scope vision has no vocabulary rows")
        if any(later <= before for before, later in zip((-1, *self.vocabulary), self.vocabulary, strict=False)):
            raise ValueError("the token ids of the vocabulary rows must be ascending, each once, and not negative")

    def towers(self) -> tuple[tuple[str, int, int], ...]:
        """(name, width, layers) of each tower that the adapter changes."""
        visual = ("visual", self.dims.visual_width, self.dims.visual_layers)
        text = ("text", self.dims.text_width, self.dims.text_layers)
        return {"both": (visual, text), "vision": (visual,), "text": (text,)}[self.scope]

    def pairs(self) -> list[tuple[int, int]]:
        """(visual layer, text layer) of each pair that shares rows, by relative depth: i of L meets ⌈(i+1)·M/L⌉-1 of M.

        Towers of equal depth pair layer by layer, as in the released code.
        """
        visual, text = self.dims.visual_layers, self.dims.text_layers
        paired = min(visual, text)
        return [(-(-(i + 1) * visual // paired) - 1, -(-(i + 1) * text // paired) - 1) for i in range(paired)]

    def layout(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each stored tensor, in the layout of the paper's released code.

        Two kinds are absent from that code: `_unpaired_` tensors hold the last `shared` rows of layers that have no partner
        in a shallower other tower, and `vocabulary_rows` a row for each id of `vocabulary`.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for tower, width, layers in self.towers():
            places, own = 2 * layers, width - self.shared
            shapes[f"{tower}_adapter_down_weight"] = (places, self.rank, width)
            shapes[f"{tower}_adapter_down_bias"] = (places, self.rank)
            if own:
                shapes[f"{tower}_adapter_up_unique_weight"] = (places, own, self.rank)
                shapes[f"{tower}_adapter_up_unique_bias"] = (places, own)
            unpaired = places - 2 * len(self.pairs())
            if self.shared and unpaired:
                shapes[f"{tower}_adapter_up_unpaired_weight"] = (unpaired, self.shared, self.rank)
                shapes[f"{tower}_adapter_up_unpaired_bias"] = (unpaired, self.shared)
        if self.shared:
            places = 2 * len(self.pairs())
            shapes["vt_adapter_up_share_weight"] = (places, self.shared, self.rank)
            shapes["vt_adapter_up_share_bias"] = (places, self.shared)
        if self.vocabulary:
            shapes["vocabulary_rows"] = (len(self.vocabulary), self.dims.text_width)
        return shapes

    @property
    def parameters(self) -> int:
        """Number of trained values: 519,168 at ViT-B/32 with rank 8 and 16 shared rows."""
        return sum(torch.Size(shape).numel() for shape in self.layout().values())

    def first_layers(self, last: int | None) -> tuple[int, int]:
        """(visual, text) layer from which on adapters stand where only the `last` blocks of the shallower tower have them.

        The deeper tower is cut where its partner layers are, so that no shared row belongs to both sides. None: all blocks.
        A tower without adapters has them from beyond its last layer on.
        """
        pairs = self.pairs()
        visual, text = 0, 0
        if last is not None and last < len(pairs):
            visual, text = (layer + 1 for layer in pairs[len(pairs) - last - 1])
        return (
            self.dims.visual_layers if self.scope == "text" else visual,
            self.dims.text_layers if self.scope == "vision" else text,
        )

    def first_rows(self, last: int | None) -> dict[str, int]:
        """For each stored tensor, the row from which on it belongs to the `last` blocks (`first_layers`)."""
        visual, text = self.first_layers(last)
        first = {"visual": visual, "text": text}
        paired = {"visual": {v for v, _ in self.pairs()}, "text": {t for _, t in self.pairs()}}
        kept = sum(v >= visual for v, _ in self.pairs())
        rows = {}
        for name in self.layout():
            tower = name.split("_")[0]
            if tower == "vocabulary":
                rows[name] = 0
            elif tower == "vt":
                rows[name] = 2 * (len(self.pairs()) - kept)
            elif "_unpaired_" in name:
                rows[name] = 2 * len(set(range(first[tower])) - paired[tower])
            else:
                rows[name] = 2 * first[tower]
        return rows

    def initial(self, seed: int, last: int | None = None, start: Start = "small") -> dict[str, Tensor]:
        """Fresh float32 tensors, biases and vocabulary rows zero.

        `identity`: down projections from a truncated normal of std 1/√d, up projections zero, so that training begins
        at the frozen backbone (as LoRA's does, Hu et al. 2021); `small`: all weights of std 0.01, the paper's.
        With `last`, the layers before the last blocks are all zero, which makes their adapters the identity for good.
        """
        generator = torch.Generator().manual_seed(seed)
        tensors = {name: torch.zeros(shape) for name, shape in self.layout().items()}
        first = self.first_rows(last)
        for name, tensor in tensors.items():
            if name.endswith("weight") and (start == "small" or "_down_" in name):
                std = 0.01 if start == "small" else tensor.shape[-1] ** -0.5
                torch.nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std, generator=generator)
                tensor[: first[name]] = 0
        return tensors

    def continued(self, before: AdapterShape, tensors: Tensors) -> dict[str, Tensor]:
        """The tensors of an adapter whose shape `before` is this one but for its vocabulary; rows that it has not are zero."""
        taken = dict(tensors)
        rows = taken.pop("vocabulary_rows", None)
        if self.vocabulary:
            taken["vocabulary_rows"] = torch.zeros(len(self.vocabulary), self.dims.text_width)
            for token, row in zip(before.vocabulary, [] if rows is None else rows, strict=True):
                taken["vocabulary_rows"][self.vocabulary.index(token)] = row
        return taken

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises ValueError if a tensor of these shapes is missing, unknown or of another shape."""
        expected = self.layout()
        if problems := sorted(expected.keys() ^ shapes.keys()):
            raise ValueError(f"adapter tensors missing or unknown: {', '.join(problems)}")
        for name, shape in expected.items():
            if shapes[name] != shape:
                raise ValueError(f"adapter tensor {name} has shape {shapes[name]}, not {shape}")

    def assemble(self, tensors: Tensors) -> Adapter:
        """The fused form of `tensors`, differentiable in them.

        Raises ValueError if a tensor is missing, unknown or of another shape.
        """
        self.check({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        towers = {tower: self._fuse(tensors, tower, layers) for tower, _, layers in self.towers()}
        vocabulary = None
        if self.vocabulary:
            rows = tensors["vocabulary_rows"]
            vocabulary = Vocabulary(torch.tensor(self.vocabulary, device=rows.device), rows)
        return Adapter(towers.get("visual"), towers.get("text"), vocabulary)

    def _fuse(self, tensors: Tensors, tower: str, layers: int) -> TowerAdapter:
        up: dict[str, Tensor] = {}
        for kind in ("weight", "bias"):
            parts = []
            if own := [tensors[name] for name in (f"{tower}_adapter_up_unique_{kind}",) if name in tensors]:
                parts += own  # (P, d - d_s, …)
            if self.shared:
                rows = torch.cat(
                    [tensors[f"vt_adapter_up_share_{kind}"]]
                    + [tensors[name] for name in (f"{tower}_adapter_up_unpaired_{kind}",) if name in tensors]
                )
                order = self._shared_rows(tower, layers).to(rows.device)
                parts.append(rows[order])  # (P, d_s, …)
            up[kind] = torch.cat(parts, dim=1)
        return TowerAdapter(
            down_weight=tensors[f"{tower}_adapter_down_weight"],
            down_bias=tensors[f"{tower}_adapter_down_bias"],
            up_weight=up["weight"],
            up_bias=up["bias"],
        )

    def _shared_rows(self, tower: str, layers: int) -> Tensor:
        """(P,) int64: for each place of the tower, its row in the shared tensor followed by the unpaired one."""
        partner = {pair[0 if tower == "visual" else 1]: i for i, pair in enumerate(self.pairs())}
        alone = iter(range(len(partner), layers))
        layer_rows = [partner[layer] if layer in partner else next(alone) for layer in range(layers)]
        return torch.tensor([2 * row + place for row in layer_rows for place in (0, 1)])


@dataclass(frozen=True, slots=True)
class TowerAdapter:
    """One tower's adapters in the fused form; P = 2 · layers places, width d, rank r."""

    down_weight: Tensor  # (P, r, d)
    down_bias: Tensor  # (P, r)
    up_weight: Tensor  # (P, d, r)
    up_bias: Tensor  # (P, d)

    def __call__(self, h: Tensor, place: int) -> Tensor:
        """h (B, T, d) → (B, T, d). Semantics: h + up_weight[p] · quick_gelu(down_weight[p] · h + down_bias[p]) + up_bias[p]."""
        h = h.to(self.down_weight.dtype)
        bottleneck = quick_gelu(F.linear(h, self.down_weight[place], self.down_bias[place]))  # (B, T, r)
        return h + F.linear(bottleneck, self.up_weight[place], self.up_bias[place])

    def to(self, device: torch.device) -> TowerAdapter:
        return TowerAdapter(*(t.to(device) for t in (self.down_weight, self.down_bias, self.up_weight, self.up_bias)))


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter in the fused form. A tower that it leaves alone is None: scope `text` has no `visual`."""

    visual: TowerAdapter | None
    text: TowerAdapter | None
    vocabulary: Vocabulary | None = None

    def to(self, device: torch.device) -> Adapter:
        return Adapter(
            visual=None if self.visual is None else self.visual.to(device),
            text=None if self.text is None else self.text.to(device),
            vocabulary=None if self.vocabulary is None else self.vocabulary.to(device),
        )
