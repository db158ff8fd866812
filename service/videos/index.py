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
import structlog
from numpy.typing import NDArray

from indexer.decode import DecodeError, Sampling
from indexer.frames import DamagedFrames, FrameArchive, pack_frames
from indexer.sandbox import Check
from service.adapters.encoder import Encoder
from service.alerts import alert_rows
from service.jobs import task_rows
from service.jobs.task_rows import Task
from service.settings import SHORTEST_SEGMENT
from service.storage import collection_rows, generation_rows, segment_rows
from service.storage.blobs import BlobMissing, frames_key, thumbnail_key, video_key
from service.storage.collection_rows import Collection
from service.storage.generation_rows import Generation
from service.storage.rows import NotFound
from service.storage.storage import Storage
from service.videos import video_rows
from service.videos.decoders import Decoders
from service.videos.video_rows import Video
from training.progress import Progress, Tell, unheard

log = structlog.get_logger()

SEGMENTS_AT_ONCE = 16  # pixels of a long video in memory


def index_video(
    storage: Storage, encoder: Encoder, decoders: Decoders, tenant: str, video_id: str, progress: Tell = unheard
) -> Task | None:
    """A pending video becomes `ready`, or `failed` with a reason. A video deleted meanwhile is no error.

    `progress` is told of `decoding`, then of `embedding`. Returns what `embed_video` does.
    """
    try:
        prepare_frames(storage, encoder, decoders, tenant, video_id, lambda: progress(Progress("decoding", 0, 1)))
        return embed_video(storage, encoder, decoders, tenant, video_id, progress)
    except NotFound:
        pass
    except DecodeError as error:
        fail_video(storage, tenant, video_id, error.code, error.detail)
    except BlobMissing:
        fail_video(storage, tenant, video_id, "file_missing", "the stored file is gone")
    except DamagedFrames as error:
        fail_video(storage, tenant, video_id, "frames_damaged", str(error))
    return None


def prepare_frames(
    storage: Storage, encoder: Encoder, decoders: Decoders, tenant: str, video_id: str, check: Check = lambda: None
) -> None:
    """Decodes a video in the sandbox and stores its frames, thumbnails and facts; does nothing where they are stored.

    `check` is called again and again meanwhile and may raise to stop; the deletion of the video ends the decoding too.
    Raises DecodeError, BlobMissing, or NotFound for a deleted video.
    """

    def wanted() -> None:
        check()
        with storage.database.read() as connection:
            video_rows.video(connection, tenant, video_id)

    with storage.database.write() as connection:
        video = video_rows.video(connection, tenant, video_id)
        if video.media is not None:
            return
        collection = collection_rows.lock_collection(connection, tenant, video.collection_id)
        if collection is None or not video_rows.set_video(connection, tenant, video_id, status="validating"):
            raise NotFound("video", video_id)
        task_rows.start_task(connection, tenant, video.task_id)
    media = _decode(storage, encoder, decoders, video, collection, wanted)
    with storage.database.write() as connection:
        alive = video_rows.set_video(connection, tenant, video_id, status="queued", media=media)
        task_rows.set_task(connection, tenant, video.task_id, progress=0.5, message="decoded")
    if not alive:  # deleted while it was decoded: its files were purged before these were written
        remove_files(storage, video.collection_id, video_id)
        raise NotFound("video", video_id)


def _decode(
    storage: Storage,
    encoder: Encoder,
    decoders: Decoders,
    video: Video,
    collection: Collection,
    check: Check = lambda: None,
    least: int = 0,
) -> dict[str, Any]:
    """Frames and thumbnails from the stored file into the blobs, large enough for each backbone that the collection uses;
    returns the facts. Raises DecodeError, BlobMissing.
    """
    with storage.database.read() as connection:
        backbones = {generation.backbone for generation in _wanted(connection, video)}
    side = max([least, *(encoder.of(backbone).backbone.image_size for backbone in backbones)])
    folder = Path(tempfile.mkdtemp(dir=storage.settings.scratch, prefix="decode-"))
    try:
        with storage.blobs.local(video_key(collection.id, video.id)) as path:
            decoded = decoders.decode(path, folder, sampling(storage, side, collection.settings), check)
        for ordinal, segment in enumerate(decoded.segments):
            storage.blobs.put(thumbnail_key(collection.id, video.id, ordinal), (folder / segment.thumbnail_file).read_bytes())
        storage.blobs.put(frames_key(collection.id, video.id), pack_frames(decoded, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    facts = decoded.facts
    return {
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


def decode_again(storage: Storage, encoder: Encoder, decoders: Decoders, video: Video, least: int = 0) -> None:
    """Cached frames that are damaged, gone or too small, made again from the stored file, their short side `least` pixels or
    more. Raises DamagedFrames where that is not to be.
    """
    with storage.database.write() as connection:
        collection = collection_rows.lock_collection(connection, video.tenant_id, video.collection_id)
    if collection is None:
        raise DamagedFrames("the collection is gone")
    try:
        media = _decode(storage, encoder, decoders, video, collection, least=least)
    except (DecodeError, BlobMissing) as error:
        raise DamagedFrames(f"the cached frames are damaged and cannot be made again: {error}") from error
    with storage.database.write() as connection:
        alive = video_rows.set_video(connection, video.tenant_id, video.id, media=media)
    if not alive:
        remove_files(storage, video.collection_id, video.id)


def embed_video(
    storage: Storage, encoder: Encoder, decoders: Decoders, tenant: str, video_id: str, progress: Tell = unheard
) -> Task | None:
    """Embeds a decoded video for each generation that is active or being built, then calls it ready, in one transaction
    that sees no generation without it. Returns the task that compares it with the collection's alerts, if it has any.
    """
    while True:
        with storage.database.write() as connection:
            video = video_rows.video(connection, tenant, video_id)
            collection_rows.lock_collection(connection, tenant, video.collection_id)
            missing = [
                generation
                for generation in _wanted(connection, video)
                if not segment_rows.has_vectors(connection, tenant, video_id, generation.vector_set)
            ]
            if not missing:
                video_rows.set_video(connection, tenant, video_id, status="ready", error=None)
                task_rows.end_task(connection, tenant, video.task_id, "succeeded", result={"video_id": video_id})
                return alert_rows.notice(connection, tenant, video.collection_id, video_id)
            video_rows.set_video(connection, tenant, video_id, status="indexing")
        for generation in missing:
            embed_for(storage, encoder, decoders, tenant, video, generation, progress)


def embed_for(
    storage: Storage,
    encoder: Encoder,
    decoders: Decoders,
    tenant: str,
    video: Video,
    generation: Generation,
    progress: Tell = unheard,
) -> None:
    """Vectors of a video's cached frames under a generation's adapter, stored unless the video has been deleted.

    Raises DamagedFrames.
    """
    rows = embedded_segments(storage, encoder, decoders, video, generation, progress)
    store_vectors(storage, tenant, video.collection_id, generation, [(video, rows)])


def store_vectors(
    storage: Storage,
    tenant: str,
    collection_id: str,
    generation: Generation,
    found: Sequence[tuple[Video, Sequence[Mapping[str, Any]]]],
) -> None:
    """Rows of `segments` for these videos, in one transaction; not of what has been deleted meanwhile."""
    with storage.database.write() as connection:
        if collection_rows.lock_collection(connection, tenant, collection_id) is None:
            return
        if all(g.id != generation.id for g in generation_rows.generations_of(connection, tenant, collection_id)):
            return
        alive = video_rows.videos_by_id(connection, tenant, [video.id for video, _ in found])
        for video, rows in found:
            if video.id in alive:
                segment_rows.add_segments(connection, tenant, video.id, generation.vector_set, rows)


def embedded_segments(
    storage: Storage,
    encoder: Encoder,
    decoders: Decoders,
    video: Video,
    generation: Generation,
    progress: Tell = unheard,
) -> list[dict[str, Any]]:
    """The rows of `segments` for a video, embedded by the generation's backbone from its cached frames, which are made again
    once if they cannot be read, or were cached for a backbone of smaller pictures. Raises DamagedFrames.
    """
    maker = encoder.of(generation.backbone)
    size = maker.backbone.image_size
    shown = min((video.media or {}).get(name) or 0 for name in ("width", "height"))
    try:
        return _embedded(storage, maker, video, generation, progress, min(size, shown))
    except (BlobMissing, DamagedFrames) as error:
        log.warning("frames_made_again", video=video.id, reason=str(error))
        decode_again(storage, encoder, decoders, video, size)
        return _embedded(storage, maker, video, generation, progress)


def _embedded(
    storage: Storage, encoder: Encoder, video: Video, generation: Generation, progress: Tell, least: int = 0
) -> list[dict[str, Any]]:
    archive = FrameArchive(storage.blobs.get(frames_key(video.collection_id, video.id)))
    if least and archive.short_side() < least:
        raise DamagedFrames("they are smaller than the backbone's input")
    form = encoder.backbone.form
    rows = []
    group = f"{video.tenant_id}, again" if video.status == "ready" else video.tenant_id  # an upload does not queue behind these
    with encoder.lease(generation) as lease:
        for first in range(0, len(archive.segments), SEGMENTS_AT_ONCE):
            progress(Progress("embedding", first, len(archive.segments)).within(0.5, 1))
            window = archive.segments[first : first + SEGMENTS_AT_ONCE]
            pixels = [archive.pixels(segment.frames, form) for segment in window]
            waiting = [encoder.frames.submit((frames, lease), group=group, weight=len(frames)) for frames in pixels]
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


def fail_video(storage: Storage, tenant: str, video_id: str, code: str, detail: str) -> bool:
    """Ends a video and its task with a reason; False if the video is gone."""
    error = {"code": code, "detail": detail}
    with storage.database.write() as connection:
        try:
            video = video_rows.video(connection, tenant, video_id)
        except NotFound:
            return False
        video_rows.set_video(connection, tenant, video_id, status="failed", error=error)
        task_rows.end_task(connection, tenant, video.task_id, "failed", error=error)
        return True


def restore_file(storage: Storage, video: Video, path: Path) -> bool:
    """Moves in the file of a video that has none stored (lost, or imported without it); False where there is one."""
    key = video_key(video.collection_id, video.id)
    if storage.blobs.exists(key):
        return False
    storage.blobs.put_file(key, path)
    if video.media is not None:
        media = {name: fact for name, fact in video.media.items() if name != "stored"}
        with storage.database.write() as connection:
            video_rows.set_video(connection, video.tenant_id, video.id, media=media)
    return True


def remove_files(storage: Storage, collection_id: str, video_id: str) -> None:
    """Removes the files of a deleted video; may be run again."""
    storage.blobs.delete(frames_key(collection_id, video_id))
    storage.blobs.delete_all(f"thumbnails/{collection_id}/{video_id}/")
    storage.blobs.delete(video_key(collection_id, video_id))


def _wanted(connection: Any, video: Video) -> Sequence[Generation]:
    """Generations that must hold the video, one for each vector set."""
    generations = generation_rows.generations_of(connection, video.tenant_id, video.collection_id)
    by_set: dict[str, Generation] = {}
    for generation in generations:
        if generation.state in ("active", "building"):
            owner = next((g for g in generations if g.id == generation.vector_set), generation)
            by_set[generation.vector_set] = owner  # the adapter that the vectors are made with
    return list(by_set.values())


def sampling(storage: Storage, side: int, own: Mapping[str, Any]) -> Sampling:
    """How videos are decoded for a collection with these settings of its `own`, and backbones whose pictures have `side`."""
    settings = storage.settings
    return Sampling(
        segment_seconds=max(SHORTEST_SEGMENT, float(own.get("segment_seconds") or settings.segment_seconds)),
        short_side=max(settings.cached_short_side, side),
        max_seconds=settings.max_video_seconds,
        max_segments=settings.max_segments,
    )
