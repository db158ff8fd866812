"""Published adapter versions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, func, insert, select, update

from service.errors import PolyclipError
from service.storage.generation_rows import generations_of, set_generation_state
from service.storage.rows import ALL, NotFound, Page, page, record
from service.storage.tables import adapters, new_id, now


class AdapterInUse(PolyclipError):
    """The collection's searches use this adapter."""

    code, status, hint = "adapter_in_use", 409, "activate another adapter first"


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    id: str
    tenant_id: str
    collection_id: str
    version: int
    digest: str
    manifest: Mapping[str, Any]
    created_at: str


def add_adapter(
    connection: Connection,
    tenant: str,
    collection: str,
    manifest: Mapping[str, Any],
    number: int | None = None,
    created_at: str | None = None,
) -> AdapterVersion:
    """A published version; the same bytes published twice are the same version, a deleted one that is not yet purged too.

    It gets the next number and the time now, unless it has had others elsewhere.
    """
    mine = and_(adapters.c.tenant_id == tenant, adapters.c.collection_id == collection)
    row = connection.execute(select(adapters).where(mine, adapters.c.digest == manifest["digest"])).mappings().first()
    if row is not None:
        connection.execute(update(adapters).where(adapters.c.id == row["id"]).values(deleted_at=None))
        return record(AdapterVersion, row)
    latest = connection.scalar(select(func.coalesce(func.max(adapters.c.version), 0)).where(mine)) or 0
    version = AdapterVersion(
        new_id("adp"), tenant, collection, number or latest + 1, manifest["digest"], dict(manifest), created_at or now()
    )
    connection.execute(
        insert(adapters).values(**{name: getattr(version, name) for name in AdapterVersion.__dataclass_fields__})
    )
    return version


def adapter(connection: Connection, tenant: str, collection: str, adapter_id: str) -> AdapterVersion:
    mine = and_(adapters.c.tenant_id == tenant, adapters.c.collection_id == collection, adapters.c.id == adapter_id)
    row = connection.execute(select(adapters).where(mine, adapters.c.deleted_at.is_(None))).mappings().first()
    if row is None:
        raise NotFound("adapter", adapter_id)
    return record(AdapterVersion, row)


def list_adapters(connection: Connection, tenant: str, collection: str, limit: int, after: str | None) -> Page:
    mine = and_(adapters.c.tenant_id == tenant, adapters.c.collection_id == collection)
    query = select(adapters).where(mine, adapters.c.deleted_at.is_(None))
    return page(connection, query, AdapterVersion, adapters.c.id, limit, after)


def adapters_of(connection: Connection, tenant: str, collection: str) -> list[AdapterVersion]:
    """All versions that are not deleted, the first one first."""
    return sorted(list_adapters(connection, tenant, collection, ALL, None).rows, key=lambda version: version.version)


def mark_adapter_deleted(connection: Connection, tenant: str, collection: str, adapter_id: str) -> None:
    """The adapter leaves every list; a generation that is being built with it stops. Raises NotFound, AdapterInUse."""
    version = adapter(connection, tenant, collection, adapter_id)
    for generation in generations_of(connection, tenant, collection):
        if generation.adapter_id == adapter_id and generation.state == "active":
            raise AdapterInUse(f"the searches use version {version.version}: activate another adapter, or none, first")
        if generation.adapter_id == adapter_id and generation.state == "building":
            set_generation_state(connection, tenant, generation.id, "retired")
    mine = and_(adapters.c.tenant_id == tenant, adapters.c.id == adapter_id)
    connection.execute(update(adapters).where(mine).values(deleted_at=now()))
