"""Videos of a collection: upload, list, look at, caption, delete."""

from __future__ import annotations

import json
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query, Request, Response
from pydantic import TypeAdapter, ValidationError
from sqlalchemy import Connection

from service.http import document, paging, uploads
from service.http.answers import UploadOut, VideoOut, VideoPage, VideoStatus
from service.http.auth import (
    PROBLEMS,
    CanSearch,
    CanWrite,
    IdempotencyKey,
    InServices,
    KeyFirst,
    Services,
    collection_of,
    larger_bodies,
)
from service.http.collections import listing
from service.http.schemas import MAX_METADATA, Captions
from service.http.search import media_urls
from service.http.uploads import FileTooLarge, InvalidUpload, Upload
from service.jobs.task_rows import Task
from service.storage import collection_rows, idempotency, tenant_rows
from service.storage.blobs import video_key
from service.storage.rows import QuotaExceeded
from service.storage.tables import new_id
from service.storage.tenant_rows import Tenant
from service.upkeep import delete as cleanup
from service.videos import index, video_rows
from service.videos.captions import MAX_CAPTIONS, CaptionIn
from service.videos.video_rows import Caption, Video

router = APIRouter(route_class=KeyFirst, prefix="/collections/{name}/videos", tags=["videos"], responses=PROBLEMS)
PageLimit = Annotated[int, Query(ge=1, le=50)]
_captions = TypeAdapter(list[str | CaptionIn])

_BODY = document.form(
    "a video",
    metadata="a JSON object, returned with every hit",
    captions="a JSON list of strings or {text, start?, end?}",
)


@router.post("", name="upload_video", status_code=202, response_model=UploadOut, openapi_extra=_BODY)
async def upload(
    name: str, request: Request, tenant: CanWrite, services: InServices, key: IdempotencyKey = None
) -> dict[str, Any]:
    """Stores a video and queues its indexing. When this answers, file and record are on disk.

    The same bytes in the same collection are not stored twice: the answer then names the earlier video. Captions that it
    lacks are added, metadata replaces its own, and `updated` says which of the two have changed.
    """
    await to_thread.run_sync(_check_before, services, tenant, name)
    settings, quota = services.storage.settings, tenant.quotas.get("max_bytes")
    limit = settings.max_video_bytes if quota is None else min(settings.max_video_bytes, quota)
    try:
        received = await uploads.receive(request, settings.scratch, limit, ("metadata", "captions"))
    except FileTooLarge as error:
        if limit == settings.max_video_bytes:
            raise
        raise QuotaExceeded(f"the tenant may have {quota} bytes: this file alone has more") from error
    try:
        return await to_thread.run_sync(_store, services, tenant, name, received, key, limiter=services.receiving)
    finally:
        received.path.unlink(missing_ok=True)


@router.get("", name="list_videos", response_model=VideoPage)
def list_all(
    name: str,
    request: Request,
    tenant: CanSearch,
    services: InServices,
    status: VideoStatus | None = None,
    page_limit: PageLimit = 10,
    page_token: str | None = None,
) -> dict[str, Any]:
    """The collection's videos, newest first."""
    with services.storage.database.read() as connection:
        collection = collection_of(connection, tenant, name)
        page = video_rows.list_videos(connection, tenant.id, collection.id, status, page_limit, paging.decode("id", page_token))
        return listing(show(connection, services, request, tenant, page.rows), page)


@router.get("/{video_id}", name="get_video", response_model=VideoOut)
def get(name: str, video_id: str, request: Request, tenant: CanSearch, services: InServices) -> dict[str, Any]:
    """Status, facts, metadata, captions."""
    with services.storage.database.read() as connection:
        collection = collection_of(connection, tenant, name)
        video = video_rows.video(connection, tenant.id, video_id, collection.id)
        return show(connection, services, request, tenant, [video])[0]


@router.delete("/{video_id}", name="delete_video", status_code=204)
def delete(name: str, video_id: str, tenant: CanWrite, services: InServices) -> Response:
    """The video leaves lists and searches at once; its files follow in the background."""
    with services.storage.database.write() as connection:
        collection = collection_of(connection, tenant, name)
        video_rows.video(connection, tenant.id, video_id, collection.id)
        task = cleanup.delete_video(connection, tenant.id, collection.id, video_id)
    services.jobs.enqueue(task)
    return Response(status_code=204)


@router.put("/{video_id}/captions", name="replace_captions", response_model=VideoOut)
@larger_bodies(4)
def put_captions(
    name: str, video_id: str, body: Captions, request: Request, tenant: CanWrite, services: InServices
) -> dict[str, Any]:
    """Replaces the captions: what an adapter is trained on."""
    texts = [Caption(c) if isinstance(c, str) else Caption(c.text, c.start, c.end) for c in body.captions]
    with services.storage.database.write() as connection:
        collection = collection_of(connection, tenant, name)
        video = video_rows.video(connection, tenant.id, video_id, collection.id)
        video_rows.set_captions(connection, tenant.id, video_id, texts)
        return show(connection, services, request, tenant, [video])[0]


def show(
    connection: Connection, services: Services, request: Request, tenant: Tenant, videos: list[Video] | Any
) -> list[dict[str, Any]]:
    captions, url = video_rows.captions_of(connection, tenant.id, [video.id for video in videos]), media_urls(services, request)
    return [
        {
            "id": video.id,
            "video_id": video.id,  # as it was called in the versions before
            "filename": video.filename,
            "status": video.status,
            "error": video.error,
            "task_id": video.task_id,
            "system_metadata": {**(video.media or {}), "sha256": video.sha256, "size": video.size},
            "metadata": dict(video.metadata),
            "user_metadata": dict(video.metadata),  # as it was called in the versions before
            "captions": [{"text": c.text, "start": c.start, "end": c.end} for c in captions[video.id]],
            "thumbnail_url": url("thumbnail", f"{video.id}-0") if video.media else None,
            "video_url": url("video", video.id),
            "created_at": video.created_at,
            "updated_at": video.updated_at,
        }
        for video in videos
    ]


def _check_before(services: Services, tenant: Tenant, name: str) -> None:
    """What can be refused before the bytes come."""
    with services.storage.database.read() as connection:
        collection_of(connection, tenant, name)
        tenant_rows.check_quota(connection, tenant, videos=1)


def _store(services: Services, tenant: Tenant, name: str, received: Upload, key: str | None) -> dict[str, Any]:
    """File first, then row and task in one transaction, then the queue: a crash between leaves nothing acknowledged lost."""
    metadata = received.json_field("metadata", dict)
    if len(received.fields.get("metadata", "").encode()) > MAX_METADATA:
        raise InvalidUpload(f"the part 'metadata' is over {MAX_METADATA} bytes")
    captions = parse_captions(received.json_field("captions", list) or [])
    hashed = idempotency.request_hash("videos", name, received.sha256, received.filename, received.fields)
    video_id = new_id("vid")
    database, blobs = services.storage.database, services.storage.blobs
    with database.read() as connection:
        collection = collection_of(connection, tenant, name)
        if (earlier := idempotency.earlier_answer(connection, tenant.id, key, hashed)) is not None:
            return earlier  # type: ignore[no-any-return]
        twin = video_rows.twin(connection, tenant.id, collection.id, received.sha256)
    if twin is not None:
        restored = index.restore_file(services.storage, twin, received.path)
        if restored or (key is None and metadata is None and not captions):
            known = twin
            with database.write() as connection:
                changed = lambda: _duplicate(known, renew(connection, known, metadata, captions))  # noqa: E731
                return idempotency.once(connection, tenant.id, key, hashed, changed)
    task: Task | None = None

    def add() -> dict[str, Any]:
        nonlocal task
        collection_rows.lock_collection(connection, tenant.id, collection.id)  # of two equal uploads at once, one is the twin
        if (twin := video_rows.twin(connection, tenant.id, collection.id, received.sha256)) is not None:
            return _duplicate(twin, renew(connection, twin, metadata, captions))
        tenant_rows.check_quota(connection, tenant, videos=1, bytes=received.size)
        row = (received.filename, received.sha256, received.size, metadata or {}, captions)
        task = video_rows.add_video(connection, tenant.id, collection.id, video_id, *row)
        return {"video_id": video_id, "task_id": task.id, "status": "pending", "duplicate_of": None, "updated": []}

    blobs.put_file(video_key(collection.id, video_id), received.path)
    try:
        with database.write() as connection:
            answer = idempotency.once(connection, tenant.id, key, hashed, add)
    finally:
        if task is None:
            blobs.delete(video_key(collection.id, video_id))
    if task is not None:
        services.jobs.enqueue(task)
    return answer


def _duplicate(twin: Video, updated: list[str]) -> dict[str, Any]:
    told = {"video_id": twin.id, "task_id": twin.task_id, "status": twin.status}
    return {**told, "duplicate_of": twin.id, "updated": updated}


def renew(connection: Connection, twin: Video, metadata: dict[str, Any] | None, captions: list[Caption]) -> list[str]:
    """What the same bytes bring once more: captions that the video lacks are added, metadata replaces its own.

    Returns which of "captions" and "metadata" have changed. Raises InvalidUpload over the bound, NotFound for a deleted video.
    """
    if metadata is None and not captions:
        return []
    collection_rows.lock_collection(
        connection, twin.tenant_id, twin.collection_id
    )  # of two at once, one sees the other's captions
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
    return updated


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
