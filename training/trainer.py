"""One training run, read from top to bottom: only the adapter's tensors learn, the backbone stays as it is."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backbone import Adapter, AdapterShape, Backbone
from training import checkpoint
from training.checkpoint import State
from training.dataset import Dataset, InvalidDataset, Split, hash_of
from training.evaluation import evaluate
from training.inputs import Inputs
from training.metrics import hits_at_1, log_ranks, paired_gain
from training.optimiser import optimiser_of, warmup_cosine
from training.progress import Progress, Tell, unheard
from training.ranks import ALONE, Ranks
from training.recipe import Recipe
from training.step import Learner, backward
from training.vocabulary import Plan, moved, plan, words_of

if TYPE_CHECKING:
    from adapters_store import Artifact

CHECKPOINTS = 50  # at most, of a run whose epochs are short
MINIMUM_QUERIES = 30  # held-out captions below which a difference of recall says nothing
EVIDENCE = ("steps", "timed_out", "not_enough_evidence", "cross_validation")  # what must be known to read the metrics


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite."""


class TimedOut(RuntimeError):
    """The time was over before anything was learnt."""


class Stopped(RuntimeError):
    """The run was asked to stop; its checkpoint tells where it stands."""


@dataclass(frozen=True, slots=True)
class Rival:
    """The adapter in use, which a new one has to be as good as."""

    digest: str
    adapter: Adapter


@dataclass(frozen=True, slots=True)
class Trained:
    """The best tensors of a run by the validation captions' mean log rank (R@1, then the earlier step, break ties).

    `shape` is None after full fine-tuning, whose tensors are the whole backbone's. `final` are the last step's. `metrics`:
    `before` (the frozen backbone), `in_use` (the rival), `after`, and over the one in use the `gain` of R@1, in points, and the
    `rank_gain`, by how much the mean log rank is lower, each with its interval.
    With fewer than MINIMUM_QUERIES held-out captions also `not_enough_evidence` and, where it could be had, `cross_validation`.
    `hits` and `log_ranks`: how each held-out caption found its video, `before` and by the `best`. `words`: those of the
    training captions that have a vocabulary row, the most frequent first.
    """

    shape: AdapterShape | None
    tensors: Mapping[str, Tensor]
    metrics: Mapping[str, Any]
    final: Mapping[str, Tensor]
    hits: Mapping[str, Sequence[float]] = field(default_factory=dict)
    log_ranks: Mapping[str, Sequence[float]] = field(default_factory=dict)
    words: Sequence[str] = ()

    def on(self, backbone: Backbone) -> tuple[Backbone, Adapter | None]:
        """What encodes with the kept tensors: the backbone with an adapter, or a tuned copy of it without."""
        if self.shape is not None:
            return backbone, self.shape.assemble(self.tensors).to(backbone.device)
        tuned, weights = backbone.unfrozen()
        with torch.no_grad():
            for name, tensor in weights.items():
                tensor.copy_(self.tensors[name])
        return tuned, None


def train(
    backbone: Backbone,
    dataset: Dataset,
    recipe: Recipe,
    report: Tell,
    start: Artifact | None = None,
    rival: Rival | None = None,
    *,
    folder: Path | None = None,
    scratch: Path | None = None,
    ranks: Ranks = ALONE,
    stop: Callable[[], bool] = lambda: False,
    seconds: float | None = None,
    folds: int = 0,
) -> Trained:
    """Trains by the symmetric contrastive loss over text-conditioned similarity (Jiang et al. 2022, section 3).

    `start`, an adapter of the same shape but for its vocabulary, is continued instead of a fresh one. `rival` is validated
    too, and the gain told is over it instead of over the frozen backbone. `report` is told the stages
    `step`, `validation` and `resumed`. With `folder`, the run keeps a checkpoint there and goes on from
    one that it finds; with `scratch`, what the frozen layers make of the data is cached there. `stop` is asked after
    each step. After `seconds` of steps, earlier starts included, the run ends with the best that it has. Where too few
    captions are held out, `folds` short trainings tell more (`cross_validate`; 0: none).
    Raises InvalidDataset, InvalidRecipe, TrainingDiverged, Stopped (after a checkpoint), TimedOut, or OSError.
    """
    split = dataset.split(recipe.validation)
    _check(split)
    learned, rejected = (split.train + split.clicked, split.rejected) if recipe.feedback else (split.train, ())
    shape = recipe.shape(backbone.dims)
    first_layers, vocabulary = (0, 0), Plan()
    if recipe.method == "full":
        tuned, weights = backbone.unfrozen()
        learner = Learner(tuned, None, weights, recipe)
    else:
        first_layers = shape.first_layers(recipe.layers)
        vocabulary = plan(backbone, shape, dataset.clips, learned, recipe)
        if start is not None:
            vocabulary = vocabulary.with_ids(start.shape.vocabulary)
        shape = replace(shape, vocabulary=vocabulary.ids)
        if vocabulary.ids:
            first_layers = (first_layers[0], 0)  # a row changes what every layer sees
        initial = shape.initial(recipe.seed, recipe.layers, recipe.start)
        if start is not None:
            initial |= shape.continued(start.shape, start.tensors)
        tensors = {name: value.clone().to(backbone.device).requires_grad_() for name, value in initial.items()}
        learner = Learner(backbone, shape, tensors, recipe)
    rates = torch.tensor(vocabulary.rates, device=learner.backbone.device) if vocabulary.ids else None
    optimiser = optimiser_of(learner.tensors, recipe, rates)
    steps = recipe.total_steps(len(learned))
    inputs = Inputs(backbone, dataset.clips, learned, recipe, ranks, first_layers, scratch, rejected)
    validations = {max(1, round(steps * (i + 1) / recipe.evaluations)) for i in range(recipe.evaluations)}
    save_every = max(inputs.batches.per_epoch, steps // CHECKPOINTS)
    crossed = len(split.validation) < MINIMUM_QUERIES and ranks.count == 1 and recipe.method != "full"
    crossed = crossed and 0 < 2 * folds <= steps  # one step a fold says nothing
    work = 2 * steps if crossed else steps  # the folds are about as much again
    run = _name_of(backbone, dataset, recipe, start, rival, ranks, vocabulary)
    path = None if folder is None else folder / "checkpoint.safetensors"

    def measure(model: Backbone, adapter: Adapter | None) -> tuple[dict[str, Any], list[float], list[float]]:
        found = evaluate(
            model, adapter, dataset.clips, split.validation, recipe.temperature, words=recipe.words, pooling=recipe.pooling
        )
        hits, ranks = (of(found.similarity, found.targets).tolist() for of in (hits_at_1, log_ranks))
        return {**found.to_json(), "log_rank": round(sum(ranks) / len(ranks), 4)}, hits, ranks

    def validate(step: int) -> None:
        found, hits, ranks = measure(learner.backbone, learner.adapter() if step else None)
        point = {"step": step, **found}
        done.curve.append(point)
        report(Progress("validation", step, steps, found))
        if not step:
            done.hits["before"], done.log_ranks["before"] = hits, ranks
        elif not done.best or _quality(point) > _quality(done.best):
            done.best, done.hits["best"], done.log_ranks["best"] = point, hits, ranks
            done.kept = {name: t.detach().cpu().clone() for name, t in learner.tensors.items()}

    def save() -> None:
        if path is not None and ranks.first:
            checkpoint.save(path, run, done, learner.tensors, optimiser)

    resumed = checkpoint.restore(path, run, learner.tensors, optimiser) if path is not None else None
    done = resumed or State()
    if resumed is not None:
        report(Progress("resumed", done.step, steps))
    elif ranks.first:
        validate(0)  # the frozen backbone: zero-shot
        if rival is not None:
            done.rival, done.hits["rival"], done.log_ranks["rival"] = measure(backbone, rival.adapter)
    spent, last = done.seconds, time.monotonic()
    timed_out = done.step < steps and seconds is not None and ranks.any(spent >= seconds)
    for step, parts in inputs.stream(done.step, done.step if timed_out else steps):
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * warmup_cosine(step - 1, steps, recipe.warmup)
        optimiser.zero_grad(set_to_none=True)
        loss = backward(learner, parts, inputs.clips_of(step), first_layers, ranks, inputs.judged_of(step))
        if not math.isfinite(loss):
            raise TrainingDiverged(f"the loss became {loss} at step {step}: try a lower learning rate")
        torch.nn.utils.clip_grad_norm_(list(learner.tensors.values()), recipe.gradient_clip)
        optimiser.step()
        done.step = step
        done.seconds = spent + time.monotonic() - last
        timed_out = seconds is not None and step < steps and ranks.any(done.seconds >= seconds)
        done.losses.append(round(loss, 6))
        if ranks.first:
            rate = optimiser.param_groups[0]["lr"]
            report(Progress("step", step, steps, {"work": work, "loss": done.losses[-1], "lr": rate}))
            if step in validations or timed_out:
                validate(step)
        ranks.wait()
        stopping = ranks.any(stop())
        if step in validations or timed_out or step % save_every == 0 or stopping:
            save()
        if stopping and step < steps:
            raise Stopped(f"stopped after step {step} of {steps}; run it again to go on")
        if timed_out:
            break
    if ranks.first and timed_out and done.step and not done.best:  # the time was over where an earlier start had stopped
        validate(done.step)
    if ranks.first and not done.best:
        raise TimedOut(f"the time was over after {done.seconds:.0f} s and {done.step} of {steps} steps, before a validation")
    metrics = _metrics(done, split, rival, steps)
    if crossed and not (seconds is not None and done.seconds > seconds / 2):
        metrics["cross_validation"] = cross_validate(backbone, dataset, recipe, steps, report, folds, stop)
    final = {name: t.detach().cpu() for name, t in learner.tensors.items()}
    if learner.shape is None:
        return Trained(None, {**backbone.weights(), **done.kept}, metrics, final, dict(done.hits), dict(done.log_ranks))
    kept = dict(done.kept)
    if vocabulary.ids and ranks.first:
        rows = moved(shape, kept["vocabulary_rows"], backbone)
        shape = replace(shape, vocabulary=tuple(shape.vocabulary[row] for row in rows))
        kept["vocabulary_rows"] = kept["vocabulary_rows"][rows]
        if not rows:
            del kept["vocabulary_rows"]
    words = words_of(backbone, shape.vocabulary, [pair.text for pair in learned])
    return Trained(shape, kept, metrics, final, dict(done.hits), dict(done.log_ranks), words)


def cross_validate(
    backbone: Backbone,
    dataset: Dataset,
    recipe: Recipe,
    steps: int,
    report: Tell,
    folds: int,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """What a recipe brings on videos it has not seen, by `folds` trainings that each hold out another part of the videos.

    Each trains a fresh adapter for its share of `steps`, so that all of them together cost one more training of that many,
    and is measured after its last step: nothing is chosen by the held-out captions. Every caption of the training and the
    validation split is a query once, among the videos of its fold. Fewer steps than the run itself: its gain is rather
    understated. None where a fold has nothing to learn from. Raises Stopped, TrainingDiverged, OSError.
    """
    videos = sorted({pair.video for pair in dataset.pairs if dataset.splits.get(pair.video) != "test"}, key=hash_of)
    folds = min(folds, len(videos) // 2)
    if folds < 2:
        return None
    short = recipe.model_copy(update={"steps": max(1, steps // folds), "evaluations": 1})
    found: list[tuple[Trained, list[str]]] = []
    for fold in range(folds):
        report(Progress("cross_validation", fold, folds))
        held_out = videos[fold::folds]
        sides = dict.fromkeys(videos, "train") | dict.fromkeys(held_out, "validation")
        part = replace(dataset, splits={**dataset.splits, **sides})
        try:
            trained = train(backbone, part, short, unheard, stop=stop)
        except InvalidDataset:
            return None
        found.append((trained, [pair.video for pair in part.split(recipe.validation).validation]))
    hits, ranks = (
        {side: [value for each in of for value in each[side]] for side in ("before", "best")}
        for of in ([trained.hits for trained, _ in found], [trained.log_ranks for trained, _ in found])
    )
    owners = [video for _, fold_videos in found for video in fold_videos]
    recalls = {
        "before": round(100 * sum(hits["before"]) / len(owners), 2),
        "after": round(100 * sum(hits["best"]) / len(owners), 2),
    }
    return {
        "folds": folds,
        "steps": short.steps,
        "queries": len(owners),
        "videos": len(videos),
        **{side: {"text_to_video": {"R@1": value}} for side, value in recalls.items()},
        **_gains(hits, ranks, "before", owners),
    }


def _check(split: Split) -> None:
    """Raises InvalidDataset for what a contrastive loss cannot learn from."""
    if len({pair.clip for pair in split.train}) < 2:
        raise InvalidDataset("a contrastive loss needs at least 2 captioned training videos")
    if len({pair.text for pair in split.train}) < 2:
        raise InvalidDataset("all training captions are the same: there is nothing to tell the videos apart by")


def _name_of(
    backbone: Backbone,
    dataset: Dataset,
    recipe: Recipe,
    start: Artifact | None,
    rival: Rival | None,
    ranks: Ranks,
    vocabulary: Plan,
) -> str:
    """Names everything that decides the outcome of a run: a checkpoint is of this run if its name is equal."""
    others = [None if other is None else other.digest for other in (start, rival)]
    facts = [backbone.fingerprint, dataset.digest(), recipe.to_json(), *others, ranks.count, vocabulary.ids]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _metrics(done: State, split: Split, rival: Rival | None, steps: int) -> dict[str, Any]:
    directions = ("text_to_video", "video_to_text")
    losses = list(enumerate(done.losses, start=1))
    metrics: dict[str, Any] = {
        "before": {name: done.curve[0][name] for name in directions} if done.curve else {},
        "after": {name: done.best[name] for name in directions} if done.best else {},
        "best_step": done.best.get("step"),
        "steps": done.step,
        "curve": done.curve,
        "loss": losses[:: max(1, len(losses) // 200)],
        "data": {
            "train_videos": len({p.video for p in split.train}),
            "train_pairs": len(split.train),
            "validation_videos": sorted({p.video for p in split.validation}),
            "validation_pairs": len(split.validation),
        },
    }
    if split.clicked or split.rejected:
        metrics["data"]["feedback"] = {"relevant": len(split.clicked), "irrelevant": len(split.rejected)}
    if done.step < steps:
        metrics["timed_out"] = {"steps": done.step, "of": steps}
    if len(split.validation) < MINIMUM_QUERIES:
        metrics["not_enough_evidence"] = True
    if rival is not None and done.rival:
        metrics["in_use"] = {"digest": rival.digest, **{name: done.rival[name] for name in directions}}
    if done.best:
        videos = [pair.video for pair in split.validation]
        metrics |= _gains(done.hits, done.log_ranks, "rival" if rival else "before", videos)
    return metrics


def _gains(
    hits: Mapping[str, Sequence[float]], ranks: Mapping[str, Sequence[float]], over: str, videos: Sequence[str]
) -> dict[str, Any]:
    """`gain` and `rank_gain` of the best over `before` or the `rival`."""
    recall = [100 * (b - a) for a, b in zip(hits[over], hits["best"], strict=True)]
    rank = [a - b for a, b in zip(ranks[over], ranks["best"], strict=True)]
    return {"gain": asdict(paired_gain(recall, videos)), "rank_gain": asdict(paired_gain(rank, videos))}


def _quality(point: Mapping[str, Any]) -> tuple[float, float]:
    return -point["log_rank"], point["text_to_video"]["R@1"]
