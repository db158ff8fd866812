"""One training run, read from top to bottom: only the adapter's tensors learn, the backbone stays as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from backbone import AdapterShape, Backbone, q_score
from training.dataset import Dataset, InvalidDataset, batches
from training.evaluation import evaluate
from training.recipe import Recipe

Report = Callable[[dict[str, Any]], None]


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True, slots=True)
class Trained:
    """The best adapter of a run by validation R@1 (R@5, then the earlier step, break ties)."""

    shape: AdapterShape
    tensors: Mapping[str, Tensor]
    metrics: Mapping[str, Any]


def train(
    backbone: Backbone,
    dataset: Dataset,
    recipe: Recipe,
    report: Report,
    start: Mapping[str, Tensor] | None = None,
) -> Trained:
    """Trains an adapter by the symmetric contrastive loss over text-conditioned similarity (Jiang et al. 2022, section 3).

    `start`, tensors of the same shape, continues an adapter instead of a fresh one. `report` gets one dict an event:
    `{"event": "step" | "validation", …}`. Raises InvalidDataset or TrainingDiverged.
    """
    shape = recipe.shape(backbone.dims)
    split = dataset.split(recipe.validation)
    if len({pair.clip for pair in split.train}) < 2:
        raise InvalidDataset("a contrastive loss needs at least 2 captioned training videos")
    initial = shape.initial(recipe.seed) if start is None else start
    tensors = {name: value.clone().to(backbone.device).requires_grad_() for name, value in initial.items()}
    matrices = [t for name, t in tensors.items() if name.endswith("weight")]
    biases = [t for name, t in tensors.items() if name.endswith("bias")]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": biases, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        eps=1e-6,
    )
    steps = recipe.total_steps(len(split.train))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: warmup_cosine(step, steps, recipe.warmup))
    rng = np.random.default_rng(recipe.seed)
    stream = batches(split.train, recipe.batch_size, rng)
    marks = {max(1, round(steps * (i + 1) / recipe.evaluations)) for i in range(recipe.evaluations)}

    def validate(step: int) -> dict[str, Any]:
        to_video, to_text = evaluate(
            backbone, shape.assemble(tensors) if step else None, dataset.pixels, split.validation, recipe.temperature
        )
        point = {"step": step, "text_to_video": to_video.to_json(), "video_to_text": to_text.to_json()}
        report({"event": "validation", "steps": steps, **point})
        return point

    before = validate(0)  # the frozen backbone: zero-shot
    best: dict[str, Any] = {}
    kept: dict[str, Tensor] = {}
    losses: list[tuple[int, float]] = []
    curve = [before]
    for step in range(1, steps + 1):
        batch = next(stream)
        adapter = shape.assemble(tensors)
        tokens = backbone.tokenize([pair.text for pair in batch]).ids
        pixels = torch.from_numpy(sample_frames(dataset.pixels, [p.clip for p in batch], recipe.frames, rng))  # (B, F, …)
        texts = backbone.encode_text(tokens, adapter)  # (B, D)
        frames = backbone.encode_frames(pixels.flatten(0, 1), adapter).unflatten(0, pixels.shape[:2])  # (B, F, D)
        logits = backbone.logit_scale * q_score(texts, frames, recipe.temperature)  # (B, B)
        target = torch.arange(len(batch), device=logits.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        if not math.isfinite(loss.item()):
            raise TrainingDiverged(f"the loss became {loss.item()} at step {step}: try a lower learning rate")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(tensors.values()), recipe.gradient_clip)
        optimiser.step()
        schedule.step()
        losses.append((step, round(loss.item(), 4)))
        report({"event": "step", "step": step, "steps": steps, "loss": losses[-1][1], "lr": schedule.get_last_lr()[0]})
        if step in marks:
            point = validate(step)
            curve.append(point)
            if not best or _quality(point) > _quality(best):
                best, kept = point, {name: t.detach().cpu().clone() for name, t in tensors.items()}
    metrics = {
        "before": {"text_to_video": before["text_to_video"], "video_to_text": before["video_to_text"]},
        "after": {"text_to_video": best["text_to_video"], "video_to_text": best["video_to_text"]},
        "best_step": best["step"],
        "curve": curve,
        "loss": losses[:: max(1, len(losses) // 200)],
        "data": {
            "train_videos": len({p.video for p in split.train}),
            "train_pairs": len(split.train),
            "validation_videos": sorted({p.video for p in split.validation}),
            "validation_pairs": len(split.validation),
        },
    }
    return Trained(shape, kept, metrics)


def warmup_cosine(step: int, steps: int, warmup: float) -> float:
    """Factor of the learning rate: linear from 0 over the first `warmup · steps`, then a cosine to 0."""
    rise = warmup * steps
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1.0, steps - rise))))


def sample_frames(
    pixels: NDArray[np.uint8], clips: list[int], count: int, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """(B, count, 3, S, S) uint8: one frame at random from each of `count` equal slices; all in order if count covers them."""
    cached = pixels.shape[1]
    if count >= cached:
        return pixels[clips]
    edges = np.floor(np.linspace(0, cached, count + 1))
    picks = np.stack([rng.integers(low, max(low + 1, high), len(clips)) for low, high in pairwise(edges)], axis=1)  # (B, count)
    return np.stack([pixels[clip][pick] for clip, pick in zip(clips, picks, strict=True)])


def _quality(point: Mapping[str, Any]) -> tuple[float, float]:
    return point["text_to_video"]["R@1"], point["text_to_video"]["R@5"]
