"""A video from a URL: a task fetches it under the limits of an upload, and takes it in as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from tempfile import NamedTemporaryFile
from typing import Any
from urllib.parse import unquote

import httpx

from service.jobs import outward, task_rows
from service.jobs.run import Report
from service.jobs.task_rows import Task
from service.storage import collection_rows, idempotency, tenant_rows
from service.storage.rows import NotFound
from service.storage.storage import Storage
from service.storage.tenant_rows import Tenant
from service.videos.accept import accept, label
from service.videos.incoming import EmptyFile, Incoming, room
from service.videos.video_rows import Caption
from training.progress import Progress


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be fetched and taken in. `captions` as of `accept.parse_captions`."""

    url: str
    filename: str | None
    captions: list[Any]
    metadata: dict[str, Any] | None


def queue(
    storage: Storage,
    tenant: Tenant,
    name: str,
    wishes: Sequence[Wish],
    answer: Callable[[Sequence[Task]], dict[str, Any]],
    key: str | None,
    hashed: str,
) -> tuple[dict[str, Any], list[Task]]:
    """`answer` to the tasks of these wishes, all of them added in one transaction, and they; the caller enqueues them.

    `key`, `hashed`: as of `idempotency.once`. Raises NotFound for the collection, QuotaExceeded, KeyReused.
    """
    made: list[Task] = []

    def add() -> dict[str, Any]:
        collection = collection_rows.collection_named(connection, tenant.id, name)
        if collection_rows.lock_collection(connection, tenant.id, collection.id) is None:
            raise NotFound("collection", name)
        tenant_rows.check_quota(connection, tenant, videos=len(wishes))
        made.extend(task_rows.add_task(connection, tenant.id, collection.id, "fetch_video", asdict(wish)) for wish in wishes)
        return answer(made)

    with storage.database.write() as connection:
        return idempotency.once(connection, tenant.id, key, hashed, add), made


def fetch_video(storage: Storage, task: Task, report: Report, start: Callable[[Task], object]) -> dict[str, Any]:
    """Fetches a task's file and accepts it as an upload: the answer to that. `start` is told of the task that indexes it.

    Raises as `outward.get` and `accept` do, EmptyFile, FileTooLarge, UnsupportedMedia, QuotaExceeded.
    """
    wish, settings = task.request, storage.settings
    hashed = idempotency.request_hash("fetch", task.id)
    with storage.database.read() as connection:
        tenant = tenant_rows.tenant_of(connection, task.tenant_id)
        name = collection_rows.collection_name(connection, tenant.id, str(task.collection_id))
        collection = collection_rows.collection_named(connection, tenant.id, name)
        earlier: dict[str, Any] | None = idempotency.earlier_answer(connection, tenant.id, task.id, hashed)
    if earlier is not None:  # accepted by a start of this task that was broken off
        return earlier
    with NamedTemporaryFile(dir=settings.scratch, prefix="fetch-", delete=False) as handle:
        path = Path(handle.name)
    try:
        with room(settings, tenant) as limit:
            incoming = _fetched(wish["url"], path, limit, settings.fetch_seconds, settings.private_urls, report)
        filename = label(wish["filename"] or _named(wish["url"]))
        captions = [Caption(c) if isinstance(c, str) else Caption(c["text"], c["start"], c["end"]) for c in wish["captions"]]
        told = filename, incoming.sha256, incoming.size, lambda: path
        answer, index = accept(storage, tenant, collection, *told, captions, wish["metadata"], task.id, hashed)
    finally:
        path.unlink(missing_ok=True)
    if index is not None:
        start(index)
    return answer


def _fetched(url: str, path: Path, limit: int, seconds: float, private: bool, report: Report) -> Incoming:
    incoming = Incoming(path, limit)
    incoming.open()
    try:
        with outward.get(url, seconds, private) as response:
            told = httpx.Headers(response.headers).get("content-length", "")
            size = int(told) if told.isdecimal() and len(told) < 20 else 0
            incoming.expect(size)
            for chunk in response.iter_stream():
                incoming.take(chunk)
                report(Progress("fetching", incoming.size, size or limit).within(0, 0.9))
        incoming.finish()
    finally:
        with suppress(OSError):  # the disk may be full: what is buffered cannot be written
            incoming.close()
    if not incoming.size:
        raise EmptyFile("the URL gave an empty file")
    return incoming


def _named(url: str) -> str:
    """What a URL calls its file: the last part of the path."""
    return PurePosixPath(unquote(httpx.URL(url).path)).name
