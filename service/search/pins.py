"""Adapters that stay on the device because their collection's settings ask for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog

from adapters_store import PinsExhausted
from service.adapters.encoder import Encoder
from service.storage import collection_rows
from service.storage.collection_rows import Collection
from service.storage.generation_rows import Generation
from service.storage.rows import NotFound
from service.storage.storage import Storage

log = structlog.get_logger()

PINS_SECONDS = 60.0  # after which a search has it looked for pins of collections that are gone


class Pins:
    """Safe to use from several threads; `beside` has work done off the path of searches."""

    def __init__(self, storage: Storage, encoder: Encoder, beside: Callable[[Callable[[], None]], None]) -> None:
        self._storage, self._encoder, self._beside = storage, encoder, beside
        self._pinned: dict[str, str] = {}  # collection → digest that a pin was asked for
        self._checked = time.monotonic()
        self._lock = threading.Lock()

    def keep(self, encoder: Encoder, collection: Collection, generation: Generation) -> None:
        """Keeps a collection's adapter on the device where its settings ask for it."""
        wanted = generation.digest if collection.settings.get("pinned") else None
        with self._lock:
            if self._pinned and time.monotonic() - self._checked > PINS_SECONDS:
                self._checked = time.monotonic()
                self._beside(self.release)
            if self._pinned.get(collection.id) == wanted:
                return
            if wanted is None:
                self._unpin(collection.id)
                return
            self._pinned[collection.id] = wanted  # where it is refused too: it is not asked for again with every search
            try:
                encoder.residency.pin(wanted, collection.id, collection.tenant_id)
            except PinsExhausted as error:
                log.warning("adapter_not_pinned", collection=collection.id, reason=str(error))

    def release(self) -> None:
        """Ends the pins of collections that are gone, alone or with their tenant; what was refused may be asked for again."""
        with self._lock:
            pins = {c: owner for each in self._encoder.resident for c, owner in each.residency.pins().items()}
            self._pinned = {collection: digest for collection, digest in self._pinned.items() if collection in pins}
        for collection, tenant in pins.items():
            try:
                with self._storage.database.read() as connection:
                    collection_rows.collection_name(connection, tenant, collection)
            except NotFound:
                with self._lock:
                    self._unpin(collection)

    def _unpin(self, collection: str) -> None:
        for each in self._encoder.resident:
            each.residency.unpin(collection)
        self._pinned.pop(collection, None)
