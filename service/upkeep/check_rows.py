"""Rows as `fsck` compares them with each other and with the blobs, and as it mends them. It looks at every tenant in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, and_, delete, insert, or_, select

from service.jobs.task_rows import OPEN, add_task
from service.storage.collection_rows import Collection, lock_collection
from service.storage.generation_rows import generations_of
from service.storage.rows import record
from service.storage.tables import adapters, captions, collections, generations, segments, tasks, tenants, videos
from service.storage.tenant_rows import Tenant
from service.videos.video_rows import lock_video, set_video, videos_by_id


def living_tenants(connection: Connection) -> list[Tenant]:
    rows = connection.execute(select(tenants).where(tenants.c.deleted_at.is_(None)).order_by(tenants.c.id)).mappings()
    return [record(Tenant, row) for row in rows]


def living_collections(connection: Connection, tenant: str) -> list[Collection]:
    mine = and_(collections.c.tenant_id == tenant, collections.c.deleted_at.is_(None))
    rows = connection.execute(select(collections).where(mine).order_by(collections.c.id)).mappings()
    return [record(Collection, row) for row in rows]


def broken_pages(connection: Connection) -> list[str]:
    """What SQLite itself finds wrong with its file; other databases see to themselves."""
    if connection.dialect.name != "sqlite":
        return []
    return [line for (line,) in connection.exec_driver_sql("PRAGMA integrity_check") if line != "ok"]


def dangling_rows(connection: Connection) -> list[str]:
    """Tables with rows that name a row which is not there; PostgreSQL has none."""
    if connection.dialect.name != "sqlite":
        return []
    found = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    return sorted({f"{table} without {parent}" for table, _, parent, _ in found if table != "captions"})


def captions_of_nothing(connection: Connection) -> list[str]:
    """Ids that captions name and no video has."""
    known = select(videos.c.id)
    return list(connection.scalars(select(captions.c.video_id).where(captions.c.video_id.not_in(known)).distinct()))


def drop_captions_of_nothing(connection: Connection, video: str) -> None:
    known = select(videos.c.id)
    connection.execute(delete(captions).where(captions.c.video_id == video, captions.c.video_id.not_in(known)))


def stray_vectors(connection: Connection) -> list[tuple[str, str, str, str]]:
    """(tenant, collection, vector set, video) of vectors that searches would find and no video stands behind."""
    gone = or_(videos.c.id.is_(None), and_(videos.c.deleted_at.is_not(None), collections.c.deleted_at.is_(None)))
    query = (
        select(generations.c.tenant_id, generations.c.collection_id, segments.c.vector_set, segments.c.video_id)
        .join(generations, generations.c.id == segments.c.vector_set)
        .join(collections, collections.c.id == generations.c.collection_id)
        .outerjoin(videos, videos.c.id == segments.c.video_id)
        .where(segments.c.ordinal >= 0, gone)
        .distinct()
    )
    return [(row[0], row[1], row[2], row[3]) for row in connection.execute(query)]


def replace_vectors(
    connection: Connection, tenant: str, collection: str, vector_set: str, video: str, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Other vectors for a video, or none, in one step: a tombstone stands between, by which index views forget the old ones.

    Nothing happens where the collection, the vector set or, for new vectors, the video has gone.
    """
    if lock_collection(connection, tenant, collection) is None:
        return
    if all(generation.id != vector_set for generation in generations_of(connection, tenant, collection)):
        return
    if rows and video not in videos_by_id(connection, tenant, [video]):
        return
    connection.execute(delete(segments).where(segments.c.vector_set == vector_set, segments.c.video_id == video))
    connection.execute(insert(segments).values(vector_set=vector_set, video_id=video, ordinal=-1))
    for row in rows:
        connection.execute(insert(segments).values(vector_set=vector_set, video_id=video, **row))


def copies_of_adapter(connection: Connection, digest: str) -> list[str]:
    """Collections, whosesoever they are, that have published these very bytes."""
    return list(connection.scalars(select(adapters.c.collection_id).where(adapters.c.digest == digest)))


def has_open_task(connection: Connection, tenant: str, task: str) -> bool:
    mine = and_(tasks.c.tenant_id == tenant, tasks.c.id == task, tasks.c.status.in_(OPEN))
    return connection.scalar(select(tasks.c.id).where(mine)) is not None


def queue_again(connection: Connection, tenant: str, video: str) -> None:
    """A video that nothing works on, with a new indexing task."""
    lock_video(connection, tenant, video)
    found = videos_by_id(connection, tenant, [video]).get(video)
    if found is not None and not has_open_task(connection, tenant, found.task_id):
        task = add_task(connection, tenant, found.collection_id, "index_video", {"video_id": video})
        set_video(connection, tenant, video, status="queued" if found.media else "pending", task_id=task.id)
