"""The path of an adapter's generation: built beside the active one while searches go on, then one atomic switch."""

from __future__ import annotations

from collections.abc import Callable

from indexer.frames import DamagedFrames
from service import catalog, ingest
from service.blobs import BlobMissing
from service.catalog import Generation, NotFound
from service.runtime import Runtime

CHUNK = 16  # videos between two looks at the progress and the wish to cancel


def prepare_generation(runtime: Runtime, tenant: str, collection_id: str, adapter_id: str | None) -> Generation:
    """The generation of an adapter (None: zero-shot), in state building, or one that still stands.

    A text-only adapter searches the video vectors of the zero-shot generation: its own video tower is the frozen one.
    """
    backbone = runtime.backbone.fingerprint
    with runtime.database.write() as connection:
        if catalog.lock_collection(connection, tenant, collection_id) is None:
            raise NotFound("collection", collection_id)
        known = catalog.generations_of(connection, tenant, collection_id)
        for generation in known:
            if generation.adapter_id == adapter_id and generation.backbone == backbone:
                if generation.state == "retired":
                    catalog.set_generation_state(connection, tenant, generation.id, "building")
                return catalog.generation(connection, tenant, generation.id)
        shares = None
        if adapter_id is not None:
            version = catalog.adapter(connection, tenant, collection_id, adapter_id)
            if version.manifest["scope"] == "text":
                shares = next((g.vector_set for g in known if g.adapter_id is None and g.backbone == backbone), None)
        row = catalog.add_generation(connection, tenant, collection_id, adapter_id, backbone, shares, state="building")
        return catalog.generation(connection, tenant, row["id"])


def fill(runtime: Runtime, tenant: str, generation: Generation, progress: Callable[[int, int], None]) -> list[str]:
    """Embeds every ready video that the generation lacks, from cached frames; returns the ids that cannot be embedded.

    `progress(done, total)` is called after each chunk and may raise to stop; what has been embedded stays.
    """
    with runtime.database.read() as connection:
        vectors = generation.vector_set
        maker = generation if vectors == generation.id else catalog.generation(connection, tenant, vectors)
        missing = catalog.missing_vectors(connection, tenant, generation.collection_id, vectors)
    damaged = []
    for first in range(0, len(missing), CHUNK):
        progress(first, len(missing))
        for video in missing[first : first + CHUNK]:
            try:
                ingest.embed_for(runtime, tenant, video, maker)
            except (BlobMissing, DamagedFrames) as error:
                damaged.append(video.id)
                ingest.fail_video(runtime, tenant, video.id, "frames_damaged", str(error))
    progress(len(missing), len(missing))
    return damaged


def activate(
    runtime: Runtime, tenant: str, collection_id: str, adapter_id: str | None, progress: Callable[[int, int], None]
) -> Generation:
    """Builds what is missing and switches. Searches see the old generation, then the new one, never a mixture.

    Videos that become ready meanwhile are embedded for both (`ingest.embed_video`); the switch happens in a transaction
    that finds none missing. Raises NotFound if collection or adapter is gone.
    """
    generation = prepare_generation(runtime, tenant, collection_id, adapter_id)
    if generation.state == "active":
        return generation
    try:
        while True:
            fill(runtime, tenant, generation, progress)
            with runtime.database.write() as connection:
                if catalog.lock_collection(connection, tenant, collection_id) is None:
                    raise NotFound("collection", collection_id)
                if not catalog.missing_vectors(connection, tenant, collection_id, generation.vector_set):
                    catalog.switch(connection, tenant, collection_id, generation.id)
                    return catalog.generation(connection, tenant, generation.id)
    except BaseException:
        with runtime.database.write() as connection:
            if catalog.generation(connection, tenant, generation.id).state == "building":
                catalog.set_generation_state(connection, tenant, generation.id, "retired")
        raise
