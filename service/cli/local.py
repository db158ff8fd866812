"""The commands that need no running service: the same functions over the same records, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import adapters_store
from adapters_store import durable
from indexer.decode import Decoder
from service.adapters import adapter_rows, train
from service.adapters.adapter_rows import AdapterVersion
from service.adapters.evaluate import evaluate
from service.adapters.publish import publish
from service.cli import files
from service.cli.parts import Parts
from service.errors import PolyclipError
from service.jobs import task_rows
from service.jobs.queue import sign_of_life
from service.jobs.task_rows import Task
from service.search.query import Found, Searcher
from service.settings import Settings
from service.storage import collection_rows, generation_rows, tenant_rows
from service.storage.blobs import adapter_key
from service.storage.collection_rows import Collection
from service.storage.rows import NotFound
from service.storage.storage import Storage
from service.storage.tables import now
from service.storage.tenant_rows import Tenant
from training.progress import Tell
from training.source import Source


class NoDataFolder(PolyclipError):
    """A command that only works on what is there was given a folder in which nothing is."""

    code, hint = "no_data_folder", "mend --data, or make one with `polyclip index` or `polyclip serve`"


@contextmanager
def opened(settings: Settings, decoder: Decoder = "pyav", new: bool = False) -> Iterator[Parts]:
    """The parts over a data folder, which is made only for a command that says `new`. Raises NoDataFolder."""
    if not (new or settings.has_data):
        raise NoDataFolder(f"there is no data folder at {settings.data}: `polyclip index` or `polyclip serve` makes one")
    with closing(Parts.over(settings, decoder)) as parts:
        yield parts


def search_collection(settings: Settings, tenant_name: str, collection: str, text: str, limit: int) -> Found:
    with opened(settings) as parts:
        with parts.storage.database.read() as connection:
            tenant = tenant_rows.tenant_named(connection, tenant_name)
        with closing(Searcher(parts.storage, parts.encoder)) as searcher:
            return searcher.search(tenant.id, collection, text, wanted=limit)


def train_collection(
    settings: Settings,
    tenant_name: str,
    collection_name: str,
    recipe: dict[str, Any],
    activate: str,
    console: Console | None,
) -> dict[str, Any]:
    """`train.train_adapter` in this process; the record of its task is kept like any other."""
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with (
        opened(settings) as parts,
        Progress(*columns, console=console, disable=console is None) as progress,
        ExitStack() as stack,
    ):
        tenant, collection = existing(parts.storage, tenant_name, collection_name)
        with parts.storage.database.write() as connection:
            train.check_captions(connection, tenant.id, collection.id)
            request = {"recipe": recipe, "activate": activate, "offline": True}
            task = task_rows.add_task(connection, tenant.id, collection.id, "train_adapter", request)
            task_rows.start_task(connection, tenant.id, task.id)
            durable.lock(stack.enter_context(sign_of_life(settings, task.id).open("w")), 0)
        bar = progress.add_task("", total=1.0)
        try:
            result = train.train_adapter(
                parts.storage,
                parts.encoder,
                parts.decoders,
                set(),
                tenant.id,
                task,
                lambda now: progress.update(bar, completed=now.share, description=now.stage),
            )
        except BaseException as error:
            _end(parts.storage, task, "failed", error={"code": getattr(error, "code", "interrupted"), "detail": str(error)})
            train.discard(parts.storage, task)
            raise
        _end(parts.storage, task, "succeeded", result=result)
        return result


def _end(storage: Storage, task: Task, status: str, **values: Any) -> None:
    with storage.database.write() as connection:
        task_rows.end_task(connection, task.tenant_id, task.id, status, **values)
    sign_of_life(storage.settings, task.id).unlink(missing_ok=True)


def evaluate_collection(
    settings: Settings, tenant_name: str, collection_name: str, split: str, report: Path | None
) -> dict[str, dict[str, Any]]:
    """Metrics of the collection's own captions by what encodes them; `report`: an HTML file, and JSON beside it."""
    with opened(settings) as parts:
        tenant, collection = existing(parts.storage, tenant_name, collection_name)
        with parts.storage.database.read() as connection:
            active = generation_rows.generation(connection, tenant.id, collection.active_generation_id)
        system = f"adapter {active.digest[:12]}" if active.digest else "frozen backbone"
        assessed = evaluate(parts.storage, parts.encoder, tenant.id, collection.name, split)
        if report is not None:
            from training.report import write_json, write_report

            name = parts.encoder.of(active.backbone).backbone.name
            facts = {"backbone": name, "collection": f"{tenant.name}/{collection.name}", "split": split}
            told: dict[str, Any] = {"title": "Evaluation", "facts": facts, "results": {system: assessed.found}}
            write_report(report, pairs=assessed.pairs, thumbnails=assessed.thumbnail, **told)
            write_json(report.with_suffix(".json"), **told)
    return {system: assessed.found.to_json(intervals=True)}


def evaluate_data_set(
    source: Source,
    split: str,
    backbone: str,
    pretrained: str | None,
    adapter: Path | None,
    query_bank: bool,
    report: Path | None,
    console: Console | None,
) -> dict[str, dict[str, Any]]:
    """`training.assess.assess`, with a progress bar while videos are decoded."""
    import torch

    from training.assess import assess

    columns = (TextColumn("decoding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    drawn = console is not None and console.is_terminal
    with Progress(*columns, console=console, disable=not drawn, transient=True) as progress:
        bar = progress.add_task("", total=None)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tell: Tell = lambda now: progress.update(bar, completed=now.done, total=now.total)  # noqa: E731
        return assess(source, split, backbone, pretrained, adapter, device, query_bank, report, tell)


def adapter_versions(
    settings: Settings, tenant_name: str, collection_name: str, manifests: bool = False
) -> list[dict[str, Any]]:
    with opened(settings) as parts:
        tenant, collection = existing(parts.storage, tenant_name, collection_name)
        with parts.storage.database.read() as connection:
            versions: list[AdapterVersion] = []
            after: str | None = None
            while page := adapter_rows.list_adapters(connection, tenant.id, collection.id, 50, after):
                versions += page.rows
                if (after := page.after) is None:
                    break
            active = generation_rows.generation(connection, tenant.id, collection.active_generation_id).adapter_id
    return [
        {
            "id": v.id,
            "version": v.version,
            "digest": v.digest,
            "active": v.id == active,
            "scope": v.manifest["scope"],
            "parameters": v.manifest["parameters"],
            "metrics": {side: v.manifest["metrics"][side] for side in ("before", "after") if side in v.manifest["metrics"]},
            "created_at": v.created_at,
            **({"manifest": dict(v.manifest)} if manifests else {}),
        }
        for v in versions
    ]


def export_adapter(
    settings: Settings,
    tenant_name: str,
    collection_name: str,
    adapter_id: str,
    to: Path,
    official: bool = False,
    dtype: str | None = None,
    without_vocabulary: bool = False,
) -> int:
    """Writes an adapter's file, or with `official` the checkpoint that the paper's code loads; returns the bytes written."""
    with opened(settings) as parts, files.written(to) as write:
        tenant, collection = existing(parts.storage, tenant_name, collection_name)
        with parts.storage.database.read() as connection:
            version = adapter_rows.adapter(connection, tenant.id, collection.id, adapter_id)
        data = parts.storage.blobs.get(adapter_key(collection.id, version.digest))
        return write(files.to_checkpoint(data, to, dtype, without_vocabulary) if official else data)


def import_adapter(
    settings: Settings, tenant_name: str, collection_name: str, file: Path, official: bool = False
) -> AdapterVersion:
    """Publishes an adapter file, or with `official` a checkpoint of the paper's code, as the collection's next version."""
    recipe = {"imported": file.name, **({"layout": "official"} if official else {})}
    with opened(settings) as parts:
        tenant, collection = existing(parts.storage, tenant_name, collection_name)
        with parts.storage.database.read() as connection:
            made_for = generation_rows.active_of(connection, tenant.id, collection.id).backbone
        data = files.from_checkpoint(file, lambda: parts.encoder.of(made_for).backbone) if official else file.read_bytes()
        manifest = adapters_store.describe(data, created_at=now(), recipe=recipe)
        return publish(parts.storage, parts.encoder, tenant.id, collection.id, data, manifest)


def existing(storage: Storage, tenant_name: str, collection_name: str) -> tuple[Tenant, Collection]:
    with storage.database.read() as connection:
        tenant = tenant_rows.tenant_named(connection, tenant_name)
        return tenant, collection_rows.collection_named(connection, tenant.id, collection_name)


def made_tenant(storage: Storage, name: str) -> Tenant:
    """The tenant, made where it is missing."""
    with storage.database.write() as connection:
        try:
            return tenant_rows.tenant_named(connection, name)
        except NotFound:
            return tenant_rows.create_tenant(connection, name, {})
