"""`POST /search`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect

from service.http import paging
from service.http.answers import BackboneName, HitOut, PageInfo, SearchAnswer, SearchPool, Warning
from service.http.auth import PROBLEMS, CanSearch, InServices, KeyFirst, Services
from service.http.schemas import SearchRequest
from service.search import filters
from service.search.query import Found
from service.storage.keys import sign

Done = TypeVar("Done")
router = APIRouter(route_class=KeyFirst, tags=["search"], responses=PROBLEMS)


@router.post("/search", name="search")
async def search(request: Request, body: SearchRequest, tenant: CanSearch, services: InServices) -> SearchAnswer:
    """Finds the videos of a collection that show what the text says, best first."""
    offset = int(paging.decode("offset", body.page_token) or 0)
    where = None if body.filter is None else filters.parse(body.filter)
    work = services.searcher.answer(
        tenant.id,
        body.collection,
        body.text,
        group_by=body.group_by,
        where=where,
        exact=body.rescore,
        wanted=offset + body.page_limit,
    )
    return answer(services, request, await while_connected(request, work), offset, body.page_limit)


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


def answer(services: Services, request: Request, found: Found, offset: int, limit: int) -> SearchAnswer:
    """One page of what was found, with signed URLs."""
    page = found.hits[offset : offset + limit]
    url = media_urls(services, request)
    more = len(found.hits) > offset + limit <= paging.MAX_OFFSET
    warnings = []
    encoder = services.encoder.of(found.generation.backbone)
    if (caution := encoder.choice.caution) is not None:
        warnings.append(Warning(code="backbone_knows_no_real_pictures", detail=caution))
    if found.truncated:
        length = encoder.backbone.context_length
        detail = f"the text is longer than the {length} tokens that the backbone reads: its end was cut off"
        warnings.append(Warning(code="text_truncated", detail=detail))
    if found.pending_videos:
        detail = f"videos that were uploaded and are not searched yet: {found.pending_videos}"
        warnings.append(Warning(code="videos_pending", detail=detail))
    return SearchAnswer(
        data=[
            HitOut(
                rank=offset + i + 1,
                score=round(hit.score, 6),
                video_id=hit.video.id,
                start=hit.start,
                end=hit.end,
                filename=hit.video.filename,
                metadata=dict(hit.video.metadata),
                thumbnail_url=url("thumbnail", f"{hit.video.id}-{hit.segment}"),
                video_url=url("video", hit.video.id),
            )
            for i, hit in enumerate(page)
        ],
        search_pool=SearchPool(
            collection=found.collection.name,
            generation=found.generation.id,
            adapter=found.generation.adapter_id,
            backbone=BackboneName(**encoder.choice.shown(), fingerprint=found.generation.backbone),
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


def media_urls(services: Services, request: Request) -> Callable[[str, str], str]:
    """(thumbnail or video, its id) → a signed URL, good for `url_seconds` from now."""
    base, expires = str(request.base_url).rstrip("/"), int(time.time()) + services.storage.settings.url_seconds

    def url(kind: str, media_id: str) -> str:
        path = f"/media/{kind}/{media_id}"
        return f"{base}{path}?exp={expires}&sig={sign(services.signing_secret, path, expires)}"

    return url
