"""What users said of hits, in a batch: clicks weigh less than captions, and what they rejected is a hard negative.

A hard negative is a row of its own behind the batch's pairs, with the query as its text and the rejected clip as its frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.dataset import Pair
from training.recipe import Recipe

SHARE = 4  # hard negatives beside a batch: at most one for so many pairs


@dataclass(frozen=True, slots=True)
class Judged:
    """Of a batch of B pairs and the N hard negatives behind them: the `weights` (B,) of the pairs' losses; `apart` (B, B),
    where the column's clip is no negative of the row's text (nor the other way round); `negatives` (B, N), where the column is
    a hard negative of the row's text; `against` (N, B), the clips that a negative without a pair of its text is set against.
    """

    weights: Tensor
    apart: Tensor
    negatives: Tensor
    against: Tensor


@dataclass(frozen=True, slots=True)
class Feedback:
    """`relevant`: the known clips of each text that was clicked; `rejected`: the hard negatives of each text; `lone`: those of
    texts without a pair.
    """

    recipe: Recipe
    relevant: dict[str, frozenset[int]]
    rejected: dict[str, list[Pair]]
    lone: list[Pair]

    @classmethod
    def of(cls, pairs: Sequence[Pair], rejected: Sequence[Pair], recipe: Recipe) -> Feedback | None:
        """None where there is none, or the recipe does not ask for it."""
        clicked = {pair.text for pair in pairs if pair.clicked}
        if not recipe.feedback or not (clicked or rejected):
            return None
        relevant: dict[str, set[int]] = {text: set() for text in clicked}
        for pair in pairs:
            if pair.text in clicked:
                relevant[pair.text].add(pair.clip)
        of_text: dict[str, list[Pair]] = {}
        for pair in rejected:
            of_text.setdefault(pair.text, []).append(pair)
        paired = {pair.text for pair in pairs}
        lone = [pair for pair in rejected if pair.text not in paired]
        return cls(recipe, {text: frozenset(clips) for text, clips in relevant.items()}, of_text, lone)

    def negatives(self, step: int, pairs: Sequence[Pair]) -> list[Pair]:
        """Hard negatives beside a step's pairs: of their texts, and of texts without a pair; half of each if both are many."""
        rng = np.random.default_rng([self.recipe.seed, step, 1])
        room = max(1, len(pairs) // SHARE)
        own = [pair for text in dict.fromkeys(pair.text for pair in pairs) for pair in self.rejected.get(text, ())]
        chosen = _drawn(own, max(room - len(self.lone), -(-room // 2)), rng)
        return chosen + _drawn(self.lone, room - len(chosen), rng)

    def judge(self, pairs: Sequence[Pair], negatives: Sequence[Pair]) -> Judged:
        rows = [*pairs, *negatives]
        texts, videos, clips = (_numbered([getattr(row, what) for row in rows]) for what in ("text", "video", "clip"))
        b = len(pairs)
        clicked = torch.tensor([pair.clicked for pair in pairs])
        apart = (videos[:b, None] == videos[:b]) & (clicked[:, None] | clicked)  # a user's part of a video, and the whole of it
        for i, pair in enumerate(pairs):
            if (known := self.relevant.get(pair.text)) is not None:  # what else a user found by the same words
                apart[i] |= torch.tensor([other.clip in known for other in pairs])
        own = texts[:b, None] == texts[b:]  # (B, N)
        against = (~own.any(dim=0))[:, None] & (clips[b:, None] != clips[:b])
        for n, negative in enumerate(negatives):
            if against[n].any():
                gone = {pair.clip for pair in self.rejected[negative.text]}
                against[n] &= torch.tensor([pair.clip not in gone for pair in pairs])
        weights = torch.where(clicked, self.recipe.feedback, 1.0)
        return Judged(weights, apart, own, against)


def _drawn(pairs: Sequence[Pair], count: int, rng: np.random.Generator) -> list[Pair]:
    return [pairs[i] for i in rng.permutation(len(pairs))[: max(0, count)]]


def _numbered(values: Sequence[object]) -> Tensor:
    """Equal numbers for equal values."""
    numbers: dict[object, int] = {}
    return torch.tensor([numbers.setdefault(value, len(numbers)) for value in values])
