"""`polyclip index`: files and folders of the operator's, with their captions, into a collection."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path, PurePosixPath
from tempfile import NamedTemporaryFile
from typing import Any
from unicodedata import normalize

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from indexer.formats import VIDEO_SUFFIXES
from indexer.sandbox import Check
from service.adapters.encoder import Encoder
from service.cli.local import made_tenant, opened
from service.errors import PolyclipError
from service.settings import Settings
from service.storage import collection_rows
from service.storage.collection_rows import Collection
from service.storage.rows import NotFound, parse_json
from service.storage.storage import Storage
from service.storage.tenant_rows import Tenant
from service.videos import index, video_rows
from service.videos.accept import InvalidUpload, accept, label, parse_captions
from service.videos.captions import MAX_CAPTIONS
from service.videos.video_rows import Caption, Video


class InvalidCaptions(PolyclipError):
    """The captions file has a line that is not what it should be."""

    code, hint = "invalid_captions", "mend the line of the captions file"


class _Stopped(Exception):
    """Indexing is to end."""


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

        def check(_: object = None) -> None:
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


def _videos_under(path: Path) -> list[Path]:
    """A file as it is; of a folder, every file below it whose name ends like a video's."""
    if not path.exists():
        raise FileNotFoundError(2, "there is no such file or folder", str(path))
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(2, "neither a file nor a folder", str(path))
    return sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in VIDEO_SUFFIXES)


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
    """The record of a file, whether it is new or was left half-way, and whether a video that was there has got new captions."""
    digest = hashlib.sha256()
    for piece in _pieces(file, check):
        digest.update(piece)
    told = (_label(file), digest.hexdigest(), file.stat().st_size, lambda: _copied(storage, file, check))
    try:
        answer, _ = accept(storage, tenant, collection, *told, captions)
    except InvalidUpload as error:
        raise InvalidCaptions(f"{_readable(file)}: {error}") from error
    with storage.database.read() as connection:
        video = video_rows.video(connection, tenant.id, answer["video_id"])
    fresh = answer["duplicate_of"] is None or answer["status"] in video_rows.IN_PROGRESS
    return video, fresh, bool(answer["updated"])


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
