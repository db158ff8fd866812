"""`polyclip serve`: the API under uvicorn, with the supervised worker beside it."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI
from rich.console import Console

from adapters_store import durable
from service.adapters.encoder import Encoder
from service.app import create_app
from service.errors import PolyclipError
from service.http.protocol import LimitedProtocol, limited
from service.jobs.supervisor import Supervisor
from service.logs import configure
from service.settings import Settings
from service.storage.storage import Storage

DRAIN_SECONDS = 5  # for requests that are being answered, uploads that are being received
IDLE_SECONDS = 75  # of a connection: who closes first may cut a request off, and clients and proxies keep theirs for up to 60

console = Console(stderr=True, highlight=False)


class AlreadyServed(PolyclipError):
    """Another `polyclip serve` runs on this data folder."""

    code, hint = "already_served", "end the other one, or take another --data"


def serve(settings: Settings, host: str, port: int, worker: bool) -> None:
    """Runs until SIGINT or SIGTERM. Raises OSError if the address is taken, AlreadyServed, OtherBackbone, BackboneNotFound."""
    configure()
    listener = _listen(host, port)
    storage = Storage(settings)
    encoder = Encoder(storage)
    lock = (settings.data / "serve.lock").open("w")  # held until this process ends
    if settings.database.startswith("sqlite"):
        try:
            durable.lock(lock, 2.0)
        except TimeoutError:
            raise AlreadyServed(
                f"another `polyclip serve` runs on {settings.data}: end it, or take another --data; several can share a"
                " PostgreSQL (POLYCLIP_DATABASE_URL)"
            ) from None
    root_key = storage.prepare()
    storage.blobs.sweep_scratch()
    fingerprint = encoder.backbone.fingerprint  # a wrong backbone is told here, before anything is served
    url = f"http://{'127.0.0.1' if host in ('0.0.0.0', '') else host}:{listener.getsockname()[1]}"
    console.print(f"backbone {encoder.choice.name} ({fingerprint[:12]}) · data {settings.data}", markup=False)
    if (misplaced := settings.misplaced) is not None:
        told = f"an earlier version kept files of this data folder in {misplaced}: copy its folders to {settings.data}/blobs"
        console.print(f"warning: {told} (`polyclip fsck` tells what is missing)", style="yellow", markup=False, soft_wrap=True)
    if (caution := encoder.choice.caution) is not None:
        console.print(f"warning: {caution}", style="yellow", markup=False, soft_wrap=True)
    if root_key is not None:
        console.print(f"operator's key, shown only now: {root_key}", style="bold", markup=False)
    console.print(f"serving {url} · documentation {url}/docs", markup=False)
    supervisor = Supervisor(settings, "service.cli.worker") if worker else None
    if supervisor is not None:
        supervisor.start()
    app = create_app(settings, encoder)
    config = uvicorn.Config(
        app,
        http=limited(settings),
        ws="none",
        log_config=None,
        log_level="warning",
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        access_log=False,
    )
    gc.freeze()  # what is imported and loaded stays: a full collection would stop every search to look through it
    try:
        _Server(config, app, supervisor).run(sockets=[listener])
    finally:
        if supervisor is not None:
            supervisor.stop()


class _Server(uvicorn.Server):
    """Told to end, it takes no more connections and answers what has been asked, and the worker drains at the same time."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, supervisor: Supervisor | None) -> None:
        super().__init__(config)
        self._app, self._supervisor = app, supervisor

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # every second
            now = asyncio.get_running_loop().time()
            for connection in list(self.server_state.connections):
                assert isinstance(connection, LimitedProtocol)
                connection.sweep(now)
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:  # asked twice: now; the worker dies with this process
            os._exit(1)
        self._app.state.draining.set()
        if self._supervisor is not None:
            self._supervisor.ask_to_stop()
        self.should_exit = True  # no more than that: uvicorn would raise the signal again, while the worker still drains


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)  # a second server that starts meanwhile is told at once
    except OSError as error:
        listener.close()
        raise OSError(error.errno, error.strerror or str(error), f"{host}:{port}") from error
    listener.set_inheritable(False)
    return listener
