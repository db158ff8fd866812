"""Published adapter versions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, func, insert, select

from service.catalog.rows import NotFound, Page, page, record
from service.records import adapters, new_id, now


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    id: str
    tenant_id: str
    collection_id: str
    version: int
    digest: str
    manifest: Mapping[str, Any]
    created_at: str


def add_adapter(connection: Connection, tenant: str, collection: str, manifest: Mapping[str, Any]) -> AdapterVersion:
    """A published version; the same bytes published twice are the same version."""
    mine = and_(adapters.c.tenant_id == tenant, adapters.c.collection_id == collection)
    row = connection.execute(select(adapters).where(mine, adapters.c.digest == manifest["digest"])).mappings().first()
    if row is not None:
        return record(AdapterVersion, row)
    latest = connection.scalar(select(func.coalesce(func.max(adapters.c.version), 0)).where(mine)) or 0
    version = AdapterVersion(new_id("adp"), tenant, collection, latest + 1, manifest["digest"], dict(manifest), now())
    connection.execute(
        insert(adapters).values(**{name: getattr(version, name) for name in AdapterVersion.__dataclass_fields__})
    )
    return version


def adapter(connection: Connection, tenant: str, collection: str, adapter_id: str) -> AdapterVersion:
    mine = and_(adapters.c.tenant_id == tenant, adapters.c.collection_id == collection, adapters.c.id == adapter_id)
    row = connection.execute(select(adapters).where(mine)).mappings().first()
    if row is None:
        raise NotFound("adapter", adapter_id)
    return record(AdapterVersion, row)


def list_adapters(connection: Connection, tenant: str, collection: str, limit: int, after: str | None) -> Page:
    query = select(adapters).where(adapters.c.tenant_id == tenant, adapters.c.collection_id == collection)
    return page(connection, query, AdapterVersion, adapters.c.id, limit, after)
