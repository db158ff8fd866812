"""Videos and their captions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import JSON, ColumnElement, Connection, and_, bindparam, delete, func, insert, literal, select, update

from service.jobs.task_rows import Task, add_task
from service.storage.collection_rows import lock_collection
from service.storage.generation_rows import vector_sets
from service.storage.rows import NotFound, Page, among, page, parts, record
from service.storage.tables import captions, new_id, now, segments, videos

IN_PROGRESS = ("pending", "validating", "queued", "indexing")


@dataclass(frozen=True, slots=True)
class Caption:
    text: str
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True, slots=True)
class Video:
    id: str
    tenant_id: str
    collection_id: str
    task_id: str
    filename: str
    sha256: str
    size: int
    status: str
    error: Mapping[str, Any] | None
    media: Mapping[str, Any] | None
    metadata: Mapping[str, Any]
    created_at: str
    updated_at: str
    deleted_at: str | None


def add_video(
    connection: Connection,
    tenant: str,
    collection: str,
    video: str,
    filename: str,
    sha256: str,
    size: int,
    metadata: Mapping[str, Any],
    texts: Sequence[Caption],
) -> Task:
    """A pending video and its indexing task. Raises NotFound for a deleted collection."""
    if lock_collection(connection, tenant, collection) is None:
        raise NotFound("collection", collection)
    task = add_task(connection, tenant, collection, "index_video", {"video_id": video})
    stamp = now()
    connection.execute(
        insert(videos).values(
            id=video,
            tenant_id=tenant,
            collection_id=collection,
            task_id=task.id,
            filename=filename,
            sha256=sha256,
            size=size,
            status="pending",
            metadata=dict(metadata),
            created_at=stamp,
            updated_at=stamp,
        )
    )
    set_captions(connection, tenant, video, texts)
    return task


def video(connection: Connection, tenant: str, video_id: str, collection: str | None = None) -> Video:
    """A video that is not deleted; with `collection`, only if it is in that one."""
    mine = and_(videos.c.tenant_id == tenant, videos.c.id == video_id, videos.c.deleted_at.is_(None))
    row = connection.execute(select(videos).where(mine)).mappings().first()
    if row is None or (collection is not None and row["collection_id"] != collection):
        raise NotFound("video", video_id)
    return record(Video, row)


def signed_video(connection: Connection, video_id: str) -> Video:
    """A video by id alone: only for a URL whose signature, made for the tenant's own caller, names this id."""
    row = connection.execute(select(videos).where(videos.c.id == video_id, videos.c.deleted_at.is_(None))).mappings().first()
    if row is None:
        raise NotFound("video", video_id)
    return record(Video, row)


def pending_videos(connection: Connection, tenant: str, collection: str) -> int:
    """How many videos of a collection are on their way into its index."""
    return connection.scalar(_PENDING, {"tenant": tenant, "collection": collection}) or 0


_PENDING = select(func.count()).where(  # made once: every search asks it; the few that wait are found by their status
    videos.c.status.in_(("pending", "validating", "queued", "indexing")),
    videos.c.tenant_id == bindparam("tenant"),
    func.coalesce(videos.c.collection_id, "") == bindparam("collection"),  # not by its index: it holds all that are ready
    videos.c.deleted_at.is_(None),
)


def videos_by_id(connection: Connection, tenant: str, ids: Iterable[str]) -> dict[str, Video]:
    found = (connection.execute(_BY_ID, {"tenant": tenant, "ids": part}).mappings() for part in parts(ids))
    return {row["id"]: record(Video, row) for rows in found for row in rows}


_BY_ID = select(videos).where(  # made once: every search asks it
    videos.c.tenant_id == bindparam("tenant"), videos.c.id.in_(bindparam("ids", expanding=True)), videos.c.deleted_at.is_(None)
)


def videos_of(connection: Connection, tenant: str, collection: str, status: str) -> list[Video]:
    mine = and_(
        videos.c.tenant_id == tenant,
        videos.c.collection_id == collection,
        videos.c.status == status,
        videos.c.deleted_at.is_(None),
    )
    return [record(Video, row) for row in connection.execute(select(videos).where(mine).order_by(videos.c.id)).mappings()]


def filtered(
    connection: Connection,
    tenant: str,
    collection: str,
    may: ColumnElement[bool],
    sure: ColumnElement[bool] | None,
    ids: Iterable[str] | None = None,
) -> list[tuple[str, bool]]:
    """(id, whether `sure` holds, by default true) of each ready video for which `may` holds; with `ids`, only of these."""
    query = select(videos.c.id, literal(True) if sure is None else sure).where(*_ready(tenant, collection), may)
    if ids is None:
        return [(video_id, bool(surely)) for video_id, surely in connection.execute(query)]
    return [(video_id, bool(surely)) for video_id, surely in among(connection, query, videos.c.id, ids)]


def filterable(
    connection: Connection, tenant: str, collection: str, names: Collection[str], ids: Iterable[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(id, values) of each of these videos that is ready as `filters.Filter.matches` takes them; of the metadata only `names`
    are read.
    """
    plain = [name for name in names if re.fullmatch(r"[ -~]+", name) and not set(name) & {'"', "\\"}]  # as SQLite's paths quote
    whole, as_list = len(plain) < len(names), connection.dialect.name == "sqlite" and bool(plain)
    parts: list[ColumnElement[Any]] = [videos.c.metadata[name] for name in plain]
    if whole:
        parts = [videos.c.metadata]
    elif as_list:  # several paths in one call: a single one would round numbers to 15 digits
        paths = [f'$."{name}"' for name in plain]
        parts = [func.json_extract(videos.c.metadata, *paths, paths[0], type_=JSON)]
    columns = (videos.c.id, videos.c.filename, videos.c.size, videos.c.created_at, videos.c.media)
    query = select(*columns, *parts).where(*_ready(tenant, collection))
    for video_id, filename, size, created_at, media, *found in among(connection, query, videos.c.id, ids):
        values = {**(media or {}), "filename": filename, "size": size, "created_at": created_at}
        metadata = found[0] if whole else dict(zip(plain, found[0] if as_list else found, strict=False))
        yield video_id, {**values, "metadata": metadata}


def ready_videos(connection: Connection, tenant: str, collection: str) -> int:
    return connection.scalar(select(func.count()).select_from(videos).where(*_ready(tenant, collection))) or 0


def _ready(tenant: str, collection: str) -> tuple[ColumnElement[bool], ...]:
    """Not by the index of statuses, in which nearly all are ready."""
    return (
        videos.c.tenant_id == tenant,
        videos.c.collection_id == collection,
        func.coalesce(videos.c.status, "") == "ready",
        videos.c.deleted_at.is_(None),
    )


def twin(connection: Connection, tenant: str, collection: str, sha256: str) -> Video | None:
    """A video of the collection with the same bytes that did not fail."""
    mine = and_(
        videos.c.tenant_id == tenant,
        videos.c.collection_id == collection,
        videos.c.sha256 == sha256,
        videos.c.deleted_at.is_(None),
        videos.c.status != "failed",
    )
    row = connection.execute(select(videos).where(mine).order_by(videos.c.id)).mappings().first()
    return None if row is None else record(Video, row)


def list_videos(
    connection: Connection, tenant: str, collection: str, status: str | None, limit: int, after: str | None
) -> Page:
    query = select(videos).where(
        videos.c.tenant_id == tenant, videos.c.collection_id == collection, videos.c.deleted_at.is_(None)
    )
    if status is not None:
        query = query.where(videos.c.status == status)
    return page(connection, query, Video, videos.c.id, limit, after)


def set_video(connection: Connection, tenant: str, video_id: str, **values: Any) -> bool:
    """Changes status, error or media; False if the video is gone."""
    mine = and_(videos.c.tenant_id == tenant, videos.c.id == video_id, videos.c.deleted_at.is_(None))
    return bool(connection.execute(update(videos).where(mine).values(updated_at=now(), **values)).rowcount)


def lock_video(connection: Connection, tenant: str, video_id: str) -> None:
    """The video's row, where there is one, is locked until the transaction ends: for what locks its task next."""
    mine = and_(videos.c.tenant_id == tenant, videos.c.id == video_id)
    connection.execute(select(videos.c.id).where(mine).with_for_update())


def mark_video_deleted(connection: Connection, tenant: str, video_id: str) -> Video:
    """The video leaves every list now, and every index by a tombstone in each vector set of its collection."""
    gone = video(connection, tenant, video_id)
    lock_collection(connection, tenant, gone.collection_id)
    if not set_video(connection, tenant, video_id, deleted_at=now()):
        raise NotFound("video", video_id)
    for vector_set in vector_sets(connection, tenant, gone.collection_id):
        theirs = and_(segments.c.vector_set == vector_set, segments.c.video_id == video_id)
        connection.execute(delete(segments).where(theirs))
        connection.execute(insert(segments).values(vector_set=vector_set, video_id=video_id, ordinal=-1))
    return gone


def set_captions(connection: Connection, tenant: str, video_id: str, texts: Sequence[Caption]) -> None:
    mine = select(videos.c.id).where(videos.c.tenant_id == tenant, videos.c.id == video_id)
    connection.execute(delete(captions).where(captions.c.video_id.in_(mine)))
    add_captions(connection, video_id, texts)


def add_captions(connection: Connection, video_id: str, texts: Sequence[Caption], first: int = 0) -> None:
    """Captions of the caller's own video, from position `first`."""
    rows = [
        {"id": new_id("cap"), "video_id": video_id, "position": place, "text": each.text, "start": each.start, "end": each.end}
        for place, each in enumerate(texts, start=first)
    ]
    if rows:
        connection.execute(insert(captions), rows)


def captions_of(connection: Connection, tenant: str, video_ids: Iterable[str]) -> dict[str, list[Caption]]:
    """Captions of each of these videos, in the order in which they were given."""
    found: dict[str, list[Caption]] = {video_id: [] for video_id in video_ids}
    query = (
        select(captions.c.video_id, captions.c.text, captions.c.start, captions.c.end)
        .join(videos, videos.c.id == captions.c.video_id)
        .where(videos.c.tenant_id == tenant)
        .order_by(captions.c.video_id, captions.c.position)
    )
    for video_id, text, start, end in among(connection, query, captions.c.video_id, found):
        found[video_id].append(Caption(text, start, end))
    return found


def first_captions(connection: Connection, tenant: str, video_ids: Iterable[str], most: int) -> dict[str, list[str]]:
    """The texts of up to `most` captions of each of these videos."""
    found: dict[str, list[str]] = {video_id: [] for video_id in video_ids}
    query = (
        select(captions.c.video_id, captions.c.text)
        .join(videos, videos.c.id == captions.c.video_id)
        .where(videos.c.tenant_id == tenant, captions.c.position < most)
        .order_by(captions.c.video_id, captions.c.position)
    )
    for video_id, text in among(connection, query, captions.c.video_id, found):
        found[video_id].append(text)
    return found


def caption_counts(connection: Connection, tenant: str, collection: str) -> dict[str, int]:
    """How many captions each ready video has."""
    query = (
        select(videos.c.id, func.count(captions.c.id))
        .outerjoin(captions, captions.c.video_id == videos.c.id)
        .where(
            videos.c.tenant_id == tenant,
            videos.c.collection_id == collection,
            videos.c.deleted_at.is_(None),
            videos.c.status == "ready",
        )
        .group_by(videos.c.id)
    )
    return {video_id: count for video_id, count in connection.execute(query)}


def captioned_videos(connection: Connection, tenant: str, collection: str) -> int:
    """Ready videos with at least one caption."""
    query = (
        select(func.count(func.distinct(captions.c.video_id)))
        .join(videos, videos.c.id == captions.c.video_id)
        .where(
            videos.c.tenant_id == tenant,
            videos.c.collection_id == collection,
            videos.c.deleted_at.is_(None),
            videos.c.status == "ready",
        )
    )
    return connection.scalar(query) or 0
