"""Vocabulary rows: what an adapter adds to the frozen embeddings of the tokens that it knows.

    x[b, t] = token_embedding[id] + row[id] + positional_embedding[t],  id = tokens[b, t]

A token without a row keeps its frozen embedding. An adapter of the paper has no rows; the words that a backbone has never seen
are out of its reach, as they stand in the token embeddings alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

VOCABULARY_ROWS = 512  # of one adapter, at most: what each slot of a stack has room for
Offsets = Callable[[Tensor], Tensor]  # tokens (B, L) int64 on the device → (B, L, d), what is added to their embeddings


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """One adapter's rows; the same for every text of a batch. Differentiable in `rows`."""

    ids: Tensor  # (V,) int64, ascending, V ≥ 1
    rows: Tensor  # (V, d)

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens (B, L) → (B, L, d), zero for tokens without a row."""
        place = torch.searchsorted(self.ids, tokens.contiguous()).clamp_(max=len(self.ids) - 1)
        return F.embedding(place, self.rows) * (self.ids[place] == tokens).unsqueeze(-1)

    def to(self, device: torch.device) -> Vocabulary:
        return Vocabulary(self.ids.to(device), self.rows.to(device))


@dataclass(frozen=True, slots=True)
class StackedVocabulary:
    """The rows of a batch's adapters, each text's from the slot of its own."""

    places: Tensor  # (S, N) int16: of each token id its place in the slot's table, 0 without a row
    table: Tensor  # (S, 1 + room, d), zeros at place 0
    index: Tensor  # (B,) int64, on the same device

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens (B, L) → (B, L, d), zero for tokens without a row. Semantics: row b is `Vocabulary` of slot index[b]."""
        slots = self.index.unsqueeze(1)  # (B, 1)
        place = slots * self.table.shape[1] + self.places[slots, tokens]  # (B, L)
        return F.embedding(place, self.table.flatten(0, 1))


@dataclass(frozen=True, slots=True)
class ByText:
    """The rows of adapters that have no slot, one for each text or None; one at least is not None."""

    vocabularies: Sequence[Vocabulary | None]

    def __call__(self, tokens: Tensor) -> Tensor:
        found = [None if own is None else own(tokens[b : b + 1]) for b, own in enumerate(self.vocabularies)]  # (1, L, d) each
        zero = torch.zeros_like(next(offsets for offsets in found if offsets is not None))
        return torch.cat([zero if offsets is None else offsets for offsets in found])
