"""`python -m training`: trains an adapter from captioned videos and writes it to a folder.

The videos come from a published data set on disk (`--data-set msrvtt --root DIR`), from a JSONL of files and captions
(`--data-set jsonl`), or from cached frames (`--dataset FILE`, as the service hands them over). The same command goes on
where a run in the same folder stopped. In a terminal it draws a progress bar; otherwise, or with `--json`, it prints one
JSON object a line on standard output, the last of them `{"event": "done", …}` or `{"event": "error", …}`.
Several GPUs: `torchrun --nproc-per-node N -m training …`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from training.display import Bar, JsonLines, errors, evidence, print_json

if TYPE_CHECKING:
    from backbone import Backbone
    from training.dataset import Dataset
    from training.recipe import Recipe
    from training.source import Source
    from training.trainer import Trained

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


LOCK_SECONDS = 10.0  # a run whose parent was killed needs a step to notice


class InUse(RuntimeError):
    """Another process trains into the same folder."""


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="folder for the adapter, its manifest and, on the way, the checkpoint")],
    dataset: Annotated[Path | None, typer.Option(help="JSONL of cached frames: {video, frames, captions} a line")] = None,
    data: Annotated[str | None, typer.Option("--data-set", help="msrvtt, msvd, vatex, didemo, activitynet or jsonl")] = None,
    root: Annotated[Path | None, typer.Option(help="folder (jsonl: file) of that data set; docs/datasets.md")] = None,
    variant: Annotated[str | None, typer.Option(help="of the data set, such as 7k of msrvtt")] = None,
    cache: Annotated[Path | None, typer.Option(help="folder of decoded frames; default: ROOT/frames")] = None,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="go on without missing or broken videos")] = False,
    backbone: Annotated[str, typer.Option(help="builtin, or an open_clip architecture")] = "builtin",
    pretrained: Annotated[str | None, typer.Option(help="tag, file or 'random'")] = None,
    preset: Annotated[str | None, typer.Option(help="recipe to start from: paper")] = None,
    recipe: Annotated[str, typer.Option(help="recipe fields as a JSON object")] = "{}",
    parent: Annotated[Path | None, typer.Option(help="adapter file to go on from")] = None,
    rival: Annotated[Path | None, typer.Option(help="adapter file, in use now, to be set against the new one")] = None,
    test: Annotated[bool, typer.Option("--test", help="evaluate the kept adapter on the test split at the end")] = False,
    report: Annotated[Path | None, typer.Option(help="HTML report to write, and JSON beside it")] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="folder for TensorBoard's event files")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if there is one")] = None,
    seconds: Annotated[float | None, typer.Option(help="time for the steps; the run ends with the best that it has")] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="one JSON object a line instead of a progress bar")] = False,
) -> None:
    """Train a Cross-Modal Adapter; prints validation recall as it goes."""
    from training.source import Source

    if (dataset is None) == (data is None) or (data is not None and root is None):
        raise typer.BadParameter("give either --dataset FILE, or --data-set NAME with --root DIR")
    source = Source(dataset, data, root, variant, cache, allow_missing)
    json_lines = json_lines or not sys.stdout.isatty()
    show = JsonLines() if json_lines else Bar()
    try:
        with show:
            fields = {**({"preset": preset} if preset else {}), **_object(recipe)}
            how = (parent, device, show.report, test, report, tensorboard, rival, seconds)
            done = run(source, out, backbone, pretrained, fields, *how)
    except Exception as error:
        code = _code(error)
        detail = " ".join(str(error).split()) or type(error).__name__
        if code == "internal":
            traceback.print_exc()
        if json_lines:
            print_json({"event": "error", "code": code, "detail": detail})
        else:
            errors.print(f"error: {detail}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    if json_lines:
        print_json({"event": "done", **done})
    else:
        for line in evidence(done, done["queries"]):
            Console().print(line, markup=False, soft_wrap=True)
        tested = f", test R@1 {done['test']}" if done["test"] is not None else ""
        recall = f"R@1 {done['before']} → {done['after']} ({done['queries']} held-out queries)"
        Console().print(f"{recall}{tested}; {done['digest'][:12]} in {out}", markup=False)


def run(
    source: Source,
    out: Path,
    backbone_name: str,
    pretrained: str | None,
    recipe_fields: dict[str, Any],
    parent: Path | None,
    device: str | None,
    report: Any,
    test: bool = False,
    html: Path | None = None,
    tensorboard: Path | None = None,
    rival_file: Path | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Trains and publishes into `out`; returns `{digest, before, after, queries, test, seconds}` (R@1, text to video, in per
    cent, of so many held-out queries), and what of `timed_out`, `not_enough_evidence`, `cross_validation` there is.
    """
    import torch

    import adapters_store
    from backbone import load_backbone
    from training.ranks import Ranks
    from training.recipe import Recipe
    from training.trainer import EVIDENCE, Rival, train

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
    start = before.tensors if before is not None and before.shape == shape else None
    with _alone(out, ranks.first) as scratch, _stop_signals() as stop, _logged(report, tensorboard, ranks.first) as tell:
        if ranks.first:
            loaded = source.load(corpus, scratch, backbone.image_size, tell)
        ranks.wait()
        if not ranks.first:
            loaded = source.load(corpus, scratch, backbone.image_size, tell, decode=False)
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
    from training.dataset import InvalidDataset
    from training.evaluation import evaluate

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
    import hashlib

    import adapters_store
    from adapters_store import durable
    from training.checkpoint import write_tensors

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
        packed, recipe=recipe.to_json(), data=data, metrics=metrics, parent=facts["parent"], created_at=created_at
    )
    adapters_store.write(out, packed, manifest)
    return manifest.digest


def _write_report(html: Path, backbone: Backbone, dataset: Dataset, recipe: Recipe, trained: Trained, digest: str) -> None:
    from training.evaluation import evaluate
    from training.report import write_json, write_report

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
    from adapters_store import durable

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
def _logged(report: Any, folder: Path | None, first: bool) -> Iterator[Any]:
    """`report`, on the first rank alone, and the same numbers for TensorBoard where a folder is given."""
    if not first:
        yield lambda event: None
        return
    if folder is None:
        yield report
        return
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(folder)) as writer:

        def tell(event: dict[str, Any]) -> None:
            report(event)
            if event["event"] == "step":
                writer.add_scalar("loss", event["loss"], event["step"])
                writer.add_scalar("learning rate", event["lr"], event["step"])
            if event["event"] == "validation":
                for direction in ("text_to_video", "video_to_text"):
                    for metric in ("R@1", "R@5", "R@10", "MdR", "MnR"):
                        writer.add_scalar(f"{direction}/{metric}", event[direction][metric], event["step"])

        yield tell


def _object(text: str) -> dict[str, Any]:
    from training.recipe import InvalidRecipe

    try:
        fields = json.loads(text)
    except ValueError as error:
        raise InvalidRecipe(f"--recipe is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRecipe("--recipe must be a JSON object")
    return fields


def _code(error: Exception) -> str:
    from adapters_store import AdapterMismatch, InvalidAdapter
    from backbone import BackboneNotFound, UnsupportedBackbone
    from indexer.frames import DamagedFrames
    from training.dataset import InvalidDataset
    from training.published import InvalidCorpus
    from training.recipe import InvalidRecipe
    from training.trainer import Stopped, TimedOut, TrainingDiverged

    codes: dict[type[Exception], str] = {
        InvalidRecipe: "invalid_recipe",
        InvalidDataset: "invalid_dataset",
        InvalidCorpus: "invalid_dataset",
        DamagedFrames: "damaged_frames",
        TrainingDiverged: "training_diverged",
        Stopped: "stopped",
        TimedOut: "training_timeout",
        InUse: "in_use",
        AdapterMismatch: "adapter_mismatch",
        InvalidAdapter: "invalid_adapter",
        BackboneNotFound: "backbone_not_found",
        UnsupportedBackbone: "unsupported_backbone",
        MemoryError: "out_of_memory",
        OSError: "io_error",
    }
    return next((code for kind, code in codes.items() if isinstance(error, kind)), "internal")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()
