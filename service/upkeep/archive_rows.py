"""Rows of collections that are exported and imported.

A collection that is being imported is kept as if it were deleted: no request sees it, and if its import dies, the sweep removes
it as it does a deleted one. `reveal` makes it visible, with everything in it, in one step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, and_, insert, select, update
from sqlalchemy.exc import IntegrityError

from service.jobs.task_rows import add_done, add_task
from service.storage.collection_rows import collection_named
from service.storage.rows import AlreadyExists, NotFound, checked_name, record
from service.storage.tables import collections, new_id, now, segments, videos
from service.storage.tenant_rows import Tenant, check_quota, tenant_named
from service.videos.video_rows import IN_PROGRESS, Caption, Video, set_captions, set_video


def freeze(connection: Connection) -> None:
    """Begins a transaction that sees the database as it is now, to its end; on SQLite every one does."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")


def videos_after(connection: Connection, tenant: str, collection: str, after: str, limit: int) -> list[Video]:
    """Videos that are not deleted, in order of their ids."""
    mine = and_(videos.c.tenant_id == tenant, videos.c.collection_id == collection, videos.c.deleted_at.is_(None))
    query = select(videos).where(mine, videos.c.id > after).order_by(videos.c.id).limit(limit)
    return [record(Video, row) for row in connection.execute(query).mappings()]


def vector_rows(connection: Connection, tenant: str, video: str) -> dict[str, list[dict[str, Any]]]:
    """The whole rows of a video's vectors by vector set, in order."""
    columns = ("vector_set", "ordinal", "start", "end", "pooled", "frames")
    query = (
        select(*(segments.c[name] for name in columns))
        .join(videos, videos.c.id == segments.c.video_id)
        .where(videos.c.tenant_id == tenant, segments.c.video_id == video, segments.c.ordinal >= 0)
        .order_by(segments.c.vector_set, segments.c.ordinal)
    )
    found: dict[str, list[dict[str, Any]]] = {}
    for row in connection.execute(query).mappings():
        found.setdefault(row["vector_set"], []).append({name: row[name] for name in columns[1:]})
    return found


def check_name_free(connection: Connection, tenant: str, name: str) -> None:
    """Raises AlreadyExists, InvalidName."""
    with suppress(NotFound):
        collection_named(connection, tenant, checked_name(name))
        raise AlreadyExists("collection", name)


def add_hidden_collection(
    connection: Connection, tenant: Tenant, collection: str, name: str, settings: Mapping[str, Any]
) -> None:
    """A collection that `reveal` will show. Raises NotFound for a deleted tenant."""
    tenant_named(connection, tenant.name)
    row = {"id": collection, "tenant_id": tenant.id, "name": name, "settings": dict(settings)}
    stamp = now()
    connection.execute(insert(collections).values(**row, created_at=stamp, deleted_at=stamp))


def add_hidden_video(
    connection: Connection, tenant: str, collection: str, row: Mapping[str, Any], texts: Sequence[Caption]
) -> None:
    """A video of a hidden collection; `row` holds its own columns. Raises NotFound if a sweep took the collection away."""
    stamp, task = now(), new_id("task")
    mine = and_(collections.c.tenant_id == tenant, collections.c.id == collection, collections.c.deleted_at.is_not(None))
    if not connection.execute(update(collections).where(mine).values(deleted_at=stamp)).rowcount:  # keeps the sweep away
        raise NotFound("collection", collection)
    if row["status"] == "ready":
        done = {"video_id": row["id"]}
        task = add_done(connection, tenant, collection, "index_video", done, message="imported", result=done).id
    own = {"tenant_id": tenant, "collection_id": collection, "task_id": task, "updated_at": stamp, "deleted_at": stamp}
    connection.execute(insert(videos).values(**row, **own))
    set_captions(connection, tenant, row["id"], texts)


def reveal(connection: Connection, tenant: Tenant, collection: str, active: str, count: int, size: int) -> list[Video]:
    """Shows a collection with its `count` videos of `size` bytes, searched with the generation `active`.

    Returns the videos that have yet to be indexed, each with a queued task. Raises AlreadyExists, QuotaExceeded, NotFound.
    """
    tenant_named(connection, tenant.name)
    check_quota(connection, tenant, collections=1, videos=count, bytes=size)
    mine = and_(collections.c.tenant_id == tenant.id, collections.c.id == collection)
    hidden = connection.execute(select(collections).where(mine).with_for_update()).mappings().first()
    if hidden is None:
        raise NotFound("collection", collection)
    try:
        with connection.begin_nested():
            connection.execute(update(collections).where(mine).values(deleted_at=None, active_generation_id=active))
    except IntegrityError as error:
        raise AlreadyExists("collection", hidden["name"]) from error
    theirs = and_(videos.c.tenant_id == tenant.id, videos.c.collection_id == collection)
    connection.execute(update(videos).where(theirs).values(deleted_at=None))
    waiting = select(videos).where(theirs, videos.c.status.in_(IN_PROGRESS)).order_by(videos.c.id)
    queued = []
    for row in connection.execute(waiting).mappings().all():
        task = add_task(connection, tenant.id, collection, "index_video", {"video_id": row["id"]})
        set_video(connection, tenant.id, row["id"], task_id=task.id)
        queued.append(replace(record(Video, row), task_id=task.id))
    return queued
