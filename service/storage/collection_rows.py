"""Collections, each with the generation that its searches use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, bindparam, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from service.storage.generation_rows import Generation, add_generation, generations_of, set_generation_state, with_digest
from service.storage.rows import NAME, AlreadyExists, NotFound, Page, checked_name, page, record
from service.storage.tables import collections, generations, new_id, now, videos
from service.storage.tenant_rows import Tenant, check_quota, tenant_named


@dataclass(frozen=True, slots=True)
class Collection:
    id: str
    tenant_id: str
    name: str
    settings: Mapping[str, Any]
    active_generation_id: str
    created_at: str
    deleted_at: str | None


def create_collection(
    connection: Connection, tenant: Tenant, name: str, settings: Mapping[str, Any], backbone: str
) -> Collection:
    """A collection with its first generation, the frozen backbone without adapter, active at once."""
    tenant_named(connection, tenant.name)  # raises NotFound where it has been deleted since it was asked for
    check_quota(connection, tenant, collections=1)
    collection = new_id("col")
    generation = add_generation(connection, tenant.id, collection, None, backbone, None, state="active", insert_row=False)
    try:
        with connection.begin_nested():
            connection.execute(
                insert(collections).values(
                    id=collection,
                    tenant_id=tenant.id,
                    name=checked_name(name),
                    settings=dict(settings),
                    active_generation_id=generation["id"],
                    created_at=now(),
                )
            )
    except IntegrityError as error:
        raise AlreadyExists("collection", name) from error
    connection.execute(insert(generations).values(**generation))
    return collection_named(connection, tenant.id, name)


def collection_named(connection: Connection, tenant: str, name: str) -> Collection:
    if not NAME.fullmatch(name):  # nothing that a database would choke on
        raise NotFound("collection", name)
    mine = and_(collections.c.tenant_id == tenant, collections.c.name == name, collections.c.deleted_at.is_(None))
    row = connection.execute(select(collections).where(mine)).mappings().first()
    if row is None:
        raise NotFound("collection", name)
    return record(Collection, row)


def collection_name(connection: Connection, tenant: str, collection: str) -> str:
    mine = and_(collections.c.tenant_id == tenant, collections.c.id == collection, collections.c.deleted_at.is_(None))
    name = connection.scalar(select(collections.c.name).where(mine))
    if name is None:
        raise NotFound("collection", collection)
    return str(name)


def collection_names(connection: Connection, tenant: str, ids: Iterable[str]) -> dict[str, str]:
    """Names by id, of deleted collections too."""
    theirs = and_(collections.c.tenant_id == tenant, collections.c.id.in_(set(ids)))
    return {each: name for each, name in connection.execute(select(collections.c.id, collections.c.name).where(theirs))}


def list_collections(connection: Connection, tenant: str, limit: int, after: str | None) -> Page:
    query = select(collections).where(collections.c.tenant_id == tenant, collections.c.deleted_at.is_(None))
    return page(connection, query, Collection, collections.c.id, limit, after)


def change_collection(connection: Connection, tenant: str, collection: str, settings: Mapping[str, Any]) -> None:
    mine = and_(collections.c.tenant_id == tenant, collections.c.id == collection)
    connection.execute(update(collections).where(mine).values(settings=dict(settings)))


def mark_collection_deleted(connection: Connection, tenant: str, collection: str) -> None:
    mine = and_(collections.c.tenant_id == tenant, collections.c.id == collection)
    connection.execute(update(collections).where(mine).values(deleted_at=now()))
    theirs = and_(videos.c.tenant_id == tenant, videos.c.collection_id == collection, videos.c.deleted_at.is_(None))
    connection.execute(update(videos).where(theirs).values(deleted_at=now()))


def lock_collection(connection: Connection, tenant: str, collection: str) -> Collection | None:
    """The collection, its row locked until the transaction ends; None if it is gone."""
    mine = and_(collections.c.tenant_id == tenant, collections.c.id == collection, collections.c.deleted_at.is_(None))
    row = connection.execute(select(collections).where(mine).with_for_update()).mappings().first()
    return None if row is None else record(Collection, row)


def counts(connection: Connection, tenant: str, collection: str) -> dict[str, int]:
    """Videos of a collection by status."""
    mine = and_(videos.c.tenant_id == tenant, videos.c.collection_id == collection, videos.c.deleted_at.is_(None))
    rows = connection.execute(select(videos.c.status, func.count()).where(mine).group_by(videos.c.status))
    return {status: count for status, count in rows}


def active_generation(connection: Connection, tenant: str, name: str) -> tuple[Collection, Generation]:
    """The collection and the generation that its searches use, read in one step: adapter and vectors always fit."""
    if not NAME.fullmatch(name):
        raise NotFound("collection", name)
    row = connection.execute(_ACTIVE, {"tenant": tenant, "name": name}).first()
    if row is None:
        raise NotFound("collection", name)
    values = list(row)
    width = len(generations.columns) + 1
    generation = Generation(**dict(zip([*generations.columns.keys(), "digest"], values[:width], strict=True)))
    return Collection(**dict(zip(collections.columns.keys(), values[width:], strict=True))), generation


_ACTIVE = (  # made once: every search asks it
    with_digest.add_columns(collections)
    .join(collections, collections.c.active_generation_id == generations.c.id)
    .where(collections.c.tenant_id == bindparam("tenant"), collections.c.name == bindparam("name"))
    .where(collections.c.deleted_at.is_(None))
)


def switch(connection: Connection, tenant: str, collection: str, generation_id: str) -> None:
    """Makes a generation the active one; the one before is kept, retired."""
    for other in generations_of(connection, tenant, collection):
        if other.state == "active":
            set_generation_state(connection, tenant, other.id, "retired")
    set_generation_state(connection, tenant, generation_id, "active")
    theirs = and_(collections.c.tenant_id == tenant, collections.c.id == collection)
    connection.execute(update(collections).where(theirs).values(active_generation_id=generation_id))
