"""The command line. Heavy imports wait until a command needs them, so that `--help` is quick."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from service.cli import archives, mcp
from service.cli.access import keys, tenants
from service.cli.adapters import adapters
from service.cli.options import AsJson, Backbone, CollectionName, Data, Pretrained, TenantName, err, out, settings_from

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
app.add_typer(adapters, name="adapters")
app.add_typer(tenants, name="tenants")
app.add_typer(keys, name="keys")
app.command()(archives.export)
app.command("import")(archives.import_)
app.command()(archives.fsck)
app.command("mcp")(mcp.serve)


def main() -> None:
    """Entry point: what a user can mend is one line on standard error and exit code 1; usage errors are 2."""
    from service import errors, logs

    logs.configure(logging.WARNING)
    os.umask(0o077)  # what a data folder holds is its owner's alone
    try:
        app()
    except Exception as error:
        line = errors.line(error)
        if line is None:
            raise
        line = line.encode(errors="backslashreplace").decode()  # it may quote a file name whose bytes are not UTF-8
        err.print(f"error: {line}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)


@app.command()
def serve(
    data: Data = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to listen on; 0: any free one")] = 8000,
    backbone: Backbone = None,
    pretrained: Pretrained = None,
    no_worker: Annotated[bool, typer.Option("--no-worker", help="do not start the embedded worker")] = False,
) -> None:
    """Run the API, the web page and, unless told otherwise, one supervised worker."""
    from service.cli.serve import serve as run

    run(settings_from(data, backbone=backbone, pretrained=pretrained), host, port, worker=not no_worker)


@app.command()
def worker(
    data: Data = None,
    queues: Annotated[str, typer.Option(help="which queues to take jobs from")] = "index,reembed,train",
) -> None:
    """Run a worker alone."""
    from service.cli.worker import run
    from service.jobs.queue import GROUPS
    from service.jobs.supervisor import without_root_key

    if (variables := without_root_key(os.environ)) != dict(os.environ):  # gone only from what a new program is given
        os.execve(sys.executable, [sys.executable, "-m", "service.cli", *sys.argv[1:]], variables)
    wanted = [queue.strip() for queue in queues.split(",")]
    if unknown := [queue for queue in wanted if queue not in GROUPS]:
        raise typer.BadParameter(f"unknown queue {unknown[0]!r}: take from {', '.join(GROUPS)}")
    run(settings_from(data), wanted)


@app.command()
def index(
    paths: Annotated[list[Path], typer.Argument(help="video files, or folders of them")],
    collection: CollectionName,
    captions: Annotated[Path | None, typer.Option(help='JSONL: {"file": …, "captions": […]} a line')] = None,
    tenant: TenantName = "default",
    data: Data = None,
    backbone: Backbone = None,
    pretrained: Pretrained = None,
    as_json: AsJson = False,
) -> None:
    """Index videos without a running service: the same code, the same records. May be run again."""
    from service.cli.index import index_files

    settings = settings_from(data, backbone=backbone, pretrained=pretrained)
    report = index_files(settings, tenant, collection, paths, captions, console=None if as_json else err)
    if as_json:
        out.print_json(data=report)
    else:
        for failure in report["failed"]:
            err.print(f"failed: {failure['file']}: {failure['error']['detail']}", style="yellow", markup=False, soft_wrap=True)
        there = f"{report['duplicates']} there already ({report['updated']} with new captions)"
        line = f"{report['ready']} ready, {there}, {len(report['failed'])} failed"
        out.print(f"{collection}: {line}, {report['seconds']:.1f} s", markup=False)
    if report["failed"]:
        raise typer.Exit(1)


@app.command()
def search(
    text: str,
    collection: CollectionName,
    tenant: TenantName = "default",
    limit: Annotated[int, typer.Option(min=1, max=50, help="number of hits")] = 10,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Search a collection without a running service."""
    from service.cli.local import search_collection

    found = search_collection(settings_from(data), tenant, collection, text, limit)
    hits = found.hits[:limit]
    if as_json:
        rows = [
            {"rank": i, "score": h.score, "video_id": h.video.id, "start": h.start, "end": h.end, "filename": h.video.filename}
            for i, h in enumerate(hits, start=1)
        ]
        out.print_json(data={"data": rows, "truncated": found.truncated})
        return
    if found.truncated:
        err.print("note: the text is too long for the backbone; its end was cut off", style="yellow")
    table = Table("rank", "score", "file", "from", "to", Column("video", no_wrap=True, overflow="fold"))
    for i, hit in enumerate(hits, start=1):
        table.add_row(str(i), f"{hit.score:.4f}", hit.video.filename, f"{hit.start:.1f}", f"{hit.end:.1f}", hit.video.id)
    out.print(table)


@app.command()
def train(
    collection: CollectionName,
    tenant: TenantName = "default",
    recipe: Annotated[str, typer.Option(help="recipe fields as a JSON object")] = "{}",
    scope: Annotated[str | None, typer.Option(help="both, text or vision")] = None,
    activate: Annotated[str, typer.Option(help="if_better, always or never")] = "if_better",
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Train an adapter for a collection, without a running service, and activate it if it is better."""
    from service.cli.local import train_collection
    from training.display import evidence

    if activate not in ("if_better", "always", "never"):
        raise typer.BadParameter("--activate is if_better, always or never")
    try:
        fields = json.loads(recipe)
    except ValueError:
        raise typer.BadParameter("--recipe must be a JSON object") from None
    if not isinstance(fields, dict):
        raise typer.BadParameter("--recipe must be a JSON object")
    if scope is not None:
        fields["scope"] = scope
    result = train_collection(settings_from(data), tenant, collection, fields, activate, None if as_json else err)
    if as_json:
        out.print_json(data=result)
        return
    before, after = (result["metrics"][side]["text_to_video"] for side in ("before", "after"))
    table = Table(f"validation, {after['queries']} queries", "R@1", "R@5", "R@10", "MdR")
    for name, recall in (("frozen backbone", before), (f"adapter {result['digest'][:12]}", after)):
        table.add_row(name, *(f"{recall[key]:g}" for key in ("R@1", "R@5", "R@10", "MdR")))
    out.print(table)
    for line in evidence(result, after["queries"]):
        out.print(line, markup=False, soft_wrap=True)
    out.print(f"{'activated' if result['activated'] else 'not activated'}: {result['reason']}", markup=False)


@app.command()
def evaluate(
    collection: Annotated[str | None, typer.Option(help="a collection's own captions, as its searches stand now")] = None,
    tenant: TenantName = "default",
    data_set: Annotated[str | None, typer.Option("--data-set", help="or a data set: msrvtt, msvd, …, jsonl")] = None,
    root: Annotated[Path | None, typer.Option(help="folder (jsonl: file) of that data set; docs/datasets.md")] = None,
    variant: Annotated[str | None, typer.Option(help="of the data set, such as 7k of msrvtt")] = None,
    cache: Annotated[Path | None, typer.Option(help="folder of its decoded frames")] = None,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="go on without missing or broken videos")] = False,
    split: Annotated[str, typer.Option(help="validation or all; of a data set: train, validation or test")] = "validation",
    adapter: Annotated[Path | None, typer.Option(help="of a data set: an adapter file to set against the frozen one")] = None,
    query_bank: Annotated[bool, typer.Option("--query-bank", help="of a data set: QB-Norm too, reported apart")] = False,
    report: Annotated[Path | None, typer.Option(help="HTML report to write, and JSON beside it")] = None,
    data: Data = None,
    backbone: Backbone = None,
    pretrained: Pretrained = None,
    as_json: AsJson = False,
) -> None:
    """Recall at 1, 5 and 10, median and mean rank, both ways, with 95 % intervals."""
    from service.cli import local

    if (collection is None) == (data_set is None):
        raise typer.BadParameter("give either --collection NAME, or --data-set NAME with --root DIR")
    known = ("validation", "all") if collection is not None else ("train", "validation", "test")
    if split not in known:
        raise typer.BadParameter(f"--split is one of {', '.join(known)}")
    if collection is not None:
        results = local.evaluate_collection(settings_from(data), tenant, collection, split, report)
    else:
        if root is None:
            raise typer.BadParameter("--data-set needs --root")
        from training.source import Source

        source = Source(None, data_set, root, variant, cache, allow_missing)
        console = None if as_json else err
        results = local.evaluate_data_set(
            source, split, backbone or "builtin", pretrained, adapter, query_bank, report, console
        )
    if as_json:
        out.print_json(data=results)
        return
    for name, found in results.items():
        table = Table("", "R@1 [95 %]", "R@5", "R@10", "MdR", "MnR", title=name)
        for direction in ("text_to_video", "video_to_text"):
            values, (low, high) = found[direction], found[direction]["intervals"]["R@1"]
            others = [f"{values[k]:g}" for k in ("R@5", "R@10", "MdR", "MnR")]
            table.add_row(direction.replace("_", " "), f"{values['R@1']:g} [{low:.1f}, {high:.1f}]", *others)
        table.caption = f"{found['text_to_video']['queries']} captions, {found['text_to_video']['gallery']} videos"
        out.print(table)


@app.command()
def demo(
    data: Annotated[Path, typer.Option(help="data folder of the demo")] = Path("polyclip-demo"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to listen on; 0: any free one")] = 8000,
    check: Annotated[bool, typer.Option("--check", help="check the whole way through HTTP, then end")] = False,
) -> None:
    """Make the demo world, index it, train an adapter, and serve it all with a web page."""
    from demo.run import run

    raise typer.Exit(run(data, port, check))


@app.command()
def encode(
    to: Annotated[Path, typer.Option("--out", help="where to write the vectors, .npy float32")],
    backbone: Annotated[str, typer.Option(help="builtin, or an open_clip model")] = "builtin",
    pretrained: Pretrained = None,
    adapter: Annotated[Path | None, typer.Option(help="an adapter file, safetensors")] = None,
    text: Annotated[list[str] | None, typer.Option(help="a text; may be given several times")] = None,
    frames: Annotated[Path | None, typer.Option(help=".npy (N, 3, H, W) float32, already normalised, or uint8")] = None,
) -> None:
    """Raw vectors of texts or frames, unnormalised."""
    from service.cli.files import encode as run

    if (text is None) == (frames is None):
        raise typer.BadParameter("give either --text or --frames")
    shape, cut = run(backbone, pretrained, adapter, text, frames, to)
    for position in cut:
        err.print(f"note: text {position + 1} is too long for the backbone; its end was cut off", style="yellow")
    out.print(f"{to}: {shape[0]} vectors of {shape[1]}", markup=False, soft_wrap=True)


@app.command()
def settings(as_json: AsJson = False) -> None:
    """Every setting: its environment variable, its value now, what it is for."""
    from service.settings import Settings

    now = Settings()
    rows = [
        (f"POLYCLIP_{name.upper()}", _masked(name, getattr(now, name)), field.description or "")
        for name, field in Settings.model_fields.items()
    ]
    if as_json:
        out.print_json(data={name: value for name, value, _ in rows})
        return
    table = Table("variable", "value", "what it is for")
    for row in rows:
        table.add_row(*row)
    out.print(table)


@app.command()
def formats() -> None:
    """The containers that are read, as the table of docs/formats.md."""
    from indexer.formats import as_markdown

    out.print(as_markdown(), markup=False, highlight=False, soft_wrap=True)


@app.command()
def backbones(as_json: AsJson = False) -> None:
    """The backbones that are worth a choice: size, cost, licence, and what is published of how well they find."""
    from backbone.catalogue import choices

    found = choices()
    if as_json:
        out.print_json(data=[choice.to_json() for choice in found])
        return
    names = ("M", "pixels", "words", "frame", "text", "MSR-VTT", "COCO")
    right = [Column(name, justify="right", no_wrap=True) for name in names]
    left = [Column(name, no_wrap=True) for name in ("--backbone, --pretrained", "licence")]
    table = Table(left[0], *right, left[1], box=None, padding=(0, 1, 0, 0))  # as wide as an ordinary terminal
    for one in found:
        scores = [max((told.get(name, 0.0) for told in one.zero_shot.values()), default=0.0) for name in ("msrvtt", "coco")]
        costs = (f"{one.parameters / 1e6:.0f}", f"{one.image_size}", f"{one.context_length}", f"{one.frame:g}", f"{one.text:g}")
        table.add_row(one.name, *costs, *(f"{score:.1f}" if score else "–" for score in scores), one.licence)
        for tag in one.tags:
            table.add_row(f"  {tag}")
    out.print(table)
    out.print(
        "M: million values. frame, text: cost, ViT-B-32's being 1. MSR-VTT, COCO: published R@1 from text without training,"
        " of the best tag;"
        " --json has each with its source. Any other open_clip model with towers of these kinds runs too. `builtin` only"
        " knows the demo's world.",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )


@app.command()
def doctor(data: Data = None, backbone: Backbone = None, pretrained: Pretrained = None, as_json: AsJson = False) -> None:
    """Check what is installed and reachable, and say how to mend what is not."""
    from service.cli.doctor import examine

    findings = examine(settings_from(data, backbone=backbone, pretrained=pretrained))
    if as_json:
        out.print_json(data=[{"what": f.what, "ok": f.ok, "detail": f.detail} for f in findings])
    else:
        for finding in findings:
            out.print("[green]ok  [/]" if finding.ok else "[red]BAD [/]", f"{finding.what}: {finding.detail}", markup=True)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def _masked(name: str, value: Any) -> str:
    if value is None:
        return ""
    return "(set)" if name == "root_key" else str(value)
