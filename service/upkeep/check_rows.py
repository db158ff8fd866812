"""Rows as `fsck` compares them with each other and with the blobs, and as it repairs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Table, and_, delete, insert, or_, select

from service.jobs.task_rows import add_task
from service.storage.collection_rows import lock_collection
from service.storage.generation_rows import generations_of
from service.storage.tables import (
    OPEN,
    adapters,
    alert_events,
    captions,
    collections,
    feedback,
    generations,
    segments,
    tasks,
    videos,
)
from service.videos.video_rows import lock_video, set_video, videos_by_id

OF_VIDEOS = {"captions": captions, "feedback": feedback, "events": alert_events}  # rows that go with their video


def damage(connection: Connection) -> list[str]:
    """What SQLite finds wrong with its file, or else tables with rows that name a row which is not there.

    Other databases look after their own files.
    """
    if connection.dialect.name != "sqlite":
        return []
    known = [table.name for table in OF_VIDEOS.values()]
    pages = [line for (line,) in connection.exec_driver_sql("PRAGMA integrity_check") if line != "ok"]
    keys = connection.exec_driver_sql("PRAGMA foreign_key_check") if not pages else ()
    return pages or sorted(
        {f"{table} without {parent}" for table, _, parent, _ in keys if not (table in known and parent == "videos")}
    )


def rows_of_nothing(connection: Connection, what: str) -> list[str]:
    """Ids that rows of a table of `OF_VIDEOS` name and no video has."""
    table = OF_VIDEOS[what]
    return list(connection.scalars(select(table.c.video_id).where(_without_video(table)).distinct()))


def drop_rows_of_nothing(connection: Connection, what: str, video: str) -> None:
    table = OF_VIDEOS[what]
    connection.execute(delete(table).where(table.c.video_id == video, _without_video(table)))


def _without_video(table: Table) -> ColumnElement[bool]:
    return table.c.video_id.not_in(select(videos.c.id))


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
    for row in ({"ordinal": -1}, *rows):
        connection.execute(insert(segments).values(vector_set=vector_set, video_id=video, **row))


def copies_of_adapter(connection: Connection, digest: str) -> list[str]:
    """Collections of any tenant that have published these very bytes."""
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
