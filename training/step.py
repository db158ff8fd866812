"""One training step: a batch encoded, its loss, and the gradient of that in the tensors that learn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from backbone import Adapter, AdapterShape, Backbone, Prefix, mean_pool, q_score
from training.feedback import Judged
from training.inputs import Part
from training.ranks import Ranks
from training.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Learner:
    """What learns: an adapter's tensors on the frozen backbone, or every weight of a copy of it (`shape` None)."""

    backbone: Backbone
    shape: AdapterShape | None
    tensors: Mapping[str, Tensor]
    recipe: Recipe

    def adapter(self) -> Adapter | None:
        return None if self.shape is None else self.shape.assemble(self.tensors)

    def encode(self, part: Part, first_layers: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Text vectors (rows, D) and frame vectors (rows, F, D) of a part, float32."""
        backbone, recompute = self.backbone, self.recipe.recompute
        visual_layers, text_layers = first_layers
        text_prefix, frames = part.text_prefix, part.frames
        with torch.autocast(backbone.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
            adapter = self.adapter()
            if text_prefix is None and text_layers:
                with torch.no_grad():
                    text_prefix = backbone.text_prefix(part.tokens, text_layers)
            if isinstance(frames, Tensor) and visual_layers:
                with torch.no_grad():
                    frames = backbone.frame_prefix(frames, visual_layers)
            texts = backbone.encode_text(part.tokens, adapter, prefix=_on(backbone, text_prefix), recompute=recompute)
            vectors = backbone.encode_frames(
                frames if isinstance(frames, Tensor) else _on(backbone, frames), adapter, recompute=recompute
            )
        by_clip = vectors.float().unflatten(0, (-1, part.per_clip))
        return texts.float()[part.text_of.to(texts.device)], by_clip[part.clip_of.to(texts.device)]


def backward(
    learner: Learner,
    parts: Sequence[Part],
    clips: Tensor,
    first_layers: tuple[int, int],
    ranks: Ranks,
    judged: Judged | None = None,
) -> float:
    """Accumulates the gradient of the whole batch's loss in the learner's tensors; returns the loss.

    `parts` are this rank's, `clips` (B,) those of all ranks' pairs. With `judged`, hard negatives are rows behind the pairs.

    The loss needs every vector of the batch at once, the encoders do not: the gradient at the vectors is taken first,
    then each part is carried back through the encoders alone, encoded anew where there are several (gradient caching,
    Gao et al. 2021, arXiv 2101.06983). Ranks gather their vectors, each carries back its own, and the sum is the
    gradient that a single process would have found.
    """
    recipe, single = learner.recipe, len(parts) == 1
    with torch.set_grad_enabled(single):
        encoded = [learner.encode(part, first_layers) for part in parts]
    own = tuple(torch.cat([vectors[side] for vectors in encoded]) for side in (0, 1))
    texts, frames = (ranks.gather(vectors.detach()).requires_grad_() for vectors in own)
    what = texts, frames, clips.to(texts.device), learner.backbone.logit_scale, recipe
    loss = contrastive_loss(*what) if judged is None else judged_loss(*what, judged)
    gradients = torch.autograd.grad(loss, (texts, frames))
    share = ranks.share(len(texts))
    by_part = zip(*(g[share].split([len(part.text_of) for part in parts]) for g in gradients), strict=True)
    for part, mine, gradient in zip(parts, encoded, by_part, strict=True):
        vectors = mine if single else learner.encode(part, first_layers)
        learning = [i for i in (0, 1) if vectors[i].requires_grad]  # scope text: not the frames
        torch.autograd.backward([vectors[i] for i in learning], [gradient[i] for i in learning])
    ranks.add_gradients(learner.tensors.values())
    return loss.item()


def contrastive_loss(texts: Tensor, frames: Tensor, clips: Tensor, scale: float, recipe: Recipe) -> Tensor:
    """The mean of `pair_losses`."""
    return pair_losses(texts, frames, clips, scale, recipe).mean()


def pair_losses(texts: Tensor, frames: Tensor, clips: Tensor, scale: float, recipe: Recipe) -> Tensor:
    """(B,) symmetric cross-entropy of texts (B, D) with the frames (B, F, D) of their videos; `scale` is exp(logit_scale).

    Two rows of one clip (`clips`, (B,)) are not each other's negatives.
    """
    similarity = _similarity(texts, frames, recipe)
    twins = (clips[:, None] == clips).fill_diagonal_(False)
    logits = (scale * similarity).masked_fill(twins, -torch.inf)  # (B, B)
    target = torch.arange(len(texts), device=texts.device)
    return (F.cross_entropy(logits, target, reduction="none") + F.cross_entropy(logits.T, target, reduction="none")) / 2


def judged_loss(texts: Tensor, frames: Tensor, clips: Tensor, scale: float, recipe: Recipe, judged: Judged) -> Tensor:
    """The mean of the pairs' losses, with what users said: rows (B + N) as `Judged` has them, `clips` (B,).

    Text → video, a hard negative stands among the clips that a pair's text is told apart from, counted `recipe.feedback` times.
    A text that has negatives and no pair is told the same by -log of the share that the batch's clips have of the softmax over
    them and the negative. The pairs' losses are weighted; their sum is divided by B whatever the weights.
    """
    pairs, of = len(clips), math.log(recipe.feedback)
    logits = scale * _similarity(texts, frames, recipe)  # (B + N, B + N)
    weights, apart, negatives, against = (
        part.to(texts.device) for part in (judged.weights, judged.apart, judged.negatives, judged.against)
    )
    twins = ((clips[:, None] == clips) | apart).fill_diagonal_(False)
    square = logits[:pairs, :pairs].masked_fill(twins, -torch.inf)
    hard = (logits[:pairs, pairs:] + of).masked_fill(~negatives, -torch.inf)
    target = torch.arange(pairs, device=texts.device)
    forth = F.cross_entropy(torch.cat([square, hard], dim=1), target, reduction="none")
    back = F.cross_entropy(square.T, target, reduction="none")
    lone = against.any(dim=1)
    others = logits[pairs:, :pairs].masked_fill(~against, -torch.inf)[lone].logsumexp(dim=1)
    alone = F.softplus(logits[pairs:, pairs:].diagonal()[lone] + of - others)
    return ((weights * (forth + back) / 2).sum() + alone.sum()) / pairs


def _similarity(texts: Tensor, frames: Tensor, recipe: Recipe) -> Tensor:
    return q_score(texts, frames, recipe.temperature) if recipe.pooling == "q_score" else mean_pool(texts, frames)


def _on(backbone: Backbone, prefix: Prefix | None) -> Any:
    return None if prefix is None else Prefix(prefix.states.to(backbone.device), prefix.layers)
