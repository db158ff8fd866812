"""Generations: an adapter and the vectors that its searches use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, insert, select, update

from service.catalog.rows import NotFound, record
from service.records import adapters, generations, new_id, now


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


def vector_sets(connection: Connection, tenant: str, collection: str) -> list[str]:
    return sorted({g.vector_set for g in generations_of(connection, tenant, collection)})


def set_generation_state(connection: Connection, tenant: str, generation_id: str, state: str) -> None:
    mine = and_(generations.c.tenant_id == tenant, generations.c.id == generation_id)
    connection.execute(update(generations).where(mine).values(state=state))
