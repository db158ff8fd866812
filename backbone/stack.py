"""Adapters of a whole batch: a preallocated device stack, and the sums that give every row its own adapter.

A stack keeps each adapter in a slot, tower by tower as blocks (P, 1 + R, 2, d): at each of the P places, row 0 holds the
biases and rows 1 … R the weights of the bottleneck; `[..., 0, :]` belongs to the down projection, `[..., 1, :]` to the up
projection. So one copy of contiguous memory a row and place fetches all that it needs, of no more rows than the batch's
largest rank, and writing an adapter is one copy too. Slot 0 is the zero adapter: the frozen backbone.

Beside the blocks a slot has room for vocabulary rows, and for each token id the place of its row (`StackedVocabulary`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from backbone.adapter import Adapter, TowerAdapter, TowerDims
from backbone.vocabulary import StackedVocabulary, Vocabulary

TOWERS = ("visual", "text")
SLOPE = 1.702  # of quick GELU


@dataclass(frozen=True, slots=True)
class StackedTower:
    """One tower's adapters of a batch, each row's picked from `blocks` when its place comes up."""

    blocks: Tensor  # (S, P, 1 + R, 2, w), w ≥ d and w ≥ R
    index: Tensor  # (B,) int64, on the blocks' device
    rank: int  # the largest of the batch, at most R

    def __call__(self, h: Tensor, place: int) -> Tensor:
        """h (B, T, d) → (B, T, d). Semantics: row b is `TowerAdapter.__call__` with the adapter in slot index[b], that is

            h[b] + quick_gelu(h[b] · down[b]ᵀ + down_bias[b]) · up[b] + up_bias[b]

        with h · sigmoid(1.702 h) as silu(1.702 h) / 1.702, both factors inside the two batched products, and h + up_bias
        as the second one's summand. Gradients are right, in h and, where they have any, in the blocks.
        """
        h, width = h.to(self.blocks.dtype), h.shape[-1]
        rows = self.blocks[:, place, : 1 + self.rank].index_select(0, self.index)  # (B, 1 + r, 2, w)
        down_bias, down = rows[:, :1, 0, : self.rank], rows[:, 1:, 0, :width].transpose(1, 2)  # (B, 1, r), (B, d, r)
        up_bias, up = rows[:, :1, 1, :width], rows[:, 1:, 1, :width]  # (B, 1, d), (B, r, d)
        bottleneck = F.silu(torch.baddbmm(down_bias, h, down, beta=SLOPE, alpha=SLOPE), inplace=True)  # (B, T, r)
        return (h + up_bias).baddbmm_(bottleneck, up, alpha=1 / SLOPE)


@dataclass(frozen=True, slots=True)
class FlatAdapter:
    """An adapter as one contiguous buffer: each tower's blocks at its own rank, then its vocabulary rows; rank 0: no such
    tower.
    """

    values: Tensor  # (N,) float32, on the host
    dims: TowerDims
    ranks: tuple[int, int]  # visual, text
    ids: Tensor  # (V,) int64, on the host: the tokens that have a vocabulary row

    @classmethod
    def of(cls, adapter: Adapter, dims: TowerDims, pinned: bool = False) -> FlatAdapter:
        """A copy without gradient, in page-locked memory where `pinned`. Ranks may not exceed the towers' widths."""
        towers = [getattr(adapter, tower) for tower in TOWERS]
        ranks = rank_of(adapter.visual), rank_of(adapter.text)
        words = adapter.vocabulary
        with torch.inference_mode(False), torch.no_grad():
            ids = torch.empty(0, dtype=torch.int64) if words is None else words.ids.cpu()
            flat = cls(torch.empty(0), dims, ranks, ids)
            flat = replace(flat, values=torch.zeros(sum(flat._counts()), pin_memory=pinned))
            if words is not None:
                flat.rows(flat.values).copy_(words.rows)
            for tower, rank, own in zip(towers, ranks, flat.towers(flat.values), strict=True):
                if own is not None:
                    own[:, 0, 0, :rank], own[:, 1:, 0] = tower.down_bias, tower.down_weight
                    own[:, 0, 1], own[:, 1:, 1] = tower.up_bias, tower.up_weight.transpose(1, 2)
        return flat

    def towers(self, values: Tensor) -> list[Tensor | None]:
        """Views (P, 1 + r, 2, d) of the towers in `values`, which may be a copy of this adapter's on another device."""
        parts = values.split(self._counts())[:2]
        sizes = [_size(self.dims, tower, rank) for tower, rank in zip(TOWERS, self.ranks, strict=True)]
        return [part.view(size) if len(part) else None for part, size in zip(parts, sizes, strict=True)]

    def rows(self, values: Tensor) -> Tensor:
        """View (V, d) of the vocabulary rows in `values`."""
        rows: Tensor = values.split(self._counts())[2]
        return rows.view(len(self.ids), self.dims.text_width)

    def _counts(self) -> list[int]:
        sizes = [_size(self.dims, tower, rank) for tower, rank in zip(TOWERS, self.ranks, strict=True)]
        counts = [torch.Size(size).numel() if rank else 0 for size, rank in zip(sizes, self.ranks, strict=True)]
        return [*counts, len(self.ids) * self.dims.text_width]


class AdapterStack:
    """`slots` adapters of up to `rank` on the device, in memory that is allocated once. Slot 0 is the zero adapter, always.
    `dtype` is what the adapters are kept and computed in. Each may have up to `words` vocabulary rows, of a backbone with
    `tokens` token ids.

    Different ranks, shared rows and scopes stand side by side: rows beyond an adapter's rank are zero. For inference: the
    stack holds copies, so no gradient reaches an adapter through it, and a backward pass over a batch in which a slot was
    written since raises. A slot may be written only while no batch reads it: `adapters_store.Residency` counts the readers.
    Raises ValueError for fewer than two slots, and for a rank below 1 or above the narrower tower's width.
    """

    def __init__(
        self,
        dims: TowerDims,
        slots: int,
        rank: int = 16,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        words: int = 0,
        tokens: int = 0,
    ) -> None:
        widest = min(dims.visual_width, dims.text_width)
        if slots < 2 or not 1 <= rank <= widest:
            raise ValueError(f"a stack has two slots or more, of a rank from 1 to {widest}: not {slots} of rank {rank}")
        if not 0 <= words < 2**15:
            raise ValueError(f"a slot has room for 0 to {2**15 - 1} vocabulary rows, not {words}")
        self.dims, self.slots, self.rank, self.words, self.device = dims, slots, rank, words, torch.device(device)
        sizes = [_size(dims, tower, rank) for tower in TOWERS]
        with torch.inference_mode(False):
            values = sum(torch.Size(size).numel() for size in sizes)
            self._memory = torch.zeros(slots, values, dtype=dtype, device=self.device)
            parts = self._memory.split([torch.Size(size).numel() for size in sizes], dim=1)
            self._table = torch.zeros(slots, 1 + words, dims.text_width, dtype=dtype, device=self.device)
            self._places = torch.zeros(slots, tokens, dtype=torch.int16, device=self.device)
        self.nbytes = self._memory.nbytes + self._table.nbytes + self._places.nbytes
        self._ids = [torch.empty(0, dtype=torch.int64)] * slots  # on the host
        self._blocks = {t: part.unflatten(1, size) for t, part, size in zip(TOWERS, parts, sizes, strict=True)}
        self._ranks = {tower: [0] * slots for tower in TOWERS}  # rows beyond are zero; 0: the slot leaves the tower alone
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @staticmethod
    def slot_bytes(dims: TowerDims, rank: int, dtype: torch.dtype = torch.float32, *, words: int = 0, tokens: int = 0) -> int:
        values = sum(torch.Size(_size(dims, tower, rank)).numel() for tower in TOWERS) + (1 + words) * dims.text_width
        return dtype.itemsize * values + torch.int16.itemsize * tokens

    def write(self, slot: int, adapter: FlatAdapter) -> None:
        """Fills a slot; on return the adapter is there. Raises ValueError for slot 0, and for an adapter of other dimensions,
        of a larger rank, of more vocabulary rows than a slot has room for, or of unknown token ids.

        On CUDA the copy runs on a stream of its own, from page-locked memory beside the batches, after what the default
        stream was given before: a reader may free its slot once its batch is launched there. One thread writes at a time.
        """
        if not 1 <= slot < self.slots:
            raise ValueError(f"slot {slot} cannot be written: slots 1 to {self.slots - 1} can")
        if adapter.dims != self.dims or max(adapter.ranks) > self.rank:
            raise ValueError(f"a stack for {self.dims}, rank {self.rank}; an adapter for {adapter.dims}, ranks {adapter.ranks}")
        if len(adapter.ids) > self.words or bool((adapter.ids >= self._places.shape[1]).any()):
            raise ValueError(
                f"{len(adapter.ids)} vocabulary rows, room for {self.words}, of token ids from 0 to {self._places.shape[1] - 1}"
            )
        if self._copies is None:
            self._fill(slot, adapter, adapter.values)
            return
        with torch.cuda.stream(self._copies):
            self._copies.wait_stream(torch.cuda.default_stream(self.device))
            self._fill(slot, adapter, adapter.values.to(self.device, non_blocking=True))
        self._copies.synchronize()

    def _fill(self, slot: int, adapter: FlatAdapter, values: Tensor) -> None:
        for tower, rank, source in zip(TOWERS, adapter.ranks, adapter.towers(values), strict=True):
            before, target = self._ranks[tower][slot], self._blocks[tower][slot]
            self._ranks[tower][slot] = max(before, rank)  # stands if the copy fails: the next one clears as much
            if source is None:
                target[:, : 1 + before].zero_()
            else:
                target[:, : 1 + rank].copy_(source)
                target[:, 1 + rank : 1 + before].zero_()
            self._ranks[tower][slot] = rank
        if len(self._ids[slot]) or len(adapter.ids):
            self._ids[slot] = adapter.ids  # before the copy: if it fails, the next one clears the places
            places = torch.arange(1, 1 + len(adapter.ids), dtype=torch.int16)
            self._places[slot].zero_().index_copy_(0, adapter.ids.to(self.device), places.to(self.device))
            self._table[slot, 1 : 1 + len(adapter.ids)].copy_(adapter.rows(values))

    def adapter(self, slot: int) -> Adapter:
        """A slot as an Adapter of its own rank whose tensors are views: valid while the slot is not written."""
        vocabulary = None
        if len(ids := self._ids[slot]):
            vocabulary = Vocabulary(ids.to(self.device), self._table[slot, 1 : 1 + len(ids)])
        return Adapter(self._single("visual", slot), self._single("text", slot), vocabulary)

    def rows(self, tower: str, index: Tensor) -> TowerAdapter | StackedTower | None:
        """Applies to row b the adapter in slot index[b], (B,) int64: None where none changes this tower; plain products
        where all rows have the same slot. Raises IndexError for a slot that the stack has not.
        """
        asked = index.tolist()
        if not self.has(index):
            raise IndexError(f"slots from {min(asked)} to {max(asked)} of a stack of {self.slots}")
        ranks = self._ranks[tower]
        distinct = {slot if ranks[slot] else 0 for slot in asked}
        if len(distinct) < 2:
            return self._single(tower, distinct.pop()) if distinct else None
        return StackedTower(self._blocks[tower], index.to(self.device), max(ranks[slot] for slot in distinct))

    def vocabularies(self, index: Tensor) -> StackedVocabulary | None:
        """The vocabulary rows of the slots index (B,) int64, which `rows` has checked; None where they have none."""
        if not any(len(self._ids[slot]) for slot in set(index.tolist())):
            return None
        return StackedVocabulary(self._places, self._table, index.to(self.device))

    def whole_vocabularies(self, index: Tensor) -> StackedVocabulary | None:
        """`vocabularies` for a CUDA graph: see `whole`."""
        return StackedVocabulary(self._places, self._table, index) if self.words else None

    def whole(self, tower: str, index: Tensor) -> StackedTower:
        """`rows` for a CUDA graph: index (B,) int64 on the device and the slots may change after the capture, and each
        replay computes what they hold then. The host does not read them, so all ranks are computed.
        """
        return StackedTower(self._blocks[tower], index, self.rank)

    def has(self, index: Tensor) -> bool:
        """Whether all of these (B,) are slots of the stack."""
        return not len(index) or bool(index.min() >= 0 and index.max() < self.slots)

    def _single(self, tower: str, slot: int) -> TowerAdapter | None:
        rank = self._ranks[tower][slot]
        if not rank:
            return None
        biases, weights = self._blocks[tower][slot].split((1, self.rank), dim=1)
        down, up = weights[:, :rank].unbind(2)  # (P, r, d) each
        return TowerAdapter(down, biases[:, 0, 0, :rank], up.transpose(1, 2), biases[:, 0, 1])


@dataclass(frozen=True, slots=True)
class Slots:
    """A batch's adapters as slots of a stack: an argument of `encode_text` and `encode_frames`, one entry for each row."""

    stack: AdapterStack
    index: Tensor  # (B,) int64, on the host


def rank_of(tower: TowerAdapter | None) -> int:
    return 0 if tower is None else tower.down_weight.shape[1]


def blocks(tower: TowerAdapter, rank: int) -> Tensor:
    """(P, 1 + rank, 2, max(d, rank)): a tower's adapters as a stack holds them, zeros beyond their own rank; differentiable."""
    _, own, width = tower.down_weight.shape
    beyond, wider = rank - own, max(0, rank - width)
    down_bias = F.pad(tower.down_bias, (0, width + wider - own))[:, None]  # (P, 1, w)
    up_bias = F.pad(tower.up_bias, (0, wider))[:, None]
    down = F.pad(tower.down_weight, (0, wider, 0, beyond))  # (P, R, w)
    up = F.pad(tower.up_weight.transpose(1, 2), (0, wider, 0, beyond))
    return torch.stack([torch.cat([down_bias, down], 1), torch.cat([up_bias, up], 1)], 2)


def stacked(towers: Sequence[TowerAdapter | None], index: Tensor) -> StackedTower:
    """A stack for one batch, of adapters that have no slot; one at least is not None. Differentiable in them."""
    rank = max(map(rank_of, towers))
    parts = [None if tower is None else blocks(tower, rank) for tower in towers]
    zero = torch.zeros_like(next(part for part in parts if part is not None))
    return StackedTower(torch.stack([zero if part is None else part for part in parts]), index, rank)


def _size(dims: TowerDims, tower: str, rank: int) -> tuple[int, int, int, int]:
    width, layers = (dims.visual_width, dims.visual_layers) if tower == "visual" else (dims.text_width, dims.text_layers)
    return 2 * layers, 1 + rank, 2, width
