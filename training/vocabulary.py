"""Which tokens of the training captions get a vocabulary row, and how much of the learning rate each row takes.

A row of a word that the backbone knows may do harm where there are few pairs; a word that it has never seen needs the full
rate. How well it knows a word is told by how well it tells the captions with that word from others, before any training.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from backbone import VOCABULARY_ROWS, AdapterShape, Backbone
from training.dataset import Clips, Pair
from training.evaluation import encode_clips, encode_texts
from training.recipe import Recipe
from training.step import pair_losses

ASKED = 512  # pairs whose captions are judged, at most
LEAST_RATE = 0.1  # of a word that the backbone knows
LEAST_PAIRS = 2  # that a token must be in: what one caption alone has can only be learned by heart
SHARE = 0.01  # of the backbone's values: what an adapter with `auto` rows stays under
MOVED = 0.01  # of its embedding's norm: a row that is shorter is dropped


@dataclass(frozen=True, slots=True)
class Plan:
    """The tokens that get a row, ascending, and the share of the learning rate that each row takes."""

    ids: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()

    def with_ids(self, more: Sequence[int]) -> Plan:
        """With the tokens of an adapter that is continued, which come first where there is no room for all; those that this
        plan has not at the least rate.
        """
        planned = dict(zip(self.ids, self.rates, strict=True))
        ids = sorted(list(dict.fromkeys([*more, *self.ids]))[:VOCABULARY_ROWS])
        return Plan(tuple(ids), tuple(planned.get(token, LEAST_RATE) for token in ids))


def plan(backbone: Backbone, shape: AdapterShape, clips: Clips, pairs: Sequence[Pair], recipe: Recipe) -> Plan:
    """The tokens whose captions the frozen backbone tells apart worst, summed over the captions.

    The rate of a token is the mean of its captions' contrastive loss, as a share of chance's (the logarithm of the batch
    size), between LEAST_RATE and 1. ASKED captions are judged; a token that is in none of them counts as their mean. `auto`
    takes tokens of two pairs or more, and keeps the adapter under SHARE of the backbone's values.
    """
    if recipe.vocabulary == "off" or shape.scope == "vision":
        return Plan()
    if recipe.vocabulary == "auto":
        room = (math.floor(SHARE * backbone.parameters) - shape.parameters) // shape.dims.text_width
        most, least = max(0, min(VOCABULARY_ROWS, room)), LEAST_PAIRS
    else:
        most, least = recipe.vocabulary, 1
    drawn = np.random.default_rng(recipe.seed).permutation(len(pairs))[:ASKED]
    losses = _losses(backbone, clips, [pairs[i] for i in drawn], recipe).tolist()
    tokens = backbone.tokenize([pair.text for pair in pairs], recipe.words).ids
    texts = [set(row[:end]) for row, end in zip(tokens.tolist(), backbone.lengths(tokens).tolist(), strict=True)]
    counts = Counter(token for text in texts for token in text)
    judged: dict[int, list[float]] = {}
    for i, loss in zip(drawn.tolist(), losses, strict=True):
        for token in texts[i]:
            judged.setdefault(token, []).append(loss)
    found = {token: judged.get(token, losses) for token, count in counts.items() if count >= least}
    share = {token: sum(own) / len(own) for token, own in found.items()}
    ids = sorted(sorted(share, key=lambda token: (-counts[token] * share[token], token))[:most])
    return Plan(tuple(ids), tuple(min(1.0, max(LEAST_RATE, share[token])) for token in ids))


def moved(shape: AdapterShape, rows: Tensor, backbone: Backbone) -> list[int]:
    """Which rows (V, d) are worth keeping: those that have learned something."""
    frozen = backbone.token_embedding[torch.tensor(shape.vocabulary)].norm(dim=1).cpu()
    return [row for row, far in enumerate((rows.cpu().norm(dim=1) > MOVED * frozen).tolist()) if far]


def words_of(backbone: Backbone, ids: Sequence[int], texts: Sequence[str]) -> list[str]:
    """The words of the texts of which a token has a row, the most frequent first."""
    known = set(ids)
    counted = Counter(word for text in texts for word in re.findall(r"\w+", text.lower()))
    words = [word for word, _ in counted.most_common()]
    tokens = backbone.tokenize(words).ids if words else torch.empty(0, 1)
    inner = [row[1 : length - 1] for row, length in zip(tokens.tolist(), backbone.lengths(tokens).tolist(), strict=True)]
    return [word for word, own in zip(words, inner, strict=True) if known.intersection(own)]


@torch.inference_mode()
def _losses(backbone: Backbone, clips: Clips, pairs: Sequence[Pair], recipe: Recipe) -> Tensor:
    """(P,) contrastive loss of each pair among a batch of others under the frozen backbone, as a share of chance's."""
    rows = sorted({pair.clip for pair in pairs})
    place = {clip: i for i, clip in enumerate(rows)}
    middle = np.full((len(rows), 1), clips.frames // 2, np.int64)  # one frame of each tells enough
    frames = encode_clips(backbone, None, clips, rows, middle)
    texts = encode_texts(backbone, None, [pair.text for pair in pairs], recipe.words)
    size = min(recipe.batch_size, len(pairs))
    found = []
    for first in range(0, len(pairs), size):
        last = min(len(pairs), first + size)
        chosen = range(max(0, last - size), last)  # the last batch takes some again, to be as large
        own = torch.tensor([place[pairs[i].clip] for i in chosen], device=frames.device)
        loss = pair_losses(texts[chosen.start : chosen.stop], frames[own], own, backbone.logit_scale, recipe)
        found.append(loss[first - last :].cpu() / math.log(max(2, size)))
    return torch.cat(found)
