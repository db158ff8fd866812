"""Whole collections, row by row, as they are carried to another place.

A collection that is being imported is kept as if it were deleted: nobody sees it, and if its import dies, the sweep takes it
for one that was deleted. `reveal` makes it visible, with everything in it, in one step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, and_, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from service.adapters.adapter_rows import AdapterVersion
from service.storage.rows import AlreadyExists, NotFound, checked_name, record
from service.storage.tables import adapters, collections, generations, new_id, now, segments, tasks, videos
from service.storage.tenant_rows import Tenant, check_quota, tenant_named
from service.videos.video_rows import IN_PROGRESS, Caption, Video, set_captions


def freeze(connection: Connection) -> None:
    """Begins a transaction that sees the database as it is now, to its end; on SQLite every one does."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")


def videos_after(connection: Connection, tenant: str, collection: str, after: str, limit: int) -> list[Video]:
    """Videos that are not deleted, in order of their ids."""
    mine = and_(videos.c.tenant_id == tenant, videos.c.collection_id == collection, videos.c.deleted_at.is_(None))
    query = select(videos).where(mine, videos.c.id > after).order_by(videos.c.id).limit(limit)
    return [record(Video, row) for row in connection.execute(query).mappings()]


def adapters_of(connection: Connection, tenant: str, collection: str) -> list[AdapterVersion]:
    """All versions that are not deleted, the first one first."""
    mine = and_(adapters.c.tenant_id == tenant, adapters.c.collection_id == collection, adapters.c.deleted_at.is_(None))
    rows = connection.execute(select(adapters).where(mine).order_by(adapters.c.version)).mappings()
    return [record(AdapterVersion, row) for row in rows]


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
    mine = and_(collections.c.tenant_id == tenant, collections.c.name == checked_name(name), collections.c.deleted_at.is_(None))
    if connection.scalar(select(collections.c.id).where(mine)) is not None:
        raise AlreadyExists("collection", name)


def add_hidden_collection(
    connection: Connection, tenant: Tenant, collection: str, name: str, settings: Mapping[str, Any], active: str
) -> None:
    """A collection that `reveal` will show. Raises NotFound for a deleted tenant."""
    tenant_named(connection, tenant.name)
    row = {"id": collection, "tenant_id": tenant.id, "name": name, "settings": dict(settings)}
    stamp = now()
    connection.execute(insert(collections).values(**row, active_generation_id=active, created_at=stamp, deleted_at=stamp))


def add_moved_adapter(
    connection: Connection, tenant: str, collection: str, version: int, manifest: Mapping[str, Any], created_at: str
) -> str:
    """A version with the number that it had."""
    adapter = new_id("adp")
    row = {"id": adapter, "tenant_id": tenant, "collection_id": collection, "version": version, "digest": manifest["digest"]}
    connection.execute(insert(adapters).values(**row, manifest=dict(manifest), created_at=created_at))
    return adapter


def add_moved_generation(
    connection: Connection,
    tenant: str,
    collection: str,
    generation: str,
    adapter: str | None,
    backbone: str,
    vector_set: str,
    active: bool,
) -> None:
    stamp = now()
    times = {"activated_at": stamp} if active else {"retired_at": stamp}
    row = {"id": generation, "tenant_id": tenant, "collection_id": collection, "adapter_id": adapter, "backbone": backbone}
    row |= {"vector_set": vector_set, "state": "active" if active else "retired", "created_at": stamp, **times}
    connection.execute(insert(generations).values(**row))


def add_moved_video(
    connection: Connection, tenant: str, collection: str, row: Mapping[str, Any], texts: Sequence[Caption]
) -> None:
    """A video of a hidden collection; `row` holds what was told of it. Raises NotFound if a sweep took the collection away."""
    stamp, task = now(), new_id("task")
    mine = and_(collections.c.tenant_id == tenant, collections.c.id == collection, collections.c.deleted_at.is_not(None))
    if not connection.execute(update(collections).where(mine).values(deleted_at=stamp)).rowcount:  # not forgotten yet
        raise NotFound("collection", collection)
    own = {"tenant_id": tenant, "collection_id": collection, "task_id": task, "updated_at": stamp, "deleted_at": stamp}
    connection.execute(insert(videos).values(**row, **own))
    set_captions(connection, tenant, row["id"], texts)
    if row["status"] == "ready":
        _add_index_task(connection, tenant, collection, task, row["id"], "succeeded")


def reveal(connection: Connection, tenant: Tenant, collection: str) -> list[Video]:
    """The collection is there, with all its videos; returns those that have yet to be indexed, each with its queued task.

    Raises AlreadyExists, QuotaExceeded, NotFound.
    """
    tenant_named(connection, tenant.name)
    theirs = and_(videos.c.tenant_id == tenant.id, videos.c.collection_id == collection)
    count, size = connection.execute(select(func.count(), func.coalesce(func.sum(videos.c.size), 0)).where(theirs)).one()
    check_quota(connection, tenant, collections=1, videos=count, bytes=int(size))
    mine = and_(collections.c.tenant_id == tenant.id, collections.c.id == collection)
    hidden = connection.execute(select(collections).where(mine).with_for_update()).mappings().first()
    if hidden is None:
        raise NotFound("collection", collection)
    try:
        with connection.begin_nested():
            connection.execute(update(collections).where(mine).values(deleted_at=None))
    except IntegrityError as error:
        raise AlreadyExists("collection", hidden["name"]) from error
    connection.execute(update(videos).where(theirs).values(deleted_at=None))
    waiting = select(videos).where(theirs, videos.c.status.in_(IN_PROGRESS)).order_by(videos.c.id)
    found = [record(Video, row) for row in connection.execute(waiting).mappings()]
    for video in found:
        _add_index_task(connection, tenant.id, collection, video.task_id, video.id, "queued")
    return found


def name_if_visible(connection: Connection, tenant: str, collection: str) -> str | None:
    mine = and_(collections.c.tenant_id == tenant, collections.c.id == collection, collections.c.deleted_at.is_(None))
    return connection.scalar(select(collections.c.name).where(mine))


def _add_index_task(connection: Connection, tenant: str, collection: str, task: str, video: str, status: str) -> None:
    stamp, done = now(), status == "succeeded"
    row: dict[str, Any] = {"id": task, "tenant_id": tenant, "collection_id": collection, "kind": "index_video"}
    row |= {"status": status, "progress": 1.0 if done else 0.0, "message": "imported" if done else ""}
    row |= {"request": {"video_id": video}, "result": {"video_id": video} if done else None}
    row |= {"cancel_requested": False, "created_at": stamp}
    connection.execute(insert(tasks).values(**row, finished_at=stamp if done else None))
