"""Videos of a collection: upload, list, look at, caption, delete."""

from __future__ import annotations

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import Connection

from service.http import by_url, document, paging, uploads
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
from service.http.uploads import Upload
from service.storage import idempotency, tenant_rows
from service.storage.tenant_rows import Tenant
from service.upkeep.delete import delete_video
from service.videos import video_rows
from service.videos.accept import InvalidUpload, accept, parse_captions
from service.videos.incoming import room
from service.videos.video_rows import Caption, Video

router = APIRouter(route_class=KeyFirst, prefix="/collections/{name}/videos", tags=["videos"], responses=PROBLEMS)
PageLimit = Annotated[int, Query(ge=1, le=50)]

_BODY = document.form(
    "a video",
    metadata="a JSON object, returned with every hit",
    captions="a JSON list of strings or {text, start?, end?}",
)
_BODY["requestBody"]["content"]["application/json"] = {"schema": by_url.SCHEMA}


@router.post("", name="upload_video", status_code=202, response_model=UploadOut, openapi_extra=_BODY)
async def upload(
    name: str, request: Request, tenant: CanWrite, services: InServices, key: IdempotencyKey = None
) -> dict[str, Any]:
    """Stores a video and queues its indexing. When this answers, file and record are on disk.

    The same bytes in the same collection are not stored twice: the answer then names the earlier video. Captions that it
    lacks are added, metadata replaces its own, and `updated` says which of the two have changed.

    As JSON with a `url`, the task fetches the video and then takes it in as an upload; its result is what an upload would have
    been answered. Until then there is no `video_id`.
    """
    await to_thread.run_sync(_check_before, services, tenant, name)
    if by_url.asked(request):
        return await by_url.one(name, request, tenant, services, key)
    settings = services.storage.settings
    with room(settings, tenant) as limit:
        received = await uploads.receive(request, settings.scratch, limit, ("metadata", "captions"))
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
        task = delete_video(connection, tenant.id, collection.id, video_id)
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
    metadata = received.json_field("metadata", dict)
    if len(received.fields.get("metadata", "").encode()) > MAX_METADATA:
        raise InvalidUpload(f"the part 'metadata' is over {MAX_METADATA} bytes")
    captions = parse_captions(received.json_field("captions", list) or [])
    hashed = idempotency.request_hash("videos", name, received.sha256, received.filename, received.fields)
    with services.storage.database.read() as connection:
        collection = collection_of(connection, tenant, name)
    told = (received.filename, received.sha256, received.size, lambda: received.path)
    answer, task = accept(services.storage, tenant, collection, *told, captions, metadata, key, hashed)
    if task is not None:
        services.jobs.enqueue(task)
    return answer
