"""What every route depends on: the house's objects, and who asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Header, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import Connection

from service import catalog, keys
from service.catalog import Collection, Tenant
from service.jobs import Jobs
from service.keys import Caller
from service.runtime import Runtime
from service.schemas import Problem
from service.search import Searcher


@dataclass(slots=True)
class House:
    """What the application holds; `signing_secret` signs media URLs."""

    runtime: Runtime
    searcher: Searcher
    jobs: Jobs
    signing_secret: str


async def house_of(request: Request) -> House:
    """A coroutine, as `check` below: what waits for nothing needs no thread of its own."""
    return request.app.state.house  # type: ignore[no-any-return]


_bearer = HTTPBearer(auto_error=False, description="Authorization: Bearer KEY")
_header = APIKeyHeader(name="X-API-Key", auto_error=False)


def caller(
    house: Annotated[House, Depends(house_of)],
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    header: Annotated[str | None, Depends(_header)],
) -> Caller:
    return keys.authenticate(house.runtime.database, bearer.credentials if bearer else header)


def _tenant(role: str) -> Any:
    async def check(who: Annotated[Caller, Depends(caller)]) -> Tenant:
        keys.check_role(who, role)
        assert who.tenant is not None
        return who.tenant

    return check


InHouse = Annotated[House, Depends(house_of)]
Anyone = Annotated[Caller, Depends(caller)]
CanSearch = Annotated[Tenant, Depends(_tenant("search"))]
CanWrite = Annotated[Tenant, Depends(_tenant("write"))]
CanAdmin = Annotated[Tenant, Depends(_tenant("admin"))]
IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", max_length=200)]

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "content": {"application/problem+json": {}}}
    for status in (400, 401, 403, 404, 409, 413, 415, 422, 500, 503, 507)
}


def collection_of(connection: Connection, tenant: Tenant, name: str) -> Collection:
    return catalog.collection_named(connection, tenant.id, name)
