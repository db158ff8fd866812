"""Searches: by text, picture and video, one or many at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from anyio import to_thread
from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect

from service.http import document, paging, uploads
from service.http.answers import BackboneName, PageInfo
from service.http.answers_search import HitIdOut, HitOut, SearchAnswer, SearchPool, Warning
from service.http.auth import PROBLEMS, CanSearch, InServices, KeyFirst, Services
from service.http.queries import IMAGE_FIELDS, image_request, offset_of, query_of
from service.http.schemas import ImageSearchRequest, SearchOptions, SearchRequest, VideoSearchRequest
from service.search.query import Found, Hit, Query
from service.storage.keys import sign
from service.storage.tenant_rows import Tenant

Done = TypeVar("Done")
router = APIRouter(route_class=KeyFirst, tags=["search"], responses=PROBLEMS)


@router.post("/search", name="search")
async def search(request: Request, body: SearchRequest, tenant: CanSearch, services: InServices) -> SearchAnswer:
    """Finds the videos of a collection that show what the text says, best first."""
    return await _answered(services, request, tenant, body, query_of(body))


@router.post("/search/video", name="search_by_video")
async def search_by_video(request: Request, body: VideoSearchRequest, tenant: CanSearch, services: InServices) -> SearchAnswer:
    """Finds videos that look like a video of the collection, or like a part of it; that video itself is left out.

    Scores are cosines of pictures with pictures, which are much higher than those of texts with pictures.
    """
    return await _answered(services, request, tenant, body, query_of(body))


@router.post(
    "/search/image",
    name="search_by_image",
    openapi_extra=document.form(
        "JPEG, PNG, WebP, GIF or BMP of at most 20 megapixels; it is turned as its EXIF says",
        part="image",
        query="the fields of ImageSearchRequest as one JSON object; or each as a part of its own:",
        **{
            field.alias or name: field.description or "as in /search" for name, field in ImageSearchRequest.model_fields.items()
        },
    ),
)
async def search_by_image(request: Request, tenant: CanSearch, services: InServices) -> SearchAnswer:
    """Finds videos that look like a picture, or like a picture with a text: `text_weight` is the text's share of the vector.

    Scores are cosines of pictures with pictures, which are much higher than those of texts with pictures.
    """
    limit = services.storage.settings.image_bytes
    data, parts = await uploads.receive_form(request, "image", limit, ("query", *IMAGE_FIELDS))
    body = image_request(parts)
    picture = await to_thread.run_sync(services.pictures.read, data, limiter=services.reading)
    return await _answered(services, request, tenant, body, query_of(body, picture))


async def _answered(services: Services, request: Request, tenant: Tenant, body: SearchOptions, query: Query) -> SearchAnswer:
    work = services.searcher.answer(tenant.id, query.collection, query.asked, **query.how)
    return answer(services, request, await while_connected(request, work), body)


async def while_connected(request: Request, work: Coroutine[Any, Any, Done]) -> Done:
    """What `work` returns; it is cancelled, and ClientDisconnect raised, if the client goes away first."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watch.cancel()


def answer(services: Services, request: Request, found: Found, body: SearchOptions) -> SearchAnswer:
    """One page of what was found, with signed URLs."""
    offset, limit = offset_of(body), body.page_limit
    page = found.hits[offset : offset + limit]
    url = media_urls(services, request)
    more = len(found.hits) > offset + limit <= paging.MAX_OFFSET
    warnings = []
    if (caution := found.encoder.choice.caution) is not None:
        warnings.append(Warning(code="backbone_knows_no_real_pictures", detail=caution))
    if found.truncated:
        length = found.encoder.backbone.context_length
        detail = f"the text is longer than the {length} tokens that the backbone reads: its end was cut off"
        warnings.append(Warning(code="text_truncated", detail=detail))
    if found.lacking_videos:
        detail = f"this generation is not the active one and lacks {found.lacking_videos} of the videos"
        warnings.append(Warning(code="generation_lacks_videos", detail=detail))
    if found.pending_videos:
        detail = f"videos that were uploaded and are not searched yet: {found.pending_videos}"
        warnings.append(Warning(code="videos_pending", detail=detail))
    return SearchAnswer(
        data=[
            HitIdOut(**_told(hit))
            if body.fields == "ids"
            else HitOut(
                **_told(hit),
                filename=hit.video.filename,
                metadata=dict(hit.video.metadata),
                thumbnail_url=url("thumbnail", f"{hit.video.id}-{hit.segment}"),
                video_url=url("video", hit.video.id),
            )
            for hit in page
        ],
        search_pool=SearchPool(
            collection=found.collection.name,
            generation=found.generation.id,
            adapter=found.generation.adapter_id,
            backbone=BackboneName(**found.encoder.choice.shown(), fingerprint=found.generation.backbone),
            total_videos=found.total_videos,
            pending_videos=found.pending_videos,
        ),
        timings_ms=dict(found.timings_ms),
        page_info=PageInfo(
            next_page_token=paging.encode("offset", str(offset + limit) if more else None),
            total_results=found.total,
        ),
        warnings=warnings,
    )


def _told(hit: Hit) -> dict[str, Any]:
    return {
        "rank": hit.rank, "score": round(hit.score, 6), "video_id": hit.video.id, "start": hit.start, "end": hit.end
    }  # fmt: skip


def media_urls(services: Services, request: Request) -> Callable[[str, str], str]:
    """(thumbnail or video, its id) → a signed URL, good for `url_seconds` from now."""
    base, expires = str(request.base_url).rstrip("/"), int(time.time()) + services.storage.settings.url_seconds

    def url(kind: str, media_id: str) -> str:
        path = f"/media/{kind}/{media_id}"
        return f"{base}{path}?exp={expires}&sig={sign(services.signing_secret, path, expires)}"

    return url
