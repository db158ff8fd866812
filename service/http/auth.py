"""What every route depends on: what the application holds, and who asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import Depends, Header, Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import Connection

from service.adapters.encoder import Encoder
from service.http.answers import Problem
from service.jobs.queue import Jobs
from service.search.pictures import Pictures
from service.search.query import Searcher
from service.storage import collection_rows, keys
from service.storage.collection_rows import Collection
from service.storage.keys import Caller, Guesses
from service.storage.storage import Storage
from service.storage.tenant_rows import Tenant

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


@dataclass(slots=True)
class Services:
    """What the application holds; `signing_secret` signs media URLs; `streams` are the open event streams by key.

    Threads that check keys, those that write uploads and archives, and the one that looks a collection through are counted
    apart from all others: a slow disk under many uploads stops no search. So are those that wait for `pictures`.
    """

    storage: Storage
    encoder: Encoder
    searcher: Searcher
    jobs: Jobs
    signing_secret: str
    guesses: Guesses
    pictures: Pictures
    streams: Counter[str] = field(default_factory=Counter)
    authenticating: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(8))
    receiving: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(16))
    checking: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(1))
    reading: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(4))


async def services_of(request: Request) -> Services:
    """A coroutine, as `check` below: what waits for nothing needs no thread of its own."""
    return request.app.state.services  # type: ignore[no-any-return]


_bearer = HTTPBearer(auto_error=False, description="Authorization: Bearer KEY")
_header = APIKeyHeader(name="X-API-Key", auto_error=False)
_factors: dict[Any, int] = {}  # by endpoint: `larger_bodies`


async def caller(
    request: Request,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],  # for the documentation
    header: Annotated[str | None, Depends(_header)],
) -> Caller:
    """Whom `KeyFirst` has let in."""
    return request.state.caller  # type: ignore[no-any-return]


async def authenticated(request: Request) -> Caller:
    """Raises MissingKey, InvalidKey, TooManyWrongKeys."""
    bearer = await _bearer(request)
    key = bearer.credentials if bearer else await _header(request)
    services, address = request.app.state.services, request.client.host if request.client else ""
    return await to_thread.run_sync(
        keys.authenticate, services.storage.database, key, services.guesses, address, limiter=services.authenticating
    )


class KeyFirst(APIRoute):
    """Checks the key before a byte of the body is read: FastAPI reads bodies before it asks what a route depends on."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle, keyed, factor = super().get_route_handler(), _needs_caller(self.dependant), _factors.get(self.endpoint, 1)

        async def checked(request: Request) -> Response:
            if keyed:
                request.state.caller = await authenticated(request)
            request.state.body_bytes *= factor
            return await handle(request)

        return checked


def larger_bodies(factor: int) -> Callable[[Endpoint], Endpoint]:
    """For a route whose bodies may be so many times as large as the limit of others."""

    def mark(endpoint: Endpoint) -> Endpoint:
        _factors[endpoint] = factor
        return endpoint

    return mark


def _needs_caller(dependant: Dependant) -> bool:
    return dependant.call is caller or any(_needs_caller(each) for each in dependant.dependencies)


def _tenant(role: str) -> Any:
    async def check(who: Annotated[Caller, Depends(caller)]) -> Tenant:
        keys.check_role(who, role)
        assert who.tenant is not None
        return who.tenant

    return check


InServices = Annotated[Services, Depends(services_of)]
Anyone = Annotated[Caller, Depends(caller)]
CanSearch = Annotated[Tenant, Depends(_tenant("search"))]
CanWrite = Annotated[Tenant, Depends(_tenant("write"))]
CanAdmin = Annotated[Tenant, Depends(_tenant("admin"))]
IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=200)]

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "content": {"application/problem+json": {}}}
    for status in (400, 401, 403, 404, 409, 413, 415, 422, 429, 500, 503, 507)
}


def collection_of(connection: Connection, tenant: Tenant, name: str) -> Collection:
    return collection_rows.collection_named(connection, tenant.id, name)
