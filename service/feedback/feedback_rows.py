"""What users said of hits: one row a statement."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, and_, case, delete, func, insert, select, update

from service.errors import PolyclipError
from service.storage import idempotency
from service.storage.collection_rows import lock_collection
from service.storage.rows import NotFound, Page, page, record
from service.storage.tables import feedback, new_id, now, videos


class TooMuchFeedback(PolyclipError):
    """The collection keeps no more statements."""

    code, status, hint = "too_much_feedback", 409, "train an adapter, then delete old feedback, or raise POLYCLIP_FEEDBACK"


@dataclass(frozen=True, slots=True)
class Statement:
    """A hit of a query was relevant or not, whole or from `start` to `end` in seconds; `key_id` says whose statement it is."""

    id: str
    video_id: str
    key_id: str
    query: str
    start: float | None
    end: float | None
    relevant: bool
    created_at: str
    updated_at: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What most of those who spoke of it said of a hit."""

    video_id: str
    query: str
    start: float | None
    end: float | None
    relevant: bool


@dataclass(frozen=True, slots=True)
class Spoken:
    """A query, and how many statements called a hit of it relevant and irrelevant."""

    query: str
    relevant: int
    irrelevant: int


def say(
    connection: Connection,
    tenant: str,
    collection: str,
    key: str,
    video: str,
    query: str,
    start: float | None,
    end: float | None,
    relevant: bool,
    most: int,
) -> Statement:
    """Keeps a statement, up to `most` of a collection; what the same key said of the same hit of the same query is replaced.

    The video is one of the tenant's collection. Raises NotFound for a deleted collection, TooMuchFeedback.
    """
    if lock_collection(connection, tenant, collection) is None:
        raise NotFound("collection", collection)
    named = hashlib.sha256(json.dumps([key, query, video, start, end]).encode()).hexdigest()
    mine = and_(feedback.c.tenant_id == tenant, feedback.c.collection_id == collection)
    known = connection.scalar(select(feedback.c.id).where(mine, feedback.c.statement == named))
    if known is None:
        if (connection.scalar(select(func.count()).select_from(feedback).where(mine)) or 0) >= most:
            raise TooMuchFeedback(f"the collection keeps {most} statements of feedback, and has as many")
        known = new_id("fbk")
        said = {"key_id": key, "query": query, "start": start, "end": end, "relevant": relevant}
        where = {"id": known, "tenant_id": tenant, "collection_id": collection, "video_id": video, "statement": named}
        connection.execute(insert(feedback).values(**where, **said, created_at=now(), updated_at=now()))
    else:
        again = update(feedback).where(feedback.c.id == known)
        connection.execute(again.values(relevant=relevant, updated_at=now()))
    row = connection.execute(select(feedback).where(feedback.c.id == known)).mappings().one()
    return record(Statement, row)


def list_feedback(
    connection: Connection, tenant: str, collection: str, relevant: bool | None, limit: int, after: str | None
) -> Page:
    """Newest first; nothing of deleted videos."""
    query = _alive(select(feedback), tenant, collection)
    if relevant is not None:
        query = query.where(feedback.c.relevant.is_(relevant))
    return page(connection, query, Statement, feedback.c.id, limit, after)


def delete_feedback(connection: Connection, tenant: str, collection: str, statement: str) -> None:
    mine = and_(feedback.c.tenant_id == tenant, feedback.c.collection_id == collection, feedback.c.id == statement)
    if not connection.execute(delete(feedback).where(mine)).rowcount:
        raise NotFound("feedback", statement)
    idempotency.forget_object(connection, tenant, statement)


def verdicts(connection: Connection, tenant: str, collection: str) -> list[Verdict]:
    """Of each hit that was spoken of, what the majority says; nothing where there is none."""
    hit = (feedback.c.video_id, feedback.c.query, feedback.c.start, feedback.c.end)
    balance = func.sum(case((feedback.c.relevant, 1), else_=-1))
    query = _alive(select(*hit, balance), tenant, collection).group_by(*hit).having(balance != 0)
    return [Verdict(row[0], row[1], row[2], row[3], relevant=row[4] > 0) for row in connection.execute(query.order_by(*hit))]


def spoken(connection: Connection, tenant: str, collection: str) -> list[Spoken]:
    """The queries that were spoken of, those with the most that was irrelevant first."""
    yes = func.sum(case((feedback.c.relevant, 1), else_=0))
    no = func.sum(case((feedback.c.relevant, 0), else_=1))
    query = _alive(select(feedback.c.query, yes, no), tenant, collection).group_by(feedback.c.query)
    return [Spoken(*row) for row in connection.execute(query.order_by(no.desc(), feedback.c.query))]


def _alive(query: Select[Any], tenant: str, collection: str) -> Select[Any]:
    mine = and_(feedback.c.tenant_id == tenant, feedback.c.collection_id == collection, videos.c.deleted_at.is_(None))
    return query.join(videos, videos.c.id == feedback.c.video_id).where(mine)
