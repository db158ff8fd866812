"""A new version of a collection's adapter: checked, tried, stored."""

from __future__ import annotations

import numpy as np

import adapters_store
from service.adapters import adapter_rows, backbones
from service.adapters.adapter_rows import AdapterVersion
from service.adapters.encoder import Encoder
from service.storage import collection_rows, generation_rows
from service.storage.blobs import adapter_key
from service.storage.rows import NotFound
from service.storage.storage import Storage


def publish(
    storage: Storage, encoder: Encoder, tenant: str, collection_id: str, data: bytes, manifest: adapters_store.Manifest
) -> AdapterVersion:
    """Stores an adapter as the collection's next version. It is for the backbone that the collection is on, or was when the
    adapter was trained. Raises as `check_adapter` does.
    """
    with storage.database.read() as connection:
        known = {g.backbone for g in generation_rows.generations_of(connection, tenant, collection_id)}
        backbone = generation_rows.active_of(connection, tenant, collection_id).backbone
        if manifest.backbone in known and backbones.usable(connection, manifest.backbone):
            backbone = manifest.backbone
    check_adapter(storage, encoder.of(backbone), data)
    with storage.database.write() as connection:
        if collection_rows.lock_collection(connection, tenant, collection_id) is None:
            raise NotFound("collection", collection_id)
        storage.blobs.put(adapter_key(collection_id, manifest.digest), data)  # under the lock: a purge of the same bytes waits
        return adapter_rows.add_adapter(connection, tenant, collection_id, manifest.to_json())


def check_adapter(storage: Storage, encoder: Encoder, data: bytes) -> adapters_store.Artifact:
    """An adapter file that may be published: for this backbone, of a rank that is taken, with answers that are finite.

    It is tried on a text and a frame the way that searches use it, in the device's precision. Raises InvalidAdapter,
    AdapterMismatch, LeaseTimeout.
    """
    artifact = adapters_store.unpack(data, encoder.fit)
    backbone, seconds = encoder.backbone, storage.settings.search_seconds
    side = backbone.image_size
    frame = (np.arange(3 * side * side, dtype=np.int64) % 251).astype(np.uint8).reshape(1, 3, side, side)
    with encoder.residency.lease(artifact.digest, lambda: data, seconds) as lease:
        tried = [
            encoder.texts.submit((backbone.tokenize(["a video"]).ids[0], lease)).result(seconds),
            encoder.frames.submit((frame, lease)).result(seconds),
        ]
    if not all(np.isfinite(vectors).all() for vectors in tried):
        raise adapters_store.InvalidAdapter("the adapter's weights are too large: its answers are not finite numbers")
    return artifact
