"""Collections that move, and the check of a data folder, without a running service."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from service.adapters.encoder import Encoder
from service.cli import files
from service.cli.local import existing, made_tenant, opened
from service.settings import Settings
from service.storage.storage import Storage
from service.upkeep import export_collection as exports
from service.upkeep import import_collection as imports
from service.upkeep.fsck import Fsck
from service.upkeep.fsck_videos import Finding
from service.videos import index, video_rows
from service.videos.decoders import Decoders
from training import progress as work
from training.progress import Tell


def export_collection(
    settings: Settings,
    tenant_name: str,
    collection_name: str,
    to: Path,
    videos: bool,
    generations: bool,
    console: Console | None,
) -> dict[str, Any]:
    """Writes a collection's archive; tells what was left out."""
    with opened(settings) as parts, files.written(to) as write, _share_bar(console) as progress:
        tenant, _ = existing(parts.storage, tenant_name, collection_name)
        out = exports.Export(parts.storage, tenant.id, collection_name, videos, generations)
        size = write(out.chunks(progress))
    return {"bytes": size, "videos": out.written, "left_out": {why: ids for why, ids in out.left_out.items() if ids}}


def import_collection(
    settings: Settings, tenant_name: str, file: Path, name: str | None, re_embed: bool, console: Console | None
) -> dict[str, Any]:
    """An archive as a new collection, its tenant made where it is missing; videos without vectors are indexed at once."""
    with opened(settings, new=True) as parts, _share_bar(console) as progress:
        tenant = made_tenant(parts.storage, tenant_name)
        done = imports.import_archive(
            parts.storage, parts.encoder, parts.decoders, tenant, file, name=name, re_embed=re_embed, progress=progress
        )
        failed = index_now(
            parts.storage, parts.encoder, parts.decoders, tenant.id, [video.id for video in done.queued], progress
        )
    return {**done.to_json(), "failed": failed}


def index_now(
    storage: Storage, encoder: Encoder, decoders: Decoders, tenant: str, videos: list[str], progress: Tell
) -> list[str]:
    """Indexes videos whose tasks are queued, in this process; returns those that failed."""
    with ThreadPoolExecutor(storage.settings.decoders + 2) as pool:
        running = [pool.submit(index.index_video, storage, encoder, decoders, tenant, video) for video in videos]
        for done, future in enumerate(as_completed(running), start=1):
            future.result()
            progress(work.Progress(f"{done} of {len(videos)} videos indexed", done, len(videos)))
    with storage.database.read() as connection:
        found = video_rows.videos_by_id(connection, tenant, videos)
    return [video.id for video in found.values() if video.status == "failed"]


def check(
    settings: Settings,
    tenant_name: str | None,
    collection_name: str | None,
    repair: bool,
    deep: bool,
    console: Console | None,
    show: Callable[[Finding], None],
) -> tuple[list[Finding], dict[str, int]]:
    """`fsck`, each finding shown as it comes; all of them, and how much was looked at."""
    quiet = Console(quiet=True)
    with opened(settings) as parts, (console or quiet).status("checking") as status:
        fsck = Fsck(parts.storage, parts.encoder, parts.decoders, deep, lambda note: status.update(f"checking {escape(note)}"))
        found = []
        for finding in fsck.run(tenant_name, collection_name, repair):
            show(finding)
            found.append(finding)
    return found, fsck.counts


@contextmanager
def _share_bar(console: Console | None) -> Iterator[Tell]:
    columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=console is None, transient=True) as drawn:
        bar = drawn.add_task("", total=1.0)
        yield lambda now: drawn.update(bar, completed=now.share, description=now.stage)
