"""What users say of hits, and the check-up that is made from it."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict
from functools import partial
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request, Response

from backbone.batcher import DeadlinePassed
from service.feedback import feedback_rows
from service.feedback.check_up import CheckUp, check_up
from service.feedback.feedback_rows import Statement
from service.http import paging
from service.http.answers_feedback import CheckUpOut, FeedbackOut, FeedbackPage
from service.http.auth import (
    PROBLEMS,
    Anyone,
    CanSearch,
    CanWrite,
    IdempotencyKey,
    InServices,
    KeyFirst,
    collection_of,
)
from service.http.collections import PageLimit, listing
from service.http.schemas import NewFeedback
from service.http.search import while_connected
from service.search.question import EmptyText
from service.storage import idempotency
from service.videos import video_rows

router = APIRouter(route_class=KeyFirst, tags=["feedback"], responses=PROBLEMS)


@router.post("/feedback", name="add_feedback", status_code=201, response_model=FeedbackOut)
def add(body: NewFeedback, tenant: CanSearch, who: Anyone, services: InServices, key: IdempotencyKey = None) -> dict[str, Any]:
    """Keeps what a user says of a hit: trainings learn from it. What the same key said of the same hit before is replaced."""
    query = " ".join(body.query.split())
    if not query:
        raise EmptyText("the query is empty")

    def say() -> dict[str, Any]:
        collection = collection_of(connection, tenant, body.collection).id
        video = video_rows.video(connection, tenant.id, body.video_id, collection).id
        hit = (video, query, body.start, body.end)
        most = services.storage.settings.feedback
        return _show(feedback_rows.say(connection, tenant.id, collection, who.key_id, *hit, body.relevant, most))

    with services.storage.database.write() as connection:
        return idempotency.once(connection, tenant.id, key, idempotency.request_hash("feedback", body.model_dump()), say)


@router.get("/collections/{name}/feedback", name="list_feedback", response_model=FeedbackPage)
def list_all(
    name: str,
    tenant: CanWrite,
    services: InServices,
    relevant: bool | None = None,
    page_limit: PageLimit = 10,
    page_token: str | None = None,
) -> dict[str, Any]:
    """What users have said of the collection's hits, newest first."""
    with services.storage.database.read() as connection:
        collection = collection_of(connection, tenant, name).id
        after = paging.decode("id", page_token)
        page = feedback_rows.list_feedback(connection, tenant.id, collection, relevant, page_limit, after)
        return listing([_show(row) for row in page.rows], page)


@router.delete("/collections/{name}/feedback/{feedback_id}", name="delete_feedback", status_code=204)
def delete(name: str, feedback_id: str, tenant: CanWrite, services: InServices) -> Response:
    """Takes a statement back: the next training does not see it."""
    with services.storage.database.write() as connection:
        collection = collection_of(connection, tenant, name).id
        feedback_rows.delete_feedback(connection, tenant.id, collection, feedback_id)
    return Response(status_code=204)


@router.get("/collections/{name}/check-up", name="check_up", response_model=CheckUpOut)
async def check(name: str, request: Request, tenant: CanSearch, who: Anyone, services: InServices) -> dict[str, Any]:
    """What the collection's searches are weak at, and which videos to caption next.

    Up to 200 captions and 100 queries from feedback are asked, as searches would. Of the queries, which are other users'
    words, a key of role search is not told.
    """
    given_up, deadline = threading.Event(), time.monotonic() + services.storage.settings.search_seconds

    def go_on() -> None:
        if given_up.is_set() or time.monotonic() > deadline:
            raise DeadlinePassed("the check-up took too long, or others were in front of it")

    shared = services.storage, services.encoder, services.searcher.views
    work = partial(check_up, *shared, tenant.id, name, who.role != "search", go_on)
    try:
        found = await while_connected(request, to_thread.run_sync(work, limiter=services.checking))
    finally:
        given_up.set()
    return _told(found)


def _show(statement: Statement) -> dict[str, Any]:
    return asdict(statement)


def _told(found: CheckUp) -> dict[str, Any]:
    return {
        "collection": found.collection.name,
        "generation": found.generation.id,
        "adapter": found.generation.adapter_id,
        "ready_videos": found.ready,
        "captions": found.captions,
        "asked": found.asked,
        "weak_queries": [
            {
                "text": query.text,
                "source": query.source,
                "reasons": query.reasons,
                "video_id": next(iter(query.videos)) if query.source == "caption" else None,
                "rank": query.rank,
                "relevant": query.relevant,
                "irrelevant": query.irrelevant,
            }
            for query in found.weak
        ],
        "weak_queries_total": found.weak_total,
        "never_found": [{"video_id": video.id, "filename": video.filename} for video in found.never_found],
        "never_found_total": found.never_found_total,
        "caption_next": [{"video_id": video.id, "filename": video.filename, "why": why} for video, why in found.next],
        "gate": asdict(found.gate),
    }
