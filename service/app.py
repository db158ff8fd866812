"""The FastAPI application: `create_app(settings)` builds everything, nothing happens at import."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from anyio import to_thread
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from service.http import adapters, admin, archive, collections, health, media, problems, search, tasks, videos
from service.http.auth import House
from service.http.metrics import HouseCollector
from service.http.middleware import Head, Metrics, Observe
from service.jobs.queue import Jobs
from service.runtime import Runtime
from service.search.query import Searcher
from service.settings import Settings
from service.storage import facts
from service.storage.keys import Guesses

DESCRIPTION = """Text-to-video retrieval for many collections: one frozen CLIP, one small adapter per collection."""


def create_app(settings: Settings, runtime: Runtime | None = None) -> FastAPI:
    """An application over a data folder; the backbone is loaded when it starts. It closes a `runtime` that is handed in."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        own = runtime or Runtime(settings)
        await to_thread.run_sync(own.prepare)
        with own.database.read() as connection:
            secret = facts.fact(connection, "signing_secret")
        jobs = await to_thread.run_sync(Jobs, settings)
        await to_thread.run_sync(own.warm)
        app.state.house = House(own, Searcher(own), jobs, secret, Guesses(settings.wrong_keys))
        app.state.metrics.registry.register(HouseCollector(own, app.state.house.searcher))
        yield
        jobs.close()
        app.state.house.searcher.close()
        own.close()

    app = FastAPIOffline(title="polyclip", version=version("polyclip"), description=DESCRIPTION, lifespan=lifespan)
    app.state.metrics = Metrics()
    app.state.draining = threading.Event()  # set when the process is told to end: streams of events end then
    app.add_middleware(Observe, metrics=app.state.metrics, body_bytes=settings.body_bytes)
    app.add_middleware(Head)
    problems.install(app)
    for module in (search, collections, videos, tasks, adapters, admin, archive, media, health):
        app.include_router(module.router)
    return app
