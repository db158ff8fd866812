"""What a purge takes out of the tables, and what a sweep finds in them that nobody will come for.

Only what has been marked as deleted is erased. Everything here may be run again after a crash.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqlalchemy import ColumnElement, Connection, and_, delete, or_, select, tuple_

from service.storage.rows import among, parts
from service.storage.tables import (
    OPEN,
    adapters,
    alert_events,
    alerts,
    api_keys,
    captions,
    collections,
    feedback,
    generations,
    idempotency,
    segments,
    tasks,
    tenants,
    videos,
)


def erase_videos(connection: Connection, tenant: str, video_ids: Sequence[str]) -> int:
    """Deleted videos with their captions, what was said of them, their events, the tasks of these, of their fetching and their
    indexing, and the answers kept for their uploads; returns their number.

    Their vectors went when they were marked; the tombstones (an id, no content) stay as long as the vector set.
    """
    mine = and_(videos.c.tenant_id == tenant, videos.c.id.in_(video_ids))
    gone = and_(mine, or_(videos.c.deleted_at.is_not(None), collections.c.deleted_at.is_not(None)))
    query = select(videos.c.id, videos.c.task_id).join(collections, collections.c.id == videos.c.collection_id).where(gone)
    found = connection.execute(query).all()
    ids = [row.id for row in found]
    answers = and_(idempotency.c.tenant_id == tenant, idempotency.c.answer["video_id"].as_string().in_(ids))
    connection.execute(delete(idempotency).where(answers))
    connection.execute(select(videos.c.id).where(videos.c.id.in_(ids)).order_by(videos.c.id).with_for_update())
    deliveries = list(connection.scalars(select(alert_events.c.task_id).where(alert_events.c.video_id.in_(ids))))
    for table in (captions, feedback, alert_events):
        connection.execute(delete(table).where(table.c.video_id.in_(ids)))
    connection.execute(delete(videos).where(videos.c.id.in_(ids)))
    theirs = [*(row.task_id for row in found), *(task for task in deliveries if task is not None)]
    for part in parts(theirs):
        connection.execute(delete(tasks).where(tasks.c.tenant_id == tenant, tasks.c.id.in_(part)))
    fetched = and_(tasks.c.kind == "fetch_video", tasks.c.result["video_id"].as_string().in_(ids))
    _erase_tasks(connection, tenant, fetched)
    return len(ids)


def erase_adapter(connection: Connection, tenant: str, collection: str, adapter_id: str) -> tuple[str, list[str]] | None:
    """A deleted adapter with its generations and the ended tasks that tell of it: its digest, and the vector sets that are
    nobody's now; None: it stands.
    """
    mine = and_(adapters.c.tenant_id == tenant, adapters.c.collection_id == collection, adapters.c.id == adapter_id)
    digest = connection.scalar(select(adapters.c.digest).where(mine, adapters.c.deleted_at.is_not(None)))
    if digest is None:
        return None
    theirs = and_(generations.c.tenant_id == tenant, generations.c.adapter_id == adapter_id)
    sets = list(connection.scalars(select(generations.c.id).where(theirs)))
    told = or_(*(column["adapter_id"].as_string() == adapter_id for column in (tasks.c.request, tasks.c.result)))
    ended = and_(tasks.c.status.not_in(OPEN), tasks.c.kind != "purge", told)
    _erase_tasks(connection, tenant, and_(tasks.c.collection_id == collection, ended))
    connection.execute(delete(generations).where(theirs))
    connection.execute(delete(adapters).where(mine))
    return digest, sets


def erase_collection(connection: Connection, tenant: str, collection: str) -> None:
    """The last of a deleted collection, when its videos and vectors are gone. Its purge tasks stay, they tell of ids alone."""
    if not is_marked(connection, tenant, collection, lock=True):
        return
    mine = and_(collections.c.tenant_id == tenant, collections.c.id == collection)
    standing = and_(alerts.c.tenant_id == tenant, alerts.c.collection_id == collection)
    named = [collection, *connection.scalars(select(alerts.c.id).where(standing))]
    names = (idempotency.c.answer[name].as_string().in_(named) for name in ("id", "collection_id"))
    made = and_(idempotency.c.tenant_id == tenant, or_(*names))
    connection.execute(delete(idempotency).where(made))
    connection.execute(delete(alert_events).where(alert_events.c.alert_id.in_(select(alerts.c.id).where(standing))))
    connection.execute(delete(alerts).where(standing))
    connection.execute(delete(feedback).where(feedback.c.tenant_id == tenant, feedback.c.collection_id == collection))
    _erase_tasks(connection, tenant, and_(tasks.c.collection_id == collection, tasks.c.kind != "purge"))
    connection.execute(delete(generations).where(generations.c.tenant_id == tenant, generations.c.collection_id == collection))
    connection.execute(delete(adapters).where(adapters.c.tenant_id == tenant, adapters.c.collection_id == collection))
    connection.execute(delete(collections).where(mine))


def erase_tenant(connection: Connection, tenant: str) -> None:
    """The last of a deleted tenant, when its collections are gone: answers, tasks (the purge itself too), its row."""
    mine = and_(tenants.c.id == tenant, tenants.c.deleted_at.is_not(None))
    if connection.scalar(select(tenants.c.id).where(mine).with_for_update()) is not None:
        connection.execute(delete(api_keys).where(api_keys.c.tenant_id == tenant))
        connection.execute(delete(idempotency).where(idempotency.c.tenant_id == tenant))
        connection.execute(delete(tasks).where(tasks.c.tenant_id == tenant))
        connection.execute(delete(tenants).where(mine))


def _erase_tasks(connection: Connection, tenant: str, which: ColumnElement[bool]) -> None:
    """With the answers that name them."""
    mine = and_(tasks.c.tenant_id == tenant, which)
    named = idempotency.c.answer["task_id"].as_string().in_(select(tasks.c.id).where(mine))
    connection.execute(delete(idempotency).where(idempotency.c.tenant_id == tenant, named))
    connection.execute(delete(tasks).where(mine))


def is_marked(connection: Connection, tenant: str, collection: str, lock: bool = False) -> bool:
    """Whether a collection is there and marked as deleted; with `lock`, its row is locked until the transaction ends."""
    mine = and_(collections.c.tenant_id == tenant, collections.c.id == collection, collections.c.deleted_at.is_not(None))
    query = select(collections.c.id).where(mine)
    return connection.scalar(query.with_for_update() if lock else query) is not None


def some_videos(connection: Connection, tenant: str, collection: str, limit: int) -> list[str]:
    """Ids of the collection's videos, deleted ones among them."""
    mine = and_(videos.c.tenant_id == tenant, videos.c.collection_id == collection)
    return list(connection.scalars(select(videos.c.id).where(mine).limit(limit)))


def all_collections(connection: Connection, tenant: str) -> list[str]:
    """Ids of the tenant's collections, deleted ones among them."""
    return list(
        connection.scalars(select(collections.c.id).where(collections.c.tenant_id == tenant).order_by(collections.c.id))
    )


# For the sweep alone, over all tenants.


def forgotten(connection: Connection, before: str) -> list[tuple[str, str, str | None, str]]:
    """(what, tenant, collection, id) of everything that was marked as deleted before a time and is still there."""
    alive = collections.c.deleted_at.is_(None)
    found: list[tuple[str, str, str | None, str]] = []
    for what, table in (("video", videos), ("adapter", adapters)):  # those of a deleted collection go with it
        query = select(table.c.tenant_id, table.c.collection_id, table.c.id)
        query = query.join(collections, collections.c.id == table.c.collection_id).where(alive, table.c.deleted_at < before)
        found += [(what, *row) for row in connection.execute(query)]
    old = select(collections.c.tenant_id, collections.c.id).where(collections.c.deleted_at < before)
    found += [("collection", tenant, collection, collection) for tenant, collection in connection.execute(old)]
    gone = select(tenants.c.id).where(tenants.c.deleted_at < before)
    return [*found, *(("tenant", tenant, None, tenant) for tenant in connection.scalars(gone))]


def orphaned_vector_sets(connection: Connection) -> list[str]:
    """Vector sets whose generation is gone."""
    named = select(generations.c.id)
    return list(connection.scalars(select(segments.c.vector_set).where(segments.c.vector_set.not_in(named)).distinct()))


def known_videos(connection: Connection, ids: Iterable[str]) -> set[str]:
    return {row.id for row in among(connection, select(videos.c.id), videos.c.id, ids)}


def known_adapters(connection: Connection, files: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """Those of these (collection, digest) that have a row."""
    pair = tuple_(adapters.c.collection_id, adapters.c.digest)
    query = select(adapters.c.collection_id, adapters.c.digest)
    return {(collection, digest) for collection, digest in among(connection, query, pair, files)}


def known_collections(connection: Connection, ids: Iterable[str]) -> set[str]:
    return {row.id for row in among(connection, select(collections.c.id), collections.c.id, ids)}
