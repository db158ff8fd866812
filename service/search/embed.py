"""Texts and pictures as the vectors that searches compare, for other programs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from anyio import CapacityLimiter, to_thread
from numpy.typing import NDArray

from adapters_store import Lease
from backbone import Form, Tokens, to_pixels
from indexer.pictures import InvalidImage
from service.adapters.encoder import Encoder
from service.search.pictures import DATA_URL, Pictures, data_of
from service.search.question import EmptyText
from service.search.text_cache import TextCache, TextKey, TextVector, text_key
from service.storage import collection_rows
from service.storage.generation_rows import Generation
from service.storage.storage import Storage

BACKBONE = "backbone"  # the model's name that is no collection's
COLLECTION = "collection:"  # may stand before a collection's name: for one that is named `backbone`


@dataclass(frozen=True, slots=True)
class Embedded:
    """`vectors` (N, D) float32 of length 1, in the order of the inputs; `tokens` of all texts together; `truncated`: the
    places of texts that were longer than the backbone reads."""

    vectors: NDArray[np.float32]
    tokens: int
    truncated: tuple[int, ...]
    encoder: Encoder


async def embed(
    storage: Storage,
    own: Encoder,
    cache: TextCache,
    pictures: Pictures,
    reading: CapacityLimiter,
    tenant: str,
    model: str,
    inputs: Sequence[str],
) -> Embedded:
    """Encodes texts, and pictures as data URLs, as searches in a collection do: by the backbone and the adapter of its active
    generation, or for the model `backbone` by the data folder's own, frozen. A picture is encoded as a frame is.

    `cache`: that of the searches' texts; `reading` bounds the threads that wait for `pictures`. Raises NotFound, EmptyText,
    InvalidImage, and what the batchers and residency raise.
    """
    seconds = storage.settings.search_seconds
    generation = None if model == BACKBONE else await to_thread.run_sync(_active, storage, tenant, model)
    encoder = own
    if generation is not None:
        loading = asyncio.wrap_future(own.request_encoder(generation.backbone))
        encoder = await asyncio.wait_for(asyncio.shield(loading), seconds)
    name = (generation and generation.digest) or encoder.backbone.fingerprint
    urls = {i: each for i, each in enumerate(inputs) if each.startswith(DATA_URL)}
    keys = {i: text_key(tenant, name, each) for i, each in enumerate(inputs) if i not in urls}
    if empty := [i for i, key in keys.items() if not key.text]:
        raise EmptyText(f"input {empty[0]} is empty")
    tokens, count = await to_thread.run_sync(_tokens, encoder, list(keys.values()))
    pixels = {}
    for i, url in urls.items():
        pixels[i] = await to_thread.run_sync(_pixels, pictures, i, url, encoder.backbone.form, limiter=reading)
    deadline = time.monotonic() + seconds

    async def text(key: TextKey, place: int, lease: Lease | None) -> NDArray[np.float32]:
        async def compute() -> TextVector:
            row = (tokens.ids[place], lease)
            return TextVector(await encoder.texts.run(row, group=tenant, deadline=deadline), tokens.truncated[place])

        found: TextVector = await cache.get_or_run(key, compute)
        return found.vector

    async def picture(frame: NDArray[np.uint8], lease: Lease | None) -> NDArray[np.float32]:
        vectors: NDArray[np.float32] = await encoder.frames.run((frame[None], lease), group=tenant, deadline=deadline)
        return np.asarray(vectors[0])

    try:
        async with encoder.leased(generation, seconds) as lease, asyncio.TaskGroup() as group:
            running = {i: group.create_task(text(key, place, lease)) for place, (i, key) in enumerate(keys.items())}
            running |= {i: group.create_task(picture(frame, lease)) for i, frame in pixels.items()}
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    vectors = np.stack([running[i].result() for i in range(len(inputs))])
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    cut = tuple(i for place, i in enumerate(keys) if tokens.truncated[place])
    return Embedded(vectors / np.maximum(lengths, 1e-12), count, cut, encoder)


def _active(storage: Storage, tenant: str, model: str) -> Generation:
    with storage.database.read() as connection:
        return collection_rows.active_generation(connection, tenant, model.removeprefix(COLLECTION))[1]


def _tokens(encoder: Encoder, keys: Sequence[TextKey]) -> tuple[Tokens, int]:
    """With how many there are, start and end included."""
    tokens = encoder.backbone.tokenize([key.text for key in keys])
    return tokens, int(encoder.backbone.lengths(tokens.ids).sum()) if keys else 0


def _pixels(pictures: Pictures, place: int, url: str, form: Form) -> NDArray[np.uint8]:
    try:
        return to_pixels(pictures.read(data_of(url)), form)
    except InvalidImage as error:
        raise InvalidImage(f"input {place}: {error}") from error
