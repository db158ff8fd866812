"""The commands that need no running service: the same functions over the same records, in this process."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path, PurePosixPath
from tempfile import NamedTemporaryFile
from typing import Any
from unicodedata import normalize

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sqlalchemy import Connection

import adapters_store
from adapters_store import durable
from indexer.decode import Decoder
from indexer.formats import VIDEO_SUFFIXES
from indexer.sandbox import Check
from service.adapters import adapter_rows, train
from service.adapters.adapter_rows import AdapterVersion
from service.adapters.encoder import Encoder
from service.cli import files
from service.cli.parts import Parts
from service.errors import PolyclipError
from service.http.uploads import InvalidUpload, label
from service.http.videos import parse_captions, renew
from service.jobs import task_rows
from service.jobs.queue import sign_of_life
from service.jobs.task_rows import Task
from service.search.query import Found, Searcher
from service.settings import Settings
from service.storage import collection_rows, generation_rows, tenant_rows
from service.storage.blobs import adapter_key, video_key
from service.storage.collection_rows import Collection
from service.storage.rows import NotFound, parse_json
from service.storage.storage import Storage
from service.storage.tables import new_id, now
from service.storage.tenant_rows import Tenant
from service.videos import index, video_rows
from service.videos.captions import MAX_CAPTIONS
from service.videos.video_rows import Caption, Video
from training.source import Source


class InvalidCaptions(PolyclipError):
    """The captions file has a line that is not what it should be."""

    code, hint = "invalid_captions", "mend the line of the captions file"


class NoDataFolder(PolyclipError):
    """A command that only works on what is there was given a folder in which nothing is."""

    code, hint = "no_data_folder", "mend --data, or make one with `polyclip index` or `polyclip serve`"


class _Stopped(Exception):
    """Indexing is to end."""


@contextmanager
def opened(settings: Settings, decoder: Decoder = "pyav", new: bool = False) -> Iterator[Parts]:
    """The parts over a data folder, which is made only for a command that says `new`. Raises NoDataFolder."""
    if not (new or settings.has_data):
        raise NoDataFolder(f"there is no data folder at {settings.data}: `polyclip index` or `polyclip serve` makes one")
    with closing(Parts.over(settings, decoder)) as parts:
        yield parts


def index_files(
    settings: Settings,
    tenant_name: str,
    collection_name: str,
    paths: list[Path],
    captions_file: Path | None,
    console: Console | None,
) -> dict[str, Any]:
    """Adds and indexes video files; tenant and collection are made where they are missing.

    A file whose bytes are in the collection already is passed over, so that the command goes on where it was stopped; captions
    that its video lacks are added. Raises InvalidCaptions.
    """
    started = time.monotonic()
    found = {path: _videos_under(path) for path in paths}
    files = [file for path in paths for file in found[path]]
    captions = _by_file(captions_file, read_captions(captions_file), found) if captions_file is not None else {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        opened(settings, settings.decoder, new=True) as parts,
        Progress(*columns, console=console, disable=console is None) as progress,
        ThreadPoolExecutor(settings.decoders + 2) as pool,
    ):
        caution = parts.encoder.choice.caution
        if caution is not None and console is not None:
            console.print(f"warning: {caution}", style="yellow", markup=False, soft_wrap=True)
        tenant, collection = _tenant_and_collection(parts.storage, parts.encoder, tenant_name, collection_name)
        bar = progress.add_task("indexing", total=len(files))
        duplicates, failed, ready, updated = 0, [], 0, 0
        stopping = threading.Event()

        def check(_: float | None = None) -> None:
            if stopping.is_set():
                raise _Stopped

        def work(file: Path) -> tuple[Video, bool, bool]:
            check()
            video, fresh, renewed = _add_file(parts.storage, tenant, collection, file, captions.get(file, []), check)
            if video.status in video_rows.IN_PROGRESS:
                index.index_video(parts.storage, parts.encoder, parts.decoders, tenant.id, video.id, check)
            with parts.storage.database.read() as connection:
                return video_rows.video(connection, tenant.id, video.id), fresh, renewed

        try:
            for future in as_completed(waiting := {pool.submit(work, file): file for file in files}):
                video, fresh, renewed = future.result()
                updated += renewed
                progress.advance(bar)
                if video.status == "failed":
                    failed.append({"file": _label(waiting[future]), "video_id": video.id, "error": dict(video.error or {})})
                elif fresh:
                    ready += 1
                else:
                    duplicates += 1
        except BaseException:  # Ctrl-C: what is under way ends at its next look, and the next run goes on with it
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    seconds = round(time.monotonic() - started, 2)
    counts = {"ready": ready, "duplicates": duplicates, "updated": updated}
    return {**counts, "failed": failed, "seconds": seconds, "warning": caution}


def read_captions(path: Path) -> dict[str, list[Caption]]:
    """Captions by file name or path: lines of `{"file" or "video": …, "captions": […] or "caption": …}`.

    Raises InvalidCaptions.
    """
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # nothing else ends a line of JSON: a caption may hold U+2028
    except UnicodeDecodeError as error:
        raise InvalidCaptions(f"{path}: not UTF-8 text (byte {error.start})") from error
    found: dict[str, list[Caption]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
            name = normalize("NFC", PurePosixPath(row.get("file") or row["video"]).as_posix())
            texts = row["captions"] if "captions" in row else [row[key] for key in sorted(row) if key.startswith("caption")]
            found.setdefault(name, []).extend(parse_captions(texts))
        except (ValueError, KeyError, TypeError, AttributeError, InvalidUpload) as error:
            raise InvalidCaptions(f"{path}, line {number}: needs a file and captions ({error})") from error
    return found


def _by_file(source: Path, captions: dict[str, list[Caption]], found: dict[Path, list[Path]]) -> dict[Path, list[Caption]]:
    """The captions of each of the files `found` below their folders: a file is named by its path there, with or without the
    folder's own name, by its whole path, or by its bare name where no other file has it. Raises InvalidCaptions.
    """
    paths: dict[str, set[Path]] = {}
    names: dict[str, set[Path]] = {}
    for top, below in found.items():
        for file in below:
            inner = file.relative_to(top) if file != top else Path(file.name)
            own = inner if file == top else Path(top.absolute().name, inner)
            for path in (inner, own, file, file.absolute()):
                paths.setdefault(_readable(path), set()).add(file)
            names.setdefault(_readable(Path(file.name)), set()).add(file)
    given: dict[Path, list[Caption]] = {}
    for name, texts in captions.items():
        meant = sorted(paths.get(name) or names.get(name) or ())
        if not meant:
            unknown = [each for each in captions if each not in paths and each not in names]
            raise InvalidCaptions(f"{source}: there is no video {name!r} (and {len(unknown) - 1} more)")
        if len({os.path.realpath(file) for file in meant}) > 1:
            first, second, *_ = map(_readable, meant)
            raise InvalidCaptions(f"{source}: {name!r} may be {first!r} or {second!r}: give its path")
        for file in meant:
            given.setdefault(file, []).extend(texts)
    for file, texts in given.items():
        if len(texts) > MAX_CAPTIONS:
            told = f"a video may have {MAX_CAPTIONS} captions, {_readable(file)!r} has {len(texts)}"
            raise InvalidCaptions(f"{source}: {told}")
    return given


def _readable(path: Path) -> str:
    """A path in NFC; bytes that are not UTF-8 are read as Latin-1."""
    data = os.fsencode(path.as_posix())
    try:
        return normalize("NFC", data.decode())
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _label(file: Path) -> str:
    return label(os.fsencode(file.name).decode("latin-1"))


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
    """`learning.train_adapter` in this process; the record of its task is kept like any other."""
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
                lambda share, note: progress.update(bar, completed=share, description=note),
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
            digest = generation_rows.generation(connection, tenant.id, collection.active_generation_id).digest
        system = f"adapter {digest[:12]}" if digest else "frozen backbone"
        assessed = train.evaluate(parts.storage, parts.encoder, tenant.id, collection.name, split)
        if report is not None:
            from training.report import write_json, write_report

            facts = {"backbone": parts.encoder.backbone.name, "collection": f"{tenant.name}/{collection.name}", "split": split}
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

        def tell(event: dict[str, Any]) -> None:
            progress.update(bar, completed=event["step"], total=event["steps"])

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
) -> int:
    """Writes an adapter's file, or with `official` the checkpoint that the paper's code loads; returns the bytes written."""
    with opened(settings) as parts, files.written(to) as write:
        tenant, collection = existing(parts.storage, tenant_name, collection_name)
        with parts.storage.database.read() as connection:
            version = adapter_rows.adapter(connection, tenant.id, collection.id, adapter_id)
        data = parts.storage.blobs.get(adapter_key(collection.id, version.digest))
        return write(files.to_checkpoint(data, to, dtype) if official else data)


def import_adapter(
    settings: Settings, tenant_name: str, collection_name: str, file: Path, official: bool = False
) -> AdapterVersion:
    """Publishes an adapter file, or with `official` a checkpoint of the paper's code, as the collection's next version."""
    recipe = {"imported": file.name, **({"layout": "official"} if official else {})}
    with opened(settings) as parts:
        tenant, collection = existing(parts.storage, tenant_name, collection_name)
        data = files.from_checkpoint(file, lambda: parts.encoder.backbone) if official else file.read_bytes()
        manifest = adapters_store.describe(data, created_at=now(), recipe=recipe)
        return train.publish(parts.storage, parts.encoder, tenant.id, collection.id, data, manifest)


def _videos_under(path: Path) -> list[Path]:
    """A file as it is; of a folder, every file below it whose name ends like a video's."""
    if not path.exists():
        raise FileNotFoundError(2, "there is no such file or folder", str(path))
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(2, "neither a file nor a folder", str(path))
    return sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in VIDEO_SUFFIXES)


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


def _tenant_and_collection(
    storage: Storage, encoder: Encoder, tenant_name: str, collection_name: str
) -> tuple[Tenant, Collection]:
    fingerprint = encoder.backbone.fingerprint
    tenant = made_tenant(storage, tenant_name)
    with storage.database.write() as connection:
        try:
            collection = collection_rows.collection_named(connection, tenant.id, collection_name)
        except NotFound:
            collection = collection_rows.create_collection(connection, tenant, collection_name, {}, fingerprint)
    return tenant, collection


def _add_file(
    storage: Storage, tenant: Tenant, collection: Collection, file: Path, captions: list[Caption], check: Check
) -> tuple[Video, bool, bool]:
    """The record of a file, whether it is new or was left half-way, and whether a video that was there has got new captions.

    Like an upload: file first, then row.
    """
    video_id = new_id("vid")
    digest = hashlib.sha256()
    for piece in _pieces(file, check):
        digest.update(piece)
    sha256 = digest.hexdigest()
    with storage.database.read() as connection:
        twin = video_rows.twin(connection, tenant.id, collection.id, sha256)
    if twin is not None:
        if not storage.blobs.exists(video_key(collection.id, twin.id)):
            index.restore_file(storage, twin, _copied(storage, file, check))
        if not captions:
            return twin, twin.status in video_rows.IN_PROGRESS, False
        with storage.database.write() as connection:
            return twin, twin.status in video_rows.IN_PROGRESS, _renewed(connection, twin, file, captions)
    storage.blobs.put_file(video_key(collection.id, video_id), _copied(storage, file, check))
    with storage.database.write() as connection:
        if (twin := video_rows.twin(connection, tenant.id, collection.id, sha256)) is None:
            size = file.stat().st_size
            tenant_rows.check_quota(connection, tenant, videos=1, bytes=size)
            video_rows.add_video(connection, tenant.id, collection.id, video_id, _label(file), sha256, size, {}, captions)
            return video_rows.video(connection, tenant.id, video_id), True, False
        renewed = _renewed(connection, twin, file, captions)
    storage.blobs.delete(video_key(collection.id, video_id))
    return twin, False, renewed


def _renewed(connection: Connection, twin: Video, file: Path, captions: list[Caption]) -> bool:
    try:
        return bool(renew(connection, twin, None, captions))
    except InvalidUpload as error:
        raise InvalidCaptions(f"{_readable(file)}: {error}") from error


def _copied(storage: Storage, file: Path, check: Check) -> Path:
    """The file once more, in the scratch folder."""
    with NamedTemporaryFile(dir=storage.settings.scratch, prefix="index-", delete=False) as copy:
        try:
            copy.writelines(_pieces(file, check))
        except BaseException:
            Path(copy.name).unlink()
            raise
    return Path(copy.name)


def _pieces(file: Path, check: Check) -> Iterator[bytes]:
    with file.open("rb") as source:
        while piece := source.read(1 << 20):
            check()
            yield piece
