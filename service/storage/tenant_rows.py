"""Tenants, their keys, what they use and may use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, and_, bindparam, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from service.storage.rows import AlreadyExists, NotFound, Page, QuotaExceeded, checked_name, page, record
from service.storage.tables import adapters, api_keys, collections, new_id, now, tenants, videos


@dataclass(frozen=True, slots=True)
class Tenant:
    id: str
    name: str
    quotas: Mapping[str, Any]
    created_at: str


@dataclass(frozen=True, slots=True)
class ApiKey:
    id: str
    tenant_id: str
    role: str
    hash: str
    created_at: str
    expires_at: str | None
    last_used_at: str | None
    revoked_at: str | None


def create_tenant(connection: Connection, name: str, quotas: Mapping[str, Any]) -> Tenant:
    tenant = Tenant(new_id("ten"), checked_name(name), dict(quotas), now())
    try:
        with connection.begin_nested():
            connection.execute(insert(tenants).values(**asdict(tenant)))
    except IntegrityError as error:
        raise AlreadyExists("tenant", name) from error
    return tenant


def tenant_named(connection: Connection, name: str) -> Tenant:
    mine = and_(tenants.c.name == name, tenants.c.deleted_at.is_(None))
    row = connection.execute(select(tenants).where(mine)).mappings().first()
    if row is None:
        raise NotFound("tenant", name)
    return record(Tenant, row)


def tenant_of(connection: Connection, tenant: str) -> Tenant:
    """A tenant by its id, for a task of its own."""
    row = connection.execute(select(tenants).where(tenants.c.id == tenant, tenants.c.deleted_at.is_(None))).mappings().first()
    if row is None:
        raise NotFound("tenant", tenant)
    return record(Tenant, row)


def list_tenants(connection: Connection, limit: int, after: str | None) -> Page:
    """For the operator alone."""
    return page(connection, select(tenants).where(tenants.c.deleted_at.is_(None)), Tenant, tenants.c.id, limit, after)


def tenant_of_key(connection: Connection, key_id: str) -> tuple[Tenant, ApiKey] | None:
    row = connection.execute(_OF_KEY, {"key": key_id}).first()
    return None if row is None else (Tenant(*row[: len(_ITS)]), ApiKey(*row[len(_ITS) :]))


_ITS = [tenants.c[name] for name in Tenant.__dataclass_fields__]
_OF_KEY = (  # made once: every request asks it
    select(*_ITS, *(api_keys.c[name] for name in ApiKey.__dataclass_fields__))
    .join_from(api_keys, tenants)
    .where(api_keys.c.id == bindparam("key"))
)


def mark_tenant_deleted(connection: Connection, tenant: str) -> None:
    """Its keys stop working now. The caller marks its collections, then calls `free_tenant_name`."""
    connection.execute(update(tenants).where(tenants.c.id == tenant).values(deleted_at=now()))
    connection.execute(delete(api_keys).where(api_keys.c.tenant_id == tenant))


def free_tenant_name(connection: Connection, tenant: str) -> None:
    """Last of all that a deletion changes: on PostgreSQL it waits for everyone who has just inserted a row of the tenant's."""
    connection.execute(update(tenants).where(tenants.c.id == tenant).values(name=tenant))


def add_key(connection: Connection, tenant: str, key_id: str, role: str, hashed: str, expires_at: str | None) -> ApiKey:
    key = ApiKey(key_id, tenant, role, hashed, now(), expires_at, None, None)
    connection.execute(insert(api_keys).values(**asdict(key)))
    return key


def keys(connection: Connection, tenant: str) -> list[ApiKey]:
    rows = connection.execute(select(api_keys).where(api_keys.c.tenant_id == tenant).order_by(api_keys.c.created_at))
    return [record(ApiKey, row) for row in rows.mappings()]


def revoke_key(connection: Connection, tenant: str, key_id: str) -> None:
    mine = and_(api_keys.c.tenant_id == tenant, api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
    if not connection.execute(update(api_keys).where(mine).values(revoked_at=now())).rowcount:
        raise NotFound("key", key_id)


def key_used(connection: Connection, tenant: str, key_id: str) -> None:
    mine = and_(api_keys.c.tenant_id == tenant, api_keys.c.id == key_id)
    connection.execute(update(api_keys).where(mine).values(last_used_at=now()))


def usage(connection: Connection, tenant: str) -> dict[str, int]:
    """What counts against the quotas."""
    alive = and_(videos.c.tenant_id == tenant, videos.c.deleted_at.is_(None))
    count, size = connection.execute(select(func.count(), func.coalesce(func.sum(videos.c.size), 0)).where(alive)).one()
    mine = and_(collections.c.tenant_id == tenant, collections.c.deleted_at.is_(None))
    theirs = and_(adapters.c.tenant_id == tenant, adapters.c.deleted_at.is_(None))
    return {
        "collections": connection.scalar(select(func.count()).select_from(collections).where(mine)) or 0,
        "videos": count,
        "bytes": int(size),
        "adapters": connection.scalar(select(func.count()).select_from(adapters).where(theirs)) or 0,
    }


def check_quota(connection: Connection, tenant: Tenant, **more: int) -> None:
    """Raises QuotaExceeded if `more` of something (videos, bytes, collections) would pass the tenant's quota."""
    if not any(tenant.quotas.get(f"max_{what}") is not None for what in more):
        return
    used = usage(connection, tenant.id)
    for what, count in more.items():
        limit = tenant.quotas.get(f"max_{what}")
        if limit is not None and used[what] + count > limit:
            raise QuotaExceeded(f"the tenant may have {limit} {what} and has {used[what]}")
