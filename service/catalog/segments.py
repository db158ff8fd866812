"""The vectors of videos, row by row in order of sequence number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, delete, exists, func, insert, select

from service.catalog.rows import record
from service.catalog.videos import Video
from service.records import generations, segments, videos


def missing_vectors(connection: Connection, tenant: str, collection: str, vector_set: str) -> list[Video]:
    """Ready videos of the collection that have no vectors in the set."""
    mine = and_(
        videos.c.tenant_id == tenant,
        videos.c.collection_id == collection,
        videos.c.status == "ready",
        videos.c.deleted_at.is_(None),
    )
    held = select(segments.c.video_id).where(segments.c.vector_set == vector_set)
    query = select(videos).where(mine, videos.c.id.not_in(held)).order_by(videos.c.id)
    return [record(Video, row) for row in connection.execute(query).mappings()]


def _in_set(tenant: str, vector_set: str) -> ColumnElement[bool]:
    """Rows of a vector set, if it is the tenant's: rows of `segments` bear no tenant themselves."""
    owned = exists().where(generations.c.tenant_id == tenant, generations.c.id == vector_set)
    return and_(segments.c.vector_set == vector_set, owned)


def has_vectors(connection: Connection, tenant: str, video_id: str, vector_set: str) -> bool:
    mine = and_(_in_set(tenant, vector_set), segments.c.video_id == video_id)
    return connection.scalar(select(func.count()).select_from(segments).where(mine)) not in (0, None)


def add_segments(
    connection: Connection, tenant: str, video_id: str, vector_set: str, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Vectors of a live video, once: `rows` hold ordinal, start, end, pooled and frames."""
    if has_vectors(connection, tenant, video_id, vector_set):
        return
    for row in rows:
        connection.execute(insert(segments).values(vector_set=vector_set, video_id=video_id, **row))


def drop_vectors(connection: Connection, tenant: str, vector_set: str) -> None:
    """Removes a vector set of the tenant's."""
    if connection.scalar(select(generations.c.id).where(generations.c.tenant_id == tenant, generations.c.id == vector_set)):
        connection.execute(delete(segments).where(segments.c.vector_set == vector_set))


def segments_after(connection: Connection, tenant: str, vector_set: str, seq: int, limit: int) -> list[dict[str, Any]]:
    """Rows of a vector set in order of sequence number, tombstones among them; without the frame vectors."""
    columns = (segments.c.seq, segments.c.video_id, segments.c.ordinal, segments.c.start, segments.c.end, segments.c.pooled)
    mine = and_(_in_set(tenant, vector_set), segments.c.seq > seq)
    rows = connection.execute(select(*columns).where(mine).order_by(segments.c.seq).limit(limit))
    return [dict(row) for row in rows.mappings()]


def frame_vectors(connection: Connection, tenant: str, vector_set: str, seqs: Iterable[int]) -> dict[int, bytes]:
    mine = and_(_in_set(tenant, vector_set), segments.c.seq.in_(list(seqs)))
    return {seq: frames for seq, frames in connection.execute(select(segments.c.seq, segments.c.frames).where(mine))}


def video_vectors(connection: Connection, tenant: str, vector_set: str, video_ids: Iterable[str]) -> dict[str, list[bytes]]:
    """The frame vectors of each video's segments in a vector set of the tenant's, in order."""
    found: dict[str, list[bytes]] = {}
    query = (
        select(segments.c.video_id, segments.c.frames)
        .join(videos, videos.c.id == segments.c.video_id)
        .where(videos.c.tenant_id == tenant, segments.c.vector_set == vector_set, segments.c.ordinal >= 0)
        .where(segments.c.video_id.in_(list(video_ids)))
        .order_by(segments.c.video_id, segments.c.ordinal)
    )
    for video_id, frames in connection.execute(query):
        found.setdefault(video_id, []).append(frames)
    return found
