"""The path of a video, from its bytes to its vectors: decode, cache frames, embed for every generation, ready.

Each function may be run again at any point after a crash and goes on from what is there.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from indexer.decode import DecodeError, Sampling
from indexer.frames import FrameArchive, pack_frames
from service import catalog
from service.blobs import BlobMissing, frames_key, thumbnail_key, video_key
from service.catalog import Collection, Generation, NotFound, Video
from service.runtime import Runtime

SEGMENTS_AT_ONCE = 16  # pixels of a long video in memory


def index_video(runtime: Runtime, tenant: str, video_id: str) -> None:
    """A pending video becomes `ready`, or `failed` with a reason. A video deleted meanwhile is no error."""
    try:
        prepare_frames(runtime, tenant, video_id)
        embed_video(runtime, tenant, video_id)
    except NotFound:
        return
    except DecodeError as error:
        fail_video(runtime, tenant, video_id, error.code, error.detail)
    except BlobMissing:
        fail_video(runtime, tenant, video_id, "file_missing", "the stored file is gone")


def prepare_frames(runtime: Runtime, tenant: str, video_id: str) -> None:
    """Decodes a video in the sandbox and stores its frames, thumbnails and facts; does nothing where they are stored.

    Raises DecodeError, BlobMissing, or NotFound for a deleted video.
    """
    with runtime.database.write() as connection:
        video = catalog.video(connection, tenant, video_id)
        if video.media is not None:
            return
        catalog.start_task(connection, tenant, video.task_id)
        catalog.set_video(connection, tenant, video_id, status="validating")
        collection = catalog.lock_collection(connection, tenant, video.collection_id)
    if collection is None:
        raise NotFound("collection", video.collection_id)
    folder = Path(tempfile.mkdtemp(dir=runtime.settings.scratch, prefix="decode-"))
    try:
        with runtime.blobs.local(video_key(video.collection_id, video_id)) as path:
            decoded = runtime.decoder.decode(path, folder, _sampling(runtime, collection))
        for ordinal, segment in enumerate(decoded.segments):
            thumbnail = (folder / segment.thumbnail_file).read_bytes()
            runtime.blobs.put(thumbnail_key(video.collection_id, video_id, ordinal), thumbnail)
        runtime.blobs.put(frames_key(video.collection_id, video_id), pack_frames(decoded, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    facts = decoded.facts
    media = {
        "duration": facts.duration,
        "width": facts.width,
        "height": facts.height,
        "fps": facts.fps,
        "codec": facts.codec,
        "container": facts.container,
        "frames": facts.frames,
        "decoder": facts.decoder,
        "segments": len(decoded.segments),
    }
    with runtime.database.write() as connection:
        alive = catalog.set_video(connection, tenant, video_id, status="queued", media=media)
        catalog.set_task(connection, tenant, video.task_id, progress=0.5, message="decoded")
    if not alive:  # deleted while it was decoded: its files were purged before these were written
        purge_video(runtime, video.collection_id, video_id)
        raise NotFound("video", video_id)


def embed_video(runtime: Runtime, tenant: str, video_id: str) -> None:
    """Embeds a decoded video for each generation that is active or being built, then calls it ready, in one transaction
    that sees no generation without it.
    """
    while True:
        with runtime.database.write() as connection:
            video = catalog.video(connection, tenant, video_id)
            catalog.lock_collection(connection, tenant, video.collection_id)
            missing = [
                generation
                for generation in _wanted(connection, video)
                if not catalog.has_vectors(connection, tenant, video_id, generation.vector_set)
            ]
            if not missing:
                catalog.set_video(connection, tenant, video_id, status="ready", error=None)
                catalog.end_task(connection, tenant, video.task_id, "succeeded", result={"video_id": video_id})
                return
            catalog.set_video(connection, tenant, video_id, status="indexing")
        for generation in missing:
            embed_for(runtime, tenant, video, generation)


def embed_for(runtime: Runtime, tenant: str, video: Video, generation: Generation) -> None:
    """Vectors of a video's cached frames under a generation's adapter, stored unless the video has been deleted.

    Raises BlobMissing or DamagedFrames.
    """
    rows = segment_rows(runtime, video, generation)
    with runtime.database.write() as connection:
        catalog.lock_collection(connection, tenant, video.collection_id)
        try:
            catalog.video(connection, tenant, video.id)
        except NotFound:
            return
        catalog.add_segments(connection, tenant, video.id, generation.vector_set, rows)


def segment_rows(runtime: Runtime, video: Video, generation: Generation) -> list[dict[str, Any]]:
    """The rows of `segments` for a video, embedded from its cached frames."""
    archive = FrameArchive(runtime.blobs.get(frames_key(video.collection_id, video.id)))
    size = runtime.backbone.image_size
    rows = []
    with runtime.lease(generation) as lease:
        for first in range(0, len(archive.segments), SEGMENTS_AT_ONCE):
            window = archive.segments[first : first + SEGMENTS_AT_ONCE]
            pixels = [archive.pixels(segment.frames, size) for segment in window]
            waiting = [
                runtime.frames.submit((frames, lease), group=video.tenant_id, weight=len(frames)) for frames in pixels
            ]
            for ordinal, (segment, future) in enumerate(zip(window, waiting, strict=True), start=first):
                vectors = future.result()
                rows.append(
                    {
                        "ordinal": ordinal,
                        "start": segment.start,
                        "end": segment.end,
                        "pooled": pooled(vectors).astype(np.float16).tobytes(),
                        "frames": vectors.astype(np.float16).tobytes(),
                    }
                )
    return rows


def pooled(frames: NDArray[np.float32]) -> NDArray[np.float32]:
    """(F, D) → (D,): the mean frame, normalised; the first stage's vector."""
    mean = frames.mean(axis=0)
    return mean / max(float(np.linalg.norm(mean)), 1e-12)  # type: ignore[no-any-return]


def fail_video(runtime: Runtime, tenant: str, video_id: str, code: str, detail: str) -> None:
    error = {"code": code, "detail": detail}
    with runtime.database.write() as connection:
        try:
            video = catalog.video(connection, tenant, video_id)
        except NotFound:
            return
        catalog.set_video(connection, tenant, video_id, status="failed", error=error)
        catalog.end_task(connection, tenant, video.task_id, "failed", error=error)


def purge_video(runtime: Runtime, collection_id: str, video_id: str) -> None:
    """Removes the files of a deleted video; may be run again."""
    runtime.blobs.delete(frames_key(collection_id, video_id))
    for key in runtime.blobs.keys(f"thumbnails/{collection_id}/{video_id}/"):
        runtime.blobs.delete(key)
    runtime.blobs.delete(video_key(collection_id, video_id))


def _wanted(connection: Any, video: Video) -> Sequence[Generation]:
    """Generations that must hold the video, one for each vector set."""
    generations = catalog.generations_of(connection, video.tenant_id, video.collection_id)
    by_set: dict[str, Generation] = {}
    for generation in generations:
        if generation.state in ("active", "building"):
            owner = next((g for g in generations if g.id == generation.vector_set), generation)
            by_set[generation.vector_set] = owner  # the adapter that the vectors are made with
    return list(by_set.values())


def _sampling(runtime: Runtime, collection: Collection) -> Sampling:
    own: Mapping[str, Any] = collection.settings
    settings = runtime.settings
    return Sampling(
        segment_seconds=float(own.get("segment_seconds") or settings.segment_seconds),
        short_side=max(settings.cached_short_side, runtime.backbone.image_size),
        max_seconds=settings.max_video_seconds,
    )
