"""Texts and frames of all collections through one backbone, each with the adapter of its generation."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from functools import cached_property

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters_store import DamagedAdapter, Fit, Lease, Residency, slots_of
from backbone import BUILTIN, Backbone, Graphs, load_backbone, threads
from backbone.batcher import Batcher
from service.adapters import backbones
from service.adapters.backbones import BackboneChoice, Beside, OtherBackbone
from service.errors import PolyclipError
from service.storage import facts, generation_rows
from service.storage.blobs import BlobMissing, adapter_key
from service.storage.generation_rows import Generation
from service.storage.storage import Storage

log = structlog.get_logger()

CLOSE_SECONDS = 5.0
CPU_FRAMES = 12  # of each thread in one forward there: more are no faster, and an upload waits for those before it


class Encoder:
    """A backbone, its adapters and batchers, each made at its first use; safe to use from several threads.

    A process has one, of the data folder's own backbone, and `of` gives that of another one that a collection is on. With
    `beside`, it is such another one itself.
    """

    def __init__(self, storage: Storage, beside: BackboneChoice | None = None) -> None:
        self.storage = storage
        self._asked = beside
        self._beside = Beside(storage, lambda choice: Encoder(storage, choice)) if beside is None else None
        self._lock = threading.RLock()

    def of(self, fingerprint: str) -> Encoder:
        """The encoder of the backbone with this fingerprint, waited for. Raises as `request_encoder` does and its future."""
        return self.request_encoder(fingerprint).result()

    def request_encoder(self, fingerprint: str) -> Future[Encoder]:
        """`of`, on its way. Raises OtherBackbone for a backbone that is not known here."""
        if fingerprint != self.backbone.fingerprint:
            assert self._beside is not None
            return self._beside.request(fingerprint)
        done: Future[Encoder] = Future()
        done.set_result(self)
        return done

    def load(self, choice: BackboneChoice) -> Future[Encoder]:
        """The encoder of a backbone by its name, on its way: for a collection that is to be changed to it."""
        with self.storage.database.read() as connection:
            own = facts.fact(connection, "backbone")
        if choice not in (self.choice, own and BackboneChoice.of(own)):
            assert self._beside is not None
            return self._beside.load(choice)
        done: Future[Encoder] = Future()
        done.set_result(self)
        return done

    @property
    def resident(self) -> list[Encoder]:
        """Those whose backbones are in memory."""
        beside = self._beside.held if self._beside else None
        return [each for each in (self, beside) if each is not None and each.backbone_loaded]

    @cached_property
    def choice(self) -> BackboneChoice:
        """The backbone that was asked for, or else the data folder's own."""
        if self._asked is not None:
            return self._asked
        if self.storage.settings.backbone is not None:
            return BackboneChoice(self.storage.settings.backbone, self.storage.settings.pretrained)
        with self.storage.database.read() as connection:
            recorded = facts.fact(connection, "backbone")
        return BackboneChoice.of(recorded) if recorded else BackboneChoice(BUILTIN, None)

    @cached_property
    def device(self) -> torch.device:
        return torch.device(self.storage.settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Half precision is for GPUs, and float16: it keeps the first ten hits of more queries than bfloat16 (docs/log.md)."""
        name = self.storage.settings.precision or ("float16" if self.device.type == "cuda" else "float32")
        return getattr(torch, name)  # type: ignore[no-any-return]

    @property
    def backbone(self) -> Backbone:
        """Loaded at the first call. Raises OtherBackbone if the data folder was made with another one."""
        with self._lock:
            return self._backbone

    @cached_property
    def _backbone(self) -> Backbone:
        if self.storage.settings.threads is not None:
            torch.set_num_threads(self.storage.settings.threads)
        choice = self.choice
        tokenizer = self.storage.settings.tokenizer if self._asked is None else None
        backbone = threads.apart(
            lambda: load_backbone(choice.name, choice.pretrained, self.device, dtype=self.dtype, tokenizer=tokenizer)
        )
        if self._asked is not None:
            return backbone
        with self.storage.database.write() as connection:
            recorded = backbones.claimed(connection, choice, backbone.fingerprint)
        if recorded["fingerprint"] != backbone.fingerprint:
            raise OtherBackbone(
                f"this data folder was made with backbone {recorded['name']} ({recorded['fingerprint'][:12]}), "
                f"not {backbone.name} ({backbone.fingerprint[:12]}): take that one, or another data folder"
            )
        return backbone

    @property
    def backbone_loaded(self) -> bool:
        return "_backbone" in self.__dict__

    @property
    def fit(self) -> Fit:
        """What an adapter must fit to be published here."""
        return Fit(self.backbone.fingerprint, self.backbone.dims, self.backbone.tokens, self.storage.settings.largest_rank)

    @property
    def residency(self) -> Residency:
        """The adapters in memory and on the device."""
        with self._lock:
            return self._residency

    @cached_property
    def _residency(self) -> Residency:
        backbone, settings = self.backbone, self.storage.settings
        return threads.apart(
            lambda: Residency(
                backbone.fingerprint,
                backbone.dims,
                self.device,
                stack_bytes=settings.adapter_bytes,
                host_bytes=settings.adapter_host_bytes,
                rank=min(settings.adapter_rank, backbone.dims.text_width, backbone.dims.visual_width),
                dtype=backbone.dtype,
                tokens=backbone.tokens,
            )
        )

    @cached_property
    def _encoder(self) -> Backbone | Graphs:
        """What the batchers call: on a GPU the captured forward, on a CPU the backbone's own."""
        if self.device.type == "cuda":
            return Graphs(
                self.backbone, self.residency.stack, self.storage.settings.batch_texts, self.storage.settings.batch_frames
            )
        return self.backbone

    def warm(self) -> None:
        """Loads the backbone and runs it once, on a GPU in every size, so that the first query is as fast as the next."""
        with self._lock:
            encoder = self._encoder
        if isinstance(encoder, Graphs):
            encoder.warm()
        self.texts.submit((self.backbone.tokenize(["a video"]).ids[0], None)).result()

    def load_those_in_use(self) -> None:
        """Loads the backbone beside its own that collections search with; where that fails, so do their searches."""
        with self.storage.database.read() as connection:
            others = generation_rows.backbones_in_use(connection) - {self.backbone.fingerprint}
        for fingerprint in others:
            try:
                self.of(fingerprint)
            except (PolyclipError, ValueError) as error:
                log.error("backbone_not_loaded", fingerprint=fingerprint[:12], reason=str(error))

    def check(self, generation: Generation) -> None:
        """Raises OtherBackbone for a generation whose vectors another backbone made."""
        if generation.backbone != self.backbone.fingerprint:
            raise OtherBackbone(f"generation {generation.id} was made with backbone {generation.backbone[:12]}")

    def request_lease(self, generation: Generation) -> Future[Lease] | None:
        """A lease of a generation's adapter, on its way; None for the frozen backbone.

        Raises OtherBackbone; the future may hold DamagedAdapter or AdapterMismatch.
        """
        self.check(generation)
        if generation.digest is None:
            return None
        return self.residency.request(generation.digest, self.fetch(generation))

    @contextmanager
    def lease(self, generation: Generation) -> Iterator[Lease | None]:
        """The adapter of a generation for the length of the block, waited for; None for the frozen backbone."""
        future = self.request_lease(generation)
        if future is None:
            yield None
            return
        with future.result() as lease:
            yield lease

    @asynccontextmanager
    async def leased(self, generation: Generation | None, seconds: float) -> AsyncIterator[Lease | None]:
        """`lease` for an event loop, not waited for where the adapter is resident; None too where there is no generation.
        Raises TimeoutError after so many seconds.
        """
        future = None if generation is None else self.request_lease(generation)
        if future is None:
            yield None
            return
        try:
            if not future.done():
                await asyncio.wait_for(asyncio.wrap_future(future), seconds)
            yield future.result()
        finally:
            if not future.cancel():  # releases it, or withdraws what is not granted yet
                future.add_done_callback(lambda done: None if done.exception() else done.result().release())

    def prefetch(self, generation: Generation) -> None:
        """Begins to load a generation's adapter, if its backbone is in memory."""
        for each in self.resident:
            if generation.digest is not None and generation.backbone == each.backbone.fingerprint:
                each.residency.prefetch(generation.digest, each.fetch(generation))

    def residency_of(self, digest: str) -> str:
        """Where an adapter is: active, inactive, loading or offloaded."""
        states = [each.residency.states().get(digest, "offloaded") for each in self.resident]
        return next((state for state in states if state != "offloaded"), "offloaded")

    def fetch(self, generation: Generation) -> Callable[[], bytes]:
        """Reads the file of a generation's adapter. What it returns raises DamagedAdapter where there is none."""
        digest = str(generation.digest)

        def read() -> bytes:
            try:
                return self.storage.blobs.get(adapter_key(generation.collection_id, digest))
            except BlobMissing as error:
                raise DamagedAdapter(f"the file of adapter {digest[:12]} is gone") from error

        return read

    @property
    def texts(self) -> Batcher[tuple[Tensor, Lease | None], NDArray[np.float32]]:
        """Encodes token rows (context_length,) with their leased adapters, those of all tenants in one batch."""
        with self._lock:
            return self._texts

    @cached_property
    def _texts(self) -> Batcher[tuple[Tensor, Lease | None], NDArray[np.float32]]:
        encoder = self._encoder

        def encode(rows: Sequence[tuple[Tensor, Lease | None]]) -> Sequence[NDArray[np.float32]]:
            with torch.inference_mode():
                tokens = torch.stack([tokens for tokens, _ in rows])
                return list(encoder.encode_text(tokens, slots_of([lease for _, lease in rows])).cpu().numpy())

        settings = self.storage.settings
        return Batcher(
            encode, settings.batch_texts, capacity=settings.queue_texts, group_capacity=settings.queue_texts // 2, name="texts"
        )

    @property
    def frames(self) -> Batcher[tuple[NDArray[np.uint8], Lease | None], NDArray[np.float32]]:
        """Encodes segments' frames (F, 3, S, S) with their leased adapters into (F, D), batches mixing videos and tenants."""
        with self._lock:
            return self._frames

    @cached_property
    def _frames(self) -> Batcher[tuple[NDArray[np.uint8], Lease | None], NDArray[np.float32]]:
        encoder, count, most = self._encoder, 1, self.storage.settings.batch_frames
        if self.device.type == "cpu":
            count = self.storage.settings.threads or torch.get_num_threads()
            most = min(CPU_FRAMES * count, most)
        parts = threads.Parts(count)

        def encode(rows: Sequence[tuple[NDArray[np.uint8], Lease | None]]) -> Sequence[NDArray[np.float32]]:
            pixels = torch.from_numpy(np.concatenate([pixels for pixels, _ in rows]))
            leases = [lease for pixels, lease in rows for _ in pixels]

            @torch.inference_mode()
            def part(of: slice) -> NDArray[np.float32]:
                return encoder.encode_frames(pixels[of], slots_of(leases[of])).cpu().numpy()

            vectors = np.concatenate(parts.run(part, len(pixels)))
            return np.split(vectors, np.cumsum([len(pixels) for pixels, _ in rows])[:-1])

        return Batcher(encode, most, name="frames")

    def close(self) -> None:
        if self._beside is not None:
            self._beside.close()
        for name in ("_texts", "_frames", "_residency"):  # a forward pass that hangs does not keep the process
            if (part := self.__dict__.get(name)) is not None:
                part.close(CLOSE_SECONDS) if isinstance(part, Batcher) else part.close()
