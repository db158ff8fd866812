"""The FastAPI application: `create_app(settings)` builds everything, nothing happens at import."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from anyio import to_thread
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.requests import Request
from starlette.responses import Response

from service import catalog, errors
from service.jobs import Jobs
from service.records import new_id
from service.routes import adapters, admin, collections, health, media, search, tasks, videos
from service.routes.access import House
from service.runtime import Runtime
from service.search import Searcher
from service.settings import Settings

DESCRIPTION = """Text-to-video retrieval for many collections: one frozen CLIP, one small adapter per collection."""


def create_app(settings: Settings) -> FastAPI:
    """An application over a prepared data folder (`Runtime.prepare`); the backbone is loaded when it starts."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        runtime = Runtime(settings)
        await to_thread.run_sync(runtime.prepare)
        with runtime.database.read() as connection:
            secret = catalog.fact(connection, "signing_secret")
        jobs = await to_thread.run_sync(Jobs, settings)
        app.state.house = House(runtime, Searcher(runtime), jobs, secret)
        await to_thread.run_sync(_warm, runtime)
        yield
        jobs.close()
        runtime.close()

    app = FastAPI(title="polyclip", version="0.1.0", description=DESCRIPTION, lifespan=lifespan)
    app.state.metrics = Metrics()
    errors.install(app)
    app.middleware("http")(_observe)
    for module in (search, collections, videos, tasks, adapters, admin, media, health):
        app.include_router(module.router)
    return app


def _warm(runtime: Runtime) -> None:
    """Loads the backbone and runs it once, so that the first query is as fast as the next."""
    tokens = runtime.backbone.tokenize(["a video"])
    runtime.texts.submit((tokens.ids[0], None)).result()


class Metrics:
    """Prometheus metrics of one application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "polyclip_requests", "Answered HTTP requests.", ("method", "route", "status"), registry=self.registry
        )
        self.seconds = Histogram("polyclip_request_seconds", "Time to answer.", ("route",), registry=self.registry)


async def _observe(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Gives each request an id, and counts and times it by its route."""
    request.state.request_id = new_id("req")
    started = time.perf_counter()
    response = await call_next(request)
    response.headers["X-Request-Id"] = request.state.request_id
    route = getattr(request.scope.get("route"), "path", "unknown")
    metrics: Metrics = request.app.state.metrics
    metrics.requests.labels(request.method, route, str(response.status_code)).inc()
    metrics.seconds.labels(route).observe(time.perf_counter() - started)
    return response
