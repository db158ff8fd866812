"""The vectors of videos, row by row in order of sequence number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import BindParameter, ColumnElement, Connection, and_, bindparam, delete, exists, func, insert, select

from service.storage.collection_rows import lock_collection
from service.storage.rows import NotFound, among
from service.storage.tables import collections, generations, segments, videos


def missing_vectors(connection: Connection, tenant: str, collection: str, vector_set: str) -> list[str]:
    """Ids of ready videos of the collection that have no vectors in the set."""
    mine = and_(
        videos.c.tenant_id == tenant,
        videos.c.collection_id == collection,
        videos.c.status == "ready",
        videos.c.deleted_at.is_(None),
    )
    held = select(segments.c.video_id).where(segments.c.vector_set == vector_set)
    return list(connection.scalars(select(videos.c.id).where(mine, videos.c.id.not_in(held)).order_by(videos.c.id)))


def _in_set(tenant: str | BindParameter[str], vector_set: str | BindParameter[str]) -> ColumnElement[bool]:
    """Rows of a vector set, if it is the tenant's: rows of `segments` bear no tenant themselves."""
    owned = exists().where(generations.c.tenant_id == tenant, generations.c.id == vector_set)
    return and_(segments.c.vector_set == vector_set, owned)


def has_vectors(connection: Connection, tenant: str, video_id: str, vector_set: str) -> bool:
    mine = and_(_in_set(tenant, vector_set), segments.c.video_id == video_id)
    return connection.scalar(select(func.count()).select_from(segments).where(mine)) not in (0, None)


def add_segments(
    connection: Connection, tenant: str, video_id: str, vector_set: str, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Vectors of a live video, all at once and once only: `rows` hold ordinal, start, end, pooled and frames.

    Index views rely on it that the rows of a set become visible in the order of their sequence numbers, or they would pass
    over a smaller number that is committed after a larger one. So whoever writes rows of a set, here or in
    `mark_video_deleted`, holds the lock on its collection from before the first number is taken until the commit. (SQLite
    has one writer at a time anyway.) Raises NotFound if the set is not the tenant's.
    """
    owner = and_(generations.c.tenant_id == tenant, generations.c.id == vector_set)
    collection = connection.scalar(select(generations.c.collection_id).where(owner))
    if collection is None:
        raise NotFound("generation", vector_set)
    lock_collection(connection, tenant, collection)
    if has_vectors(connection, tenant, video_id, vector_set):
        return
    for row in rows:
        connection.execute(insert(segments).values(vector_set=vector_set, video_id=video_id, **row))


def drop_vectors(connection: Connection, tenant: str | None, vector_set: str, limit: int = 500) -> int:
    """Removes up to `limit` rows of a vector set that is the tenant's or, its generation being gone, nobody's."""
    foreign = exists().where(generations.c.id == vector_set, generations.c.tenant_id.is_distinct_from(tenant))
    some = select(segments.c.seq).where(segments.c.vector_set == vector_set, ~foreign).order_by(segments.c.seq).limit(limit)
    return connection.execute(delete(segments).where(segments.c.seq.in_(some))).rowcount


def segments_after(connection: Connection, tenant: str, vector_set: str, seq: int, limit: int) -> list[dict[str, Any]]:
    """Rows of a vector set in order of sequence number, tombstones among them; without the frame vectors."""
    rows = connection.execute(_AFTER, {"tenant": tenant, "vector_set": vector_set, "seq": seq, "limit": limit})
    return [dict(row) for row in rows.mappings()]


_AFTER = (  # made once: every search asks it
    select(segments.c.seq, segments.c.video_id, segments.c.ordinal, segments.c.start, segments.c.end, segments.c.pooled)
    .where(_in_set(bindparam("tenant"), bindparam("vector_set")), segments.c.seq > bindparam("seq"))
    .order_by(segments.c.seq)
    .limit(bindparam("limit"))
)


def tally(connection: Connection, tenant: str, vector_set: str) -> tuple[int, int, int, str]:
    """Of a vector set: the newest sequence number, how many rows, the sum of their numbers, the greatest video id."""
    mine = _in_set(tenant, vector_set)
    greatest = select(func.max(segments.c.video_id)).where(mine).scalar_subquery()  # apart: each is read from an index alone
    query = select(func.max(segments.c.seq), func.count(), func.sum(segments.c.seq), greatest).where(mine)
    newest, count, total, video = connection.execute(query).one()
    return int(newest or 0), int(count), int(total or 0), str(video or "")


def searched_sets(connection: Connection, tenant: str) -> set[str]:
    """The vector sets that searches of the tenant's collections use now."""
    active = and_(collections.c.active_generation_id == generations.c.id, collections.c.deleted_at.is_(None))
    query = select(generations.c.vector_set).join(collections, active).where(generations.c.tenant_id == tenant)
    return set(connection.scalars(query))


def frame_vectors(connection: Connection, tenant: str, vector_set: str, seqs: Iterable[int]) -> dict[int, bytes]:
    query = select(segments.c.seq, segments.c.frames).where(_in_set(tenant, vector_set))
    return {seq: frames for seq, frames in among(connection, query, segments.c.seq, seqs)}


def video_vectors(connection: Connection, tenant: str, vector_set: str, video_ids: Iterable[str]) -> dict[str, list[bytes]]:
    """The frame vectors of each video's segments in a vector set of the tenant's, in order."""
    found: dict[str, list[bytes]] = {}
    query = (
        select(segments.c.video_id, segments.c.frames)
        .join(videos, videos.c.id == segments.c.video_id)
        .where(videos.c.tenant_id == tenant, segments.c.vector_set == vector_set, segments.c.ordinal >= 0)
        .order_by(segments.c.video_id, segments.c.ordinal)
    )
    for video_id, frames in among(connection, query, segments.c.video_id, video_ids):
        found.setdefault(video_id, []).append(frames)
    return found


def segments_of(connection: Connection, tenant: str, vector_set: str, video_id: str) -> Sequence[Any]:
    """Start, end, pooled and frames of a video's segments in a vector set of the tenant's, in order."""
    mine = and_(_in_set(tenant, vector_set), segments.c.video_id == video_id, segments.c.ordinal >= 0)
    columns = (segments.c.start, segments.c.end, segments.c.pooled, segments.c.frames)
    return connection.execute(select(*columns).where(mine).order_by(segments.c.ordinal)).all()
