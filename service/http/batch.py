"""`POST /search/batch`: several queries in one request."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ValidationError

from service.errors import PolyclipError
from service.http import problems
from service.http.answers import Problem
from service.http.answers_search import SearchAnswer
from service.http.auth import PROBLEMS, CanSearch, InServices, KeyFirst, Services
from service.http.queries import query_of
from service.http.schemas import BatchRequest, SearchOptions, SearchRequest, VideoSearchRequest
from service.http.search import answer, while_connected
from service.search.query import Found

router = APIRouter(route_class=KeyFirst, tags=["search"], responses=PROBLEMS)


class BatchedOut(BaseModel):
    """What a request with this query alone would have got: an answer, or a problem."""

    status: int
    answer: SearchAnswer | None
    problem: Problem | None


class BatchAnswer(BaseModel):
    """One answer to each query, in their order."""

    data: list[BatchedOut]


@router.post("/search/batch", name="search_batch")
async def search_batch(request: Request, body: BatchRequest, tenant: CanSearch, services: InServices) -> BatchAnswer:
    """Answers up to 64 queries, of one collection or several, in their order; of one that cannot be answered it tells why."""
    bodies: list[SearchOptions | None] = []
    queries, refused = [], []
    for each in body.queries:
        try:
            checked = (VideoSearchRequest if isinstance(each, dict) and "video_id" in each else SearchRequest).model_validate(
                each
            )
            queries.append(query_of(checked))
            bodies.append(checked)
        except (ValidationError, PolyclipError) as error:
            refused.append(error)
            bodies.append(None)
    found = iter(await while_connected(request, services.searcher.answer_all(tenant.id, queries)))
    why = iter(refused)
    return BatchAnswer(data=[_batched(services, request, each, next(found if each else why)) for each in bodies])


def _batched(services: Services, request: Request, body: SearchOptions | None, outcome: Any) -> BatchedOut:
    if body is not None and isinstance(outcome, Found):
        return BatchedOut(status=200, answer=answer(services, request, outcome, body), problem=None)
    problem = problems.of_one(request, outcome)
    return BatchedOut(status=problem["status"], answer=None, problem=Problem(**problem))
