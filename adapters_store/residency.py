"""Adapters in use: fetched by digest, checked, fused and kept on the device, the least recently used one going first."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable

import torch

from adapters_store.artifact import InvalidAdapter, unpack
from backbone import Adapter


class ResidentAdapters:
    """A cache of device-ready adapters under a budget of bytes, safe to use from several threads.

    An `Adapter` handed out stays usable after its eviction: tensors live as long as someone holds them.
    """

    def __init__(self, fingerprint: str, device: torch.device, budget_bytes: int = 256 * 1024 * 1024) -> None:
        self._fingerprint = fingerprint
        self._device = device
        self._budget = budget_bytes
        self._held: OrderedDict[str, tuple[Adapter, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, digest: str, fetch: Callable[[], bytes]) -> Adapter:
        """The adapter of this digest; `fetch` reads its file where it is not resident.

        Raises InvalidAdapter if the file is not what the digest names, AdapterMismatch if it is for another backbone.
        """
        with self._lock:
            if digest in self._held:
                self._held.move_to_end(digest)
                return self._held[digest][0]
        data = fetch()
        if hashlib.sha256(data).hexdigest() != digest:
            raise InvalidAdapter(f"the file of adapter {digest[:12]} is damaged: its sha256 differs")
        adapter = unpack(data).adapter(self._fingerprint).to(self._device)
        with self._lock:
            self._held[digest] = (adapter, len(data))
            while len(self._held) > 1 and self.bytes > self._budget:
                self._held.popitem(last=False)
        return adapter

    @property
    def bytes(self) -> int:
        """Bytes of the files whose adapters are resident."""
        return sum(size for _, size in self._held.values())

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, digest: str) -> bool:
        return digest in self._held
