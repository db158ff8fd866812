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
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from training.display import Bar, JsonLines, errors, evidence, print_json

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


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
            from training.run import run  # takes seconds

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
    from training.run import InUse
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
