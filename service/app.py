"""The FastAPI application: `create_app(settings)` builds everything, nothing happens at import."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from anyio import to_thread
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from service.adapters.encoder import Encoder
from service.http import (
    adapters,
    admin,
    alerts,
    archive,
    backbones,
    batch,
    by_url,
    collections,
    document,
    embeddings,
    feedback,
    health,
    media,
    problems,
    search,
    tasks,
    videos,
)
from service.http.auth import Services
from service.http.metrics import Inside
from service.http.middleware import Head, Metrics, Observe
from service.jobs.queue import Jobs
from service.search.pictures import Pictures
from service.search.query import Searcher
from service.settings import Settings
from service.storage import facts
from service.storage.keys import Guesses
from service.storage.storage import Storage

DESCRIPTION = """Text-to-video retrieval for many collections: one frozen CLIP, one small adapter per collection."""


def create_app(settings: Settings, encoder: Encoder | None = None) -> FastAPI:
    """An application over a data folder; the backbone is loaded when it starts. It closes an `encoder` that is handed in."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        own = encoder or Encoder(Storage(settings))
        storage = own.storage
        await to_thread.run_sync(storage.prepare)
        with storage.database.read() as connection:
            secret = facts.fact(connection, "signing_secret")
        jobs = await to_thread.run_sync(Jobs, settings)
        await to_thread.run_sync(own.warm)
        await to_thread.run_sync(own.load_those_in_use)
        searcher, guesses, pictures = Searcher(storage, own), Guesses(settings.wrong_keys), Pictures(settings)
        app.state.services = Services(storage, own, searcher, jobs, secret, guesses, pictures)
        app.state.metrics.registry.register(inside := Inside(own, searcher))
        yield
        jobs.close()
        pictures.close()
        searcher.close()
        own.close()
        storage.close()
        app.state.metrics.registry.unregister(inside)  # FastAPI's routers keep an application for good, not its backbones
        del app.state.services

    app = FastAPIOffline(
        title="polyclip",
        version=version("polyclip"),
        description=DESCRIPTION,
        lifespan=lifespan,
        generate_unique_id_function=document.operation_id,
    )
    app.state.metrics = Metrics()
    app.state.draining = threading.Event()  # set when the process is told to end: streams of events end then
    app.add_middleware(Observe, metrics=app.state.metrics, body_bytes=settings.body_bytes)
    app.add_middleware(Head)
    problems.install(app)
    for module in (
        search,
        batch,
        embeddings,
        feedback,
        collections,
        backbones,
        videos,
        by_url,
        alerts,
        tasks,
        adapters,
        admin,
        archive,
        media,
        health,
    ):
        app.include_router(module.router)
    document.install(app)
    return app
