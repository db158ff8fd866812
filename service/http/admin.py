"""Tenants, keys and usage."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Response
from sqlalchemy import Connection

from service.http import paging
from service.http.answers import KeyPage, NewKeyOut, TenantOut, TenantPage, UsageOut
from service.http.auth import PROBLEMS, Anyone, InServices, KeyFirst
from service.http.collections import PageLimit, listing
from service.http.schemas import NewKey, NewTenant
from service.storage import keys, tenant_rows
from service.storage.keys import Caller
from service.storage.rows import NotFound
from service.storage.tenant_rows import ApiKey, Tenant
from service.upkeep.delete import delete_tenant

router = APIRouter(route_class=KeyFirst, prefix="/admin/tenants", tags=["tenants"], responses=PROBLEMS)


@router.post("", name="create_tenant", status_code=201, response_model=TenantOut)
def create(body: NewTenant, who: Anyone, services: InServices) -> dict[str, Any]:
    """A new tenant (operator's key)."""
    keys.check_role(who, "root")
    with services.storage.database.write() as connection:
        tenant = tenant_rows.create_tenant(connection, body.name, body.quotas.model_dump(exclude_none=True))
    return _tenant_shown(tenant)


@router.get("", name="list_tenants", response_model=TenantPage)
def list_all(who: Anyone, services: InServices, page_limit: PageLimit = 10, page_token: str | None = None) -> dict[str, Any]:
    """The tenants, newest first (operator's key)."""
    keys.check_role(who, "root")
    with services.storage.database.read() as connection:
        page = tenant_rows.list_tenants(connection, page_limit, paging.decode("id", page_token))
    return listing([_tenant_shown(tenant) for tenant in page.rows], page)


@router.delete("/{name}", name="delete_tenant", status_code=204)
def delete(name: str, who: Anyone, services: InServices) -> Response:
    """The tenant's keys stop working at once; all that it has follows in the background (operator's key)."""
    keys.check_role(who, "root")
    with services.storage.database.write() as connection:
        task = delete_tenant(connection, tenant_rows.tenant_named(connection, name).id)
    services.jobs.enqueue(task)
    return Response(status_code=204)


@router.post("/{name}/keys", name="create_key", status_code=201, response_model=NewKeyOut)
def add_key(name: str, body: NewKey, who: Anyone, services: InServices) -> dict[str, Any]:
    """A new API key; the only time that it is shown."""
    with services.storage.database.write() as connection:
        record, key = keys.issue(connection, _tenant(connection, who, name).id, body.role, body.expires_at)
    return {**_show(record), "key": key}


@router.get("/{name}/keys", name="list_keys", response_model=KeyPage)
def list_keys(name: str, who: Anyone, services: InServices) -> dict[str, Any]:
    """The tenant's keys, without their secrets."""
    with services.storage.database.read() as connection:
        found = [_show(key) for key in tenant_rows.keys(connection, _tenant(connection, who, name).id)]
    return {"data": found, "page_info": {"next_page_token": None, "total_results": len(found)}}


@router.delete("/{name}/keys/{key_id}", name="revoke_key", status_code=204)
def revoke(name: str, key_id: str, who: Anyone, services: InServices) -> Response:
    """The key stops working at once."""
    with services.storage.database.write() as connection:
        tenant_rows.revoke_key(connection, _tenant(connection, who, name).id, key_id)
    return Response(status_code=204)


@router.get("/{name}/usage", name="get_usage", response_model=UsageOut)
def usage(name: str, who: Anyone, services: InServices) -> dict[str, Any]:
    """What counts against the tenant's quotas."""
    with services.storage.database.read() as connection:
        tenant = _tenant(connection, who, name)
        used = tenant_rows.usage(connection, tenant.id)
    return {"tenant": tenant.name, "at": datetime.now(UTC).isoformat(), "usage": used, "quotas": dict(tenant.quotas)}


def _tenant(connection: Connection, who: Caller, name: str) -> Tenant:
    """The operator sees every tenant; an admin its own; any other name does not exist for it."""
    if who.tenant is None:
        return tenant_rows.tenant_named(connection, name)
    keys.check_role(who, "admin")
    if who.tenant.name != name:
        raise NotFound("tenant", name)
    return who.tenant


def _tenant_shown(tenant: Tenant) -> dict[str, Any]:
    return {"id": tenant.id, "name": tenant.name, "quotas": dict(tenant.quotas), "created_at": tenant.created_at}


def _show(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "role": key.role,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "last_used_at": key.last_used_at,
        "revoked_at": key.revoked_at,
    }
