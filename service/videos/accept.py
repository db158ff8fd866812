"""Taking a video in, over HTTP or from a file of the operator's: file first, then row and task in one transaction."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import Connection

from service.errors import PolyclipError
from service.jobs.task_rows import Task
from service.storage import collection_rows, idempotency, tenant_rows
from service.storage.blobs import video_key
from service.storage.collection_rows import Collection
from service.storage.rows import NotFound
from service.storage.storage import Storage
from service.storage.tables import new_id
from service.storage.tenant_rows import Tenant
from service.videos import index, video_rows
from service.videos.captions import MAX_CAPTIONS, CaptionIn
from service.videos.video_rows import Caption, Video

_captions = TypeAdapter(list[str | CaptionIn])


class InvalidUpload(PolyclipError, ValueError):
    """The body is not multipart/form-data with a part `file`, or another part is not what it should be."""

    code, status, hint = "invalid_upload", 422, "send multipart/form-data with a part `file`; `detail` names the part"


def accept(
    storage: Storage,
    tenant: Tenant,
    collection: Collection,
    filename: str,
    sha256: str,
    size: int,
    file: Callable[[], Path],
    captions: list[Caption],
    metadata: Mapping[str, Any] | None = None,
    key: str | None = None,
    hashed: str = "",
) -> tuple[dict[str, Any], Task | None]:
    """The answer to an upload, and the task that indexes the video; None for bytes that are in the collection already.

    Such bytes are not stored twice: captions that the earlier video lacks are added, `metadata`, unless None, replaces its own,
    and a file that it has lost is put back. `file` gives a file of the scratch folder that is moved in; it is called at most
    once. `key`, `hashed`: as of `idempotency.once`. A crash leaves nothing acknowledged lost.

    Raises InvalidUpload (too many captions), QuotaExceeded, KeyReused, NotFound for a collection that has gone.
    """
    with storage.database.read() as connection:
        earlier: dict[str, Any] | None = idempotency.earlier_answer(connection, tenant.id, key, hashed)
        twin = video_rows.twin(connection, tenant.id, collection.id, sha256)
    if earlier is not None:
        return earlier, None
    if twin is not None:
        known, lost = twin, not storage.blobs.exists(video_key(collection.id, twin.id))
        if lost:
            index.restore_file(storage, known, file())
        try:
            with storage.database.write() as connection:
                renewed = lambda: _renewed(connection, known, metadata, captions)  # noqa: E731
                return idempotency.once(connection, tenant.id, key, hashed, renewed), None
        except NotFound:  # deleted meanwhile: the video is added anew, unless its bytes went with the one deleted
            if lost:
                raise
    video_id, task = new_id("vid"), None

    def add() -> dict[str, Any]:
        nonlocal task
        if collection_rows.lock_collection(connection, tenant.id, collection.id) is None:
            raise NotFound("collection", collection.name)
        if (twin := video_rows.twin(connection, tenant.id, collection.id, sha256)) is not None:  # of two equal ones at once
            return _renewed(connection, twin, metadata, captions)
        tenant_rows.check_quota(connection, tenant, videos=1, bytes=size)
        row = (filename, sha256, size, dict(metadata or {}), captions)
        task = video_rows.add_video(connection, tenant.id, collection.id, video_id, *row)
        return {"video_id": video_id, "task_id": task.id, "status": "pending", "duplicate_of": None, "updated": []}

    stored = video_key(collection.id, video_id)
    storage.blobs.put_file(stored, file())
    try:
        with storage.database.write() as connection:
            answer = idempotency.once(connection, tenant.id, key, hashed, add)
    finally:
        if task is None:
            storage.blobs.delete(stored)
    return answer, task


def _renewed(
    connection: Connection, twin: Video, metadata: Mapping[str, Any] | None, captions: list[Caption]
) -> dict[str, Any]:
    """What the same bytes bring once more; `updated` says which of captions and metadata have changed."""
    collection_rows.lock_collection(connection, twin.tenant_id, twin.collection_id)  # the second of two at once sees both
    twin, updated = video_rows.video(connection, twin.tenant_id, twin.id), []
    held = video_rows.captions_of(connection, twin.tenant_id, [twin.id])[twin.id]
    known = set(held)
    if fresh := [caption for caption in dict.fromkeys(captions) if caption not in known]:
        if len(held) + len(fresh) > MAX_CAPTIONS:
            raise InvalidUpload(f"a video may have {MAX_CAPTIONS} captions: it has {len(held)}, {len(fresh)} more were given")
        video_rows.add_captions(connection, twin.id, fresh, first=len(held))
        updated.append("captions")
    changes: dict[str, Any] = {}
    if metadata is not None and json.dumps(metadata, sort_keys=True) != json.dumps(dict(twin.metadata), sort_keys=True):
        changes["metadata"] = metadata
        updated.append("metadata")
    if updated:
        video_rows.set_video(connection, twin.tenant_id, twin.id, **changes)
    told = {"video_id": twin.id, "task_id": twin.task_id, "status": twin.status}
    return {**told, "duplicate_of": twin.id, "updated": updated}


def parse_captions(values: list[Any]) -> list[Caption]:
    """Strings, or objects with text, start and end. Raises InvalidUpload."""
    if len(values) > MAX_CAPTIONS:
        raise InvalidUpload(f"the part 'captions': a video may have {MAX_CAPTIONS} captions, not {len(values)}")
    try:
        parsed = _captions.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidUpload(f"the part 'captions': {first['msg']} at {'/'.join(str(p) for p in first['loc'])}") from error
    captions = [Caption(c) if isinstance(c, str) else Caption(c.text, c.start, c.end) for c in parsed]
    if any(not caption.text.strip() for caption in captions):
        raise InvalidUpload("the part 'captions': a caption is empty")
    return captions


def label(filename: str | None) -> str:
    """What the client called the file, for people to read: the last part of the path, printable, at most 255 characters."""
    name = (filename or "").replace("\\", "/").rsplit("/", 1)[-1]
    with suppress(UnicodeError):
        name = name.encode("latin-1").decode("utf-8")
    return "".join(c for c in name if c.isprintable())[:255] or "video"
