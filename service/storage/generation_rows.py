"""Generations: an adapter and the vectors that its searches use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, case, delete, distinct, exists, func, insert, or_, select, update

from service.storage.rows import NotFound, Page, page, record
from service.storage.tables import OPEN, adapters, collections, generations, new_id, now, segments, tasks, videos

ACTIVATING = ("activate", "train_adapter")  # kinds of tasks that build generations


@dataclass(frozen=True, slots=True)
class Generation:
    """`digest` names the adapter (None: the frozen backbone); its text side searches the vectors of `vector_set`."""

    id: str
    tenant_id: str
    collection_id: str
    adapter_id: str | None
    backbone: str
    vector_set: str
    state: str
    created_at: str
    activated_at: str | None
    retired_at: str | None
    digest: str | None


with_digest = select(generations, adapters.c.digest).outerjoin(adapters, adapters.c.id == generations.c.adapter_id)


def add_generation(
    connection: Connection,
    tenant: str,
    collection: str,
    adapter_id: str | None,
    backbone: str,
    vector_set: str | None,
    state: str,
    insert_row: bool = True,
) -> dict[str, Any]:
    """A generation's row; `vector_set` None: it gets video vectors of its own."""
    generation = new_id("gen")
    row = {
        "id": generation,
        "tenant_id": tenant,
        "collection_id": collection,
        "adapter_id": adapter_id,
        "backbone": backbone,
        "vector_set": vector_set or generation,
        "state": state,
        "created_at": now(),
        "activated_at": now() if state == "active" else None,
    }
    if insert_row:
        connection.execute(insert(generations).values(**row))
    return row


def generation(connection: Connection, tenant: str, generation_id: str) -> Generation:
    mine = and_(generations.c.tenant_id == tenant, generations.c.id == generation_id)
    row = connection.execute(with_digest.where(mine)).mappings().first()
    if row is None:
        raise NotFound("generation", generation_id)
    return record(Generation, row)


def generations_of(connection: Connection, tenant: str, collection: str) -> list[Generation]:
    mine = and_(generations.c.tenant_id == tenant, generations.c.collection_id == collection)
    rows = connection.execute(with_digest.where(mine).order_by(generations.c.id)).mappings()
    return [record(Generation, row) for row in rows]


def active_of(connection: Connection, tenant: str, collection: str) -> Generation:
    """The generation that the collection's searches use."""
    mine = and_(generations.c.tenant_id == tenant, generations.c.collection_id == collection, generations.c.state == "active")
    row = connection.execute(with_digest.where(mine)).mappings().first()
    if row is None:
        raise NotFound("collection", collection)
    return record(Generation, row)


def backbones_in_use(connection: Connection) -> set[str]:
    """Fingerprints that any tenant's collections search with, or are being changed to."""
    alive = and_(generations.c.state.in_(("active", "building")), collections.c.deleted_at.is_(None))
    query = select(generations.c.backbone).distinct().join(collections, collections.c.id == generations.c.collection_id)
    return set(connection.scalars(query.where(alive)))


def vector_sets(connection: Connection, tenant: str, collection: str) -> list[str]:
    return sorted({g.vector_set for g in generations_of(connection, tenant, collection)})


def list_generations(connection: Connection, tenant: str, collection: str, limit: int, after: str | None) -> Page:
    mine = and_(generations.c.tenant_id == tenant, generations.c.collection_id == collection)
    return page(connection, with_digest.where(mine), Generation, generations.c.id, limit, after)


def set_generation_state(connection: Connection, tenant: str, generation_id: str, state: str) -> None:
    """`building`, `active` or `retired`, with the time of it."""
    times = {"active": {"activated_at": now()}, "retired": {"retired_at": now()}}.get(state, {})
    mine = and_(generations.c.tenant_id == tenant, generations.c.id == generation_id)
    connection.execute(update(generations).where(mine).values(state=state, **{"retired_at": None, **times}))


def holdings(connection: Connection, tenant: str, collection: str, vector_set: str) -> tuple[int, int]:
    """How many of the collection's ready videos a vector set holds, and how many it lacks."""
    ready = and_(
        videos.c.tenant_id == tenant,
        videos.c.collection_id == collection,
        videos.c.status == "ready",
        videos.c.deleted_at.is_(None),
    )
    held = (
        select(func.count(distinct(segments.c.video_id)))
        .join(videos, videos.c.id == segments.c.video_id)
        .where(ready, segments.c.vector_set == vector_set, segments.c.ordinal >= 0)
    )
    total = connection.scalar(select(func.count()).select_from(videos).where(ready)) or 0
    return (holds := connection.scalar(held) or 0), total - holds


def later_activation(connection: Connection, tenant: str, collection: str, asked: str) -> tuple[str, str | None, Any] | None:
    """(task, adapter, backbone) of the last activation that was asked for after the time `asked` and has not failed.

    A training asks for one when it has ended; whether it gets it is known once its adapter is in use. A time more than a minute
    ahead does not count: the clock has been set back since.
    """
    made, in_use = tasks.c.result["adapter_id"].as_string(), generations.alias()
    of_training = and_(tasks.c.kind == "train_adapter", exists().where(in_use.c.adapter_id == made, in_use.c.state == "active"))
    of_hand = and_(tasks.c.kind == "activate", tasks.c.status.in_((*OPEN, "succeeded")))
    when = case((tasks.c.kind == "activate", tasks.c.created_at), else_=tasks.c.result["trained_at"].as_string())
    mine = and_(tasks.c.tenant_id == tenant, tasks.c.collection_id == collection, or_(of_training, of_hand))
    query = select(
        tasks.c.id, case((of_hand, tasks.c.request["adapter_id"].as_string()), else_=made).label("adapter"), tasks.c.request
    )
    row = connection.execute(query.where(mine, when > asked, when <= now(60)).order_by(when.desc())).first()
    return None if row is None else (row.id, row.adapter, row.request.get("backbone"))


def remove_generation(connection: Connection, tenant: str, generation_id: str) -> bool:
    """Takes out the row of a retired generation whose vectors no other generation searches; False leaves all as it is.

    Its vectors are nobody's from now on: `drop_vectors` takes them out.
    """
    other = generations.alias()
    used = exists().where(other.c.vector_set == generation_id, other.c.id != generation_id)
    mine = and_(generations.c.tenant_id == tenant, generations.c.id == generation_id, generations.c.state == "retired")
    return bool(connection.execute(delete(generations).where(mine, ~used)).rowcount)


def retired_generations(connection: Connection) -> list[tuple[Generation, dict[str, Any]]]:
    """Every tenant's retired generations that have an adapter, or another backbone than the one in use, with the settings of
    their collections: for retention alone.

    The latest comes first, those that were never in use last.
    """
    active = generations.alias()
    replaced = or_(generations.c.adapter_id.is_not(None), generations.c.backbone != active.c.backbone)
    standing = and_(generations.c.state == "retired", replaced, collections.c.deleted_at.is_(None))
    last = func.coalesce(generations.c.retired_at, generations.c.activated_at, generations.c.created_at)
    query = (
        with_digest.add_columns(collections.c.settings)
        .join(collections, collections.c.id == generations.c.collection_id)
        .join(active, active.c.id == collections.c.active_generation_id)
        .where(standing)
        .order_by(generations.c.activated_at.is_(None), last.desc())
    )
    return [(record(Generation, row), dict(row["settings"])) for row in connection.execute(query).mappings()]


def retire_abandoned(connection: Connection) -> int:
    """Retires every tenant's generations in state building that no open task builds: for the sweep alone."""
    builder = exists().where(
        tasks.c.collection_id == generations.c.collection_id, tasks.c.kind.in_(ACTIVATING), tasks.c.status.in_(OPEN)
    )
    abandoned = and_(generations.c.state == "building", ~builder)
    return connection.execute(update(generations).where(abandoned).values(state="retired", retired_at=now())).rowcount
