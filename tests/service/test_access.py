"""Tenants and keys from the command line and for the operator; the documentation needs no other host."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from serving import ROOT_KEY, Server, new_tenant
from typer.testing import CliRunner

from service.cli.main import app


def polyclip(data: Path, *arguments: str, status: int = 0) -> Any:
    """What a command prints with --json, or its text."""
    done = CliRunner().invoke(app, [*arguments, "--data", str(data)])
    assert done.exit_code == status, (done.output, done.exception)
    return json.loads(done.stdout) if "--json" in arguments else done.output


def test_a_tenant_and_its_keys_from_nothing(tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert "keys create --tenant acme" in polyclip(data, "tenants", "create", "acme")
    [acme] = polyclip(data, "tenants", "list", "--json")
    assert (acme["name"], acme["collections"], acme["videos"]) == ("acme", 0, 0)
    key = polyclip(data, "keys", "create", "--tenant", "acme", "--role", "search", "--expires", "2099-01-31", "--json")
    assert key["key"].startswith(f"pc_{key['id']}_") and key["expires_at"] == "2099-01-31T00:00:00Z"
    [held] = polyclip(data, "keys", "list", "--tenant", "acme", "--json")
    assert (held["id"], held["role"], held["revoked_at"]) == (key["id"], "search", None) and "key" not in held
    polyclip(data, "keys", "revoke", key["id"], "--tenant", "acme")
    assert polyclip(data, "keys", "list", "--tenant", "acme", "--json")[0]["revoked_at"]
    polyclip(data, "tenants", "delete", "acme", "--yes")
    assert polyclip(data, "tenants", "list", "--json") == []
    polyclip(data, "keys", "create", "--tenant", "acme", "--role", "king", status=2)


def test_a_key_of_the_command_line_works_and_ends_in_a_running_service(server: Server) -> None:
    polyclip(server.data, "tenants", "create", "by-hand")
    made = polyclip(server.data, "keys", "create", "--tenant", "by-hand", "--json")
    look = lambda: server.client.get("/collections", headers={"X-API-Key": made["key"]}).status_code  # noqa: E731
    assert look() == 200  # type: ignore[no-untyped-call]
    polyclip(server.data, "keys", "revoke", made["id"], "--tenant", "by-hand")
    assert look() == 401  # type: ignore[no-untyped-call]


def test_the_operator_lists_the_tenants_page_by_page_and_nobody_else_does(client: Any) -> None:
    names = [new_tenant(client).name for _ in range(3)]
    operator, found, token = {"X-API-Key": ROOT_KEY}, [], None
    while True:
        page = {"page_limit": 2} | ({"page_token": token} if token else {})
        answer = client.get("/admin/tenants", params=page, headers=operator).json()
        found += [tenant["name"] for tenant in answer["data"]]
        if (token := answer["page_info"]["next_page_token"]) is None:
            break
    assert set(names) <= set(found) and len(found) == len(set(found)) == answer["page_info"]["total_results"]
    refused = new_tenant(client).get("/admin/tenants")
    assert (refused.status_code, refused.json()["code"]) == (403, "role_too_low")


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_the_documentation_needs_no_other_host(client: Any, path: str) -> None:
    page = client.get(path).text
    assert not re.findall(r"""["'(](?:https?:)?//[^"')]+""", page)
    files = re.findall(r"""(?:src|href|url|spec-url)\s*[=:]\s*["']([^"']+)""", page)
    assert len(files) >= 3 and all(client.get(file).status_code == 200 for file in files)
