"""A whole run: videos and backbone loaded, trained, published into a folder, with a report where one is asked for."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import adapters_store
from adapters_store import durable
from backbone import Backbone, load_backbone
from training.checkpoint import write_tensors
from training.dataset import Dataset, InvalidDataset
from training.evaluation import evaluate
from training.progress import Progress, Tell, unheard
from training.ranks import Ranks
from training.recipe import Recipe
from training.report import write_json, write_report
from training.source import Source
from training.trainer import EVIDENCE, Rival, Trained, train

WORDS = 200  # named in a manifest
LOCK_SECONDS = 10.0  # a run whose parent was killed needs a step to notice


class InUse(RuntimeError):
    """Another process trains into the same folder."""


def run(
    source: Source,
    out: Path,
    backbone_name: str,
    pretrained: str | None,
    recipe_fields: dict[str, Any],
    parent: Path | None,
    device: str | None,
    report: Tell,
    test: bool = False,
    html: Path | None = None,
    tensorboard: Path | None = None,
    rival_file: Path | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Trains and publishes into `out`; returns `{digest, before, after, queries, test, seconds}` (R@1, text to video, in per
    cent, of so many held-out queries), and what of `timed_out`, `not_enough_evidence`, `cross_validation` there is.
    """
    started = time.monotonic()
    corpus = source.corpus()
    protocol = {} if corpus is None else {"frames": corpus.frames, "words": corpus.words}
    recipe = Recipe.of({**protocol, **recipe_fields})
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    ranks = Ranks.join(where)
    if where.type == "cuda" and ranks.count > 1:
        where = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(where)
    backbone = load_backbone(backbone_name, pretrained, where)
    shape = recipe.shape(backbone.dims)
    before = None
    if parent is not None:
        before = adapters_store.unpack(parent.read_bytes())
        before.adapter(backbone.fingerprint)
    rival = None
    if rival_file is not None:
        known = adapters_store.unpack(rival_file.read_bytes())
        rival = Rival(known.digest, known.adapter(backbone.fingerprint).to(backbone.device))
    start = before if before is not None and replace(before.shape, vocabulary=()) == shape else None
    with _alone(out, ranks.first) as scratch, _stop_signals() as stop, _logged(report, tensorboard, ranks.first) as tell:
        if ranks.first:
            loaded = source.load(corpus, scratch, backbone.form, tell)
        ranks.wait()
        if not ranks.first:
            loaded = source.load(corpus, scratch, backbone.form, tell, decode=False)
        trained = train(
            backbone, loaded, recipe, tell, start, rival, folder=out, scratch=scratch, ranks=ranks, stop=stop,
            seconds=seconds, folds=recipe.folds,
        )  # fmt: skip
        done: dict[str, Any] = {}
        if ranks.first:
            tested = _test(backbone, loaded, recipe, trained) if test else None
            facts = {"parent": None if before is None else before.digest, "command": " ".join(sys.argv[1:])}
            digest = _publish(out, backbone, recipe, trained, tested, facts)
            if html is not None:
                _write_report(html, backbone, loaded, recipe, trained, digest)
            (out / "checkpoint.safetensors").unlink(missing_ok=True)
            done = {
                "digest": digest,
                "before": trained.metrics["before"]["text_to_video"]["R@1"],
                "after": trained.metrics["after"]["text_to_video"]["R@1"],
                "queries": trained.metrics["after"]["text_to_video"]["queries"],
                "test": None if tested is None else tested["text_to_video"]["R@1"],
                "seconds": round(time.monotonic() - started, 1),
                **{name: trained.metrics[name] for name in EVIDENCE if name in trained.metrics},
            }
        ranks.wait()
    ranks.leave()
    return done


def _test(backbone: Backbone, dataset: Dataset, recipe: Recipe, trained: Trained) -> dict[str, Any]:
    """Metrics of the kept tensors on the test split, which nothing was chosen by. Raises InvalidDataset where it is empty."""
    pairs = dataset.split(recipe.validation).test
    if not pairs:
        raise InvalidDataset("the split 'test' is empty: leave --test out")
    model, adapter = trained.on(backbone)
    found = evaluate(model, adapter, dataset.clips, pairs, recipe.temperature, words=recipe.words, pooling=recipe.pooling)
    return found.to_json(intervals=True)


def _publish(
    out: Path,
    backbone: Backbone,
    recipe: Recipe,
    trained: Trained,
    tested: dict[str, Any] | None,
    facts: Mapping[str, Any],
) -> str:
    """Writes the adapter and its manifest, or the tuned weights and what is known of them; returns the file's sha256."""
    metrics = {**trained.metrics, **({"test": tested} if tested is not None else {})}
    data = metrics.pop("data")
    created_at = datetime.now(UTC).isoformat(timespec="seconds")
    if trained.shape is None:
        weights = out / "weights.safetensors"
        write_tensors(weights, trained.tensors, {"command": facts["command"]})
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        about = {"digest": digest, "recipe": recipe.to_json(), "metrics": metrics, "data": data, "created_at": created_at}
        durable.write(out / "manifest.json", json.dumps(about, indent=2).encode())
        return digest
    packed = adapters_store.pack(trained.shape, backbone.fingerprint, trained.tensors)
    manifest = adapters_store.describe(
        packed,
        recipe=recipe.to_json(),
        data=data,
        metrics=metrics,
        words=list(trained.words[:WORDS]),
        parent=facts["parent"],
        created_at=created_at,
    )
    adapters_store.write(out, packed, manifest)
    return manifest.digest


def _write_report(html: Path, backbone: Backbone, dataset: Dataset, recipe: Recipe, trained: Trained, digest: str) -> None:
    pairs = dataset.split(recipe.validation).validation
    model, adapter = trained.on(backbone)
    how: dict[str, Any] = {"words": recipe.words, "pooling": recipe.pooling}
    results = {
        "frozen backbone": evaluate(backbone, None, dataset.clips, pairs, recipe.temperature, **how),
        "trained": evaluate(model, adapter, dataset.clips, pairs, recipe.temperature, **how),
    }
    about = {"backbone": backbone.name, "sha256": digest, **{k: v for k, v in recipe.to_json().items() if v is not None}}
    told: dict[str, Any] = {"title": "Training", "facts": about, "results": results}
    told |= {"curve": trained.metrics["curve"], "loss": trained.metrics["loss"]}
    write_report(html, pairs=pairs, thumbnails=dataset.thumbnail, **told)
    write_json(html.with_suffix(".json"), **told)


@contextmanager
def _alone(out: Path, first: bool) -> Iterator[Path]:
    """A scratch folder in `out`, which no other run may use meanwhile. Raises InUse."""
    scratch = out / ".scratch"
    if not first:  # the first rank holds the folder for all
        yield scratch
        return
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            durable.lock(lock, LOCK_SECONDS)
        except TimeoutError:
            raise InUse(f"another run trains into {out}") from None
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            (out / ".lock").unlink(missing_ok=True)


@contextmanager
def _stop_signals() -> Iterator[Any]:
    """A function that says whether SIGTERM or SIGINT has come; a second one ends the process at once."""
    received = []

    def note(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _logged(report: Tell, folder: Path | None, first: bool) -> Iterator[Tell]:
    """`report`, on the first rank alone, and the same numbers for TensorBoard where a folder is given."""
    if not first:
        yield unheard
        return
    if folder is None:
        yield report
        return
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(folder)) as writer:

        def tell(progress: Progress) -> None:
            report(progress)
            if progress.stage == "step":
                writer.add_scalar("loss", progress.facts["loss"], progress.done)
                writer.add_scalar("learning rate", progress.facts["lr"], progress.done)
            if progress.stage == "validation":
                for direction in ("text_to_video", "video_to_text"):
                    for metric in ("R@1", "R@5", "R@10", "MdR", "MnR"):
                        writer.add_scalar(f"{direction}/{metric}", progress.facts[direction][metric], progress.done)

        yield tell
