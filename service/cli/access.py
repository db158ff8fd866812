"""`polyclip tenants` and `polyclip keys`: who may use the service, on the data folder, whether the service runs or not."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.table import Table

from service.cli.options import AsJson, Data, TenantName, out, settings_from

tenants = typer.Typer(no_args_is_help=True, help="Tenants of this installation.")
keys = typer.Typer(no_args_is_help=True, help="API keys of a tenant.")
ROLES = ("search", "write", "admin")
TIMES = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]
Name = Annotated[str, typer.Argument(help="the tenant's name")]


@tenants.command("create")
def create_tenant(name: Name, data: Data = None, as_json: AsJson = False) -> None:
    """Make a tenant. A key for it comes from `polyclip keys create`."""
    from service.cli import local
    from service.storage import tenant_rows

    with local.opened(settings_from(data), new=True) as parts, parts.storage.database.write() as connection:
        tenant = tenant_rows.create_tenant(connection, name, {})
    line = f"tenant {name} is made; a key for it: polyclip keys create --tenant {name}"
    _tell(as_json, {"id": tenant.id, "name": tenant.name}, line)


@tenants.command("list")
def list_tenants(data: Data = None, as_json: AsJson = False) -> None:
    """The tenants and what they use."""
    from service.cli import local
    from service.storage import tenant_rows

    rows = []
    with local.opened(settings_from(data)) as parts, parts.storage.database.read() as connection:
        after = None
        while True:
            page = tenant_rows.list_tenants(connection, 50, after)
            rows += [{"name": t.name, "created_at": t.created_at, **tenant_rows.usage(connection, t.id)} for t in page.rows]
            if (after := page.after) is None:
                break
    _table(as_json, rows, ("name", "collections", "videos", "bytes", "adapters", "created_at"))


@tenants.command("delete")
def delete_tenant(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    data: Data = None,
) -> None:
    """Delete a tenant: its keys stop working at once; a worker removes all that it has."""
    from service.cli import local
    from service.storage import tenant_rows
    from service.upkeep import delete

    if not yes:
        typer.confirm(f"delete the tenant {name} with all its collections and videos?", abort=True)
    with local.opened(settings_from(data)) as parts, parts.storage.database.write() as connection:
        delete.delete_tenant(connection, tenant_rows.tenant_named(connection, name).id)
    out.print(f"tenant {name} is deleted; its files follow as soon as a worker runs", markup=False)


@keys.command("create")
def create_key(
    tenant: TenantName = "default",
    role: Annotated[str, typer.Option(help=f"one of {', '.join(ROLES)}")] = "admin",
    expires: Annotated[datetime | None, typer.Option(help="when it ends, UTC", formats=TIMES)] = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Make a key. It is shown this once."""
    if role not in ROLES:
        raise typer.BadParameter(f"a role is one of {', '.join(ROLES)}")
    from service.cli import local
    from service.storage import tenant_rows
    from service.storage.keys import issue

    with local.opened(settings_from(data)) as parts, parts.storage.database.write() as connection:
        owner = tenant_rows.tenant_named(connection, tenant)
        record, key = issue(connection, owner.id, role, None if expires is None else expires.replace(tzinfo=UTC))
    _tell(as_json, {"id": record.id, "role": record.role, "expires_at": record.expires_at, "key": key}, key)


@keys.command("list")
def list_keys(tenant: TenantName = "default", data: Data = None, as_json: AsJson = False) -> None:
    """A tenant's keys, without their secrets."""
    from service.cli import local
    from service.storage import tenant_rows

    with local.opened(settings_from(data)) as parts, parts.storage.database.read() as connection:
        found = tenant_rows.keys(connection, tenant_rows.tenant_named(connection, tenant).id)
    columns = ("id", "role", "created_at", "expires_at", "last_used_at", "revoked_at")
    _table(as_json, [{name: getattr(key, name) for name in columns} for key in found], columns)


@keys.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(help="the key's id: its part between the underscores")],
    tenant: TenantName = "default",
    data: Data = None,
) -> None:
    """Revoke a key: it stops working at once, in a running service too."""
    from service.cli import local
    from service.storage import tenant_rows

    with local.opened(settings_from(data)) as parts, parts.storage.database.write() as connection:
        tenant_rows.revoke_key(connection, tenant_rows.tenant_named(connection, tenant).id, key_id)
    out.print(f"key {key_id} is revoked", markup=False)


def _tell(as_json: bool, values: dict[str, Any], line: str) -> None:
    if as_json:
        out.print_json(data=values)
    else:
        out.print(line, markup=False, soft_wrap=True)


def _table(as_json: bool, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    if as_json:
        out.print_json(data=rows)
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*("" if row[name] is None else str(row[name])[:19] for name in columns))
    out.print(table)
