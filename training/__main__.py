"""`python -m training`: trains an adapter from captioned videos whose frames are cached, and writes it to a folder.

The service runs this as a child process for each adapter; `--json` makes it print one JSON object a line on standard
output, the last of them `{"event": "done", …}` or `{"event": "error", …}`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

app = typer.Typer(add_completion=False, rich_markup_mode=None)
errors = Console(stderr=True, highlight=False)


@app.command()
def main(
    dataset: Annotated[Path, typer.Option(help="JSONL: {video, frames, captions: [{text, start?, end?}]} a line")],
    out: Annotated[Path, typer.Option(help="folder for adapter.safetensors and manifest.json")],
    backbone: Annotated[str, typer.Option(help="builtin, or an open_clip architecture")] = "builtin",
    pretrained: Annotated[str | None, typer.Option(help="tag, file or 'random'")] = None,
    recipe: Annotated[str, typer.Option(help="recipe fields as a JSON object")] = "{}",
    parent: Annotated[Path | None, typer.Option(help="adapter file to go on from")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if there is one")] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="one JSON object a line instead of a progress bar")] = False,
) -> None:
    """Train a Cross-Modal Adapter; prints validation recall as it goes."""
    show = _JsonLines() if json_lines else _Bar()
    try:
        with show:
            done = run(dataset, out, backbone, pretrained, json.loads(recipe), parent, device, show.report)
    except Exception as error:
        code = _code(error)
        if json_lines:
            _print_json({"event": "error", "code": code, "detail": str(error)})
        else:
            errors.print(f"error: {error}", style="red")
        if code == "internal":
            errors.print_exception()
        raise typer.Exit(1) from None
    if json_lines:
        _print_json({"event": "done", **done})
    else:
        Console().print(f"R@1 {done['before']} → {done['after']}, adapter {done['digest'][:12]} in {out}")


def run(
    dataset: Path,
    out: Path,
    backbone_name: str,
    pretrained: str | None,
    recipe_fields: dict[str, Any],
    parent: Path | None,
    device: str | None,
    report: Any,
) -> dict[str, Any]:
    """Trains and publishes into `out`; returns `{digest, before, after, seconds}` (R@1, text to video, in per cent)."""
    import torch

    import adapters_store
    from backbone import load_backbone
    from training.dataset import load_dataset
    from training.recipe import Recipe
    from training.trainer import train

    started = time.monotonic()
    recipe = Recipe.of(recipe_fields)
    backbone = load_backbone(backbone_name, pretrained, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    start = None
    if parent is not None:
        before = adapters_store.unpack(parent.read_bytes())
        before.adapter(backbone.fingerprint)
        if before.shape == recipe.shape(backbone.dims):
            start = before.tensors
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".pixels-") as scratch:
        trained = train(backbone, load_dataset(dataset, Path(scratch), backbone.image_size), recipe, report, start)
    data = adapters_store.pack(trained.shape, backbone.fingerprint, trained.tensors)
    metrics = dict(trained.metrics)
    manifest = adapters_store.describe(
        data,
        recipe=recipe.to_json(),
        data=metrics.pop("data"),
        metrics=metrics,
        parent=before.digest if parent is not None else None,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    adapters_store.write(out, data, manifest)
    return {
        "digest": manifest.digest,
        "before": metrics["before"]["text_to_video"]["R@1"],
        "after": metrics["after"]["text_to_video"]["R@1"],
        "seconds": round(time.monotonic() - started, 1),
    }


def _code(error: Exception) -> str:
    from backbone import BackboneNotFound, UnsupportedBackbone
    from indexer.frames import DamagedFrames
    from training.dataset import InvalidDataset
    from training.recipe import InvalidRecipe
    from training.trainer import TrainingDiverged

    codes: dict[type[Exception], str] = {
        InvalidRecipe: "invalid_recipe",
        InvalidDataset: "invalid_dataset",
        DamagedFrames: "damaged_frames",
        TrainingDiverged: "training_diverged",
        BackboneNotFound: "backbone_not_found",
        UnsupportedBackbone: "unsupported_backbone",
        MemoryError: "out_of_memory",
        OSError: "io_error",
    }
    return next((code for kind, code in codes.items() if isinstance(error, kind)), "internal")


def _print_json(event: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


class _JsonLines:
    """Every validation, and at most four steps a second. Ends the process when its parent has died."""

    def __init__(self) -> None:
        self._last = 0.0
        self._parent = os.getppid()

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def report(self, event: dict[str, Any]) -> None:
        if os.getppid() != self._parent:
            raise SystemExit(1)
        now = time.monotonic()
        if event["event"] != "step" or now - self._last > 0.25 or event["step"] == event["steps"]:
            self._last = now
            _print_json(event)


class _Bar:
    def __init__(self) -> None:
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        self._progress = Progress(*columns, TimeRemainingColumn(), console=errors)
        self._task = self._progress.add_task("training", total=None, note="")
        self._note = ""

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def report(self, event: dict[str, Any]) -> None:
        if event["event"] == "validation":
            recall = event["text_to_video"]
            self._note = f"R@1 {recall['R@1']}"
            self._progress.console.print(f"step {event['step']}: R@1 {recall['R@1']}, R@5 {recall['R@5']}")
        loss = f"loss {event['loss']:.3f} · " if event["event"] == "step" else ""
        self._progress.update(self._task, completed=event["step"], total=event["steps"], note=loss + self._note)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()
