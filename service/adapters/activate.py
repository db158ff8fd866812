"""The path of a generation, of an adapter or another backbone: built beside the active one, then one atomic switch.

A round is one transaction that finds the generation, or makes it, and what it lacks; with nothing lacking it switches. Between
two rounds the lacking videos are embedded, in chunks, in parallel. All that has been done is in the rows, so a build may be
broken off anywhere and goes on from there; videos that become ready meanwhile are embedded for both (`index.embed_video`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any

from indexer.frames import DamagedFrames
from service.adapters import adapter_rows, backbones
from service.adapters.backbones import BackboneChoice
from service.adapters.encoder import Encoder
from service.jobs.task_rows import Task
from service.storage import collection_rows, facts, generation_rows, segment_rows
from service.storage.blobs import BlobMissing
from service.storage.generation_rows import Generation
from service.storage.rows import NotFound
from service.storage.storage import Storage
from service.videos import index, video_rows
from service.videos.decoders import Decoders
from training.progress import Progress, Tell

CHUNK = 8  # videos that are stored in one transaction
READERS = 4  # videos of a chunk whose frames are read at once: the batcher mixes them
CHUNKS_AT_ONCE = 2  # one is written while the other is embedded

Spread = Callable[[Generation, Sequence[Sequence[str]], Tell], None]


class Superseded(RuntimeError):
    """Another activation of the collection was asked for later: that one counts."""


@dataclass(frozen=True, slots=True)
class Activation:
    """The generation that is active now, and how many videos had to be embedded for it."""

    generation: Generation
    embedded: int


def activate(
    storage: Storage,
    encoder: Encoder,
    decoders: Decoders,
    tenant: str,
    collection_id: str,
    adapter_id: str | None,
    progress: Tell,
    spread: Spread | None = None,
    asked: str | None = None,
    choice: BackboneChoice | None = None,
) -> Activation:
    """Builds what is missing and switches. Searches see the old generation, then the new one, never a mixture.

    An adapter brings the backbone that it was made for; without one, it is the frozen backbone that is in use, or `choice`.
    `spread` sees to it that `fill_chunk` runs for each of the chunks that it is given. `asked`: when this was wanted; of two
    activations at once, the one that was asked for later counts, and the other raises Superseded. Raises NotFound if
    collection or adapter is gone, TooManyBackbones, BackboneNotFound, UnsupportedBackbone. However it ends, no generation is
    left building for it; a crash leaves one, for the next start of the task to go on with, or for
    `generation_rows.retire_abandoned`.
    """
    spread = spread or partial(_spread, storage, encoder, decoders, tenant)
    embedded, backbone = 0, None
    if choice is not None:
        progress(Progress("loading the backbone", 0, 1))
        backbone = encoder.load(choice).result().backbone.fingerprint
    try:
        while True:
            generation, missing = _round(storage, tenant, collection_id, adapter_id, asked, backbone, choice)
            if not missing:
                return Activation(generation, embedded)
            before, total = embedded, embedded + len(missing)
            progress(_embedding(before, total))
            chunks = [missing[i : i + CHUNK] for i in range(0, len(missing), CHUNK)]

            def tell(part: Progress, before: int = before, total: int = total) -> None:
                progress(_embedding(before + int(part.done), total))

            spread(generation, chunks, tell)
            embedded = total
    except BaseException:
        with storage.database.write() as connection:
            for generation in generation_rows.generations_of(connection, tenant, collection_id):
                mine = generation.adapter_id == adapter_id and backbone in (None, generation.backbone)
                if mine and generation.state == "building":
                    generation_rows.set_generation_state(connection, tenant, generation.id, "retired")
        raise


def _embedding(done: int, total: int) -> Progress:
    return Progress(f"embedding the missing videos: {done} of {total}", done, total)


def activate_adapter(
    storage: Storage,
    encoder: Encoder,
    decoders: Decoders,
    tenant: str,
    task: Task,
    progress: Tell,
    spread: Spread | None = None,
) -> dict[str, Any]:
    """Activates an adapter, or a frozen backbone, as a task asks; returns its result."""
    adapter, backbone = task.request["adapter_id"], task.request.get("backbone")
    choice = None if backbone is None else BackboneChoice.of(backbone)
    collection = str(task.collection_id)
    done = activate_and_tell(
        storage, encoder, decoders, tenant, collection, adapter, progress, spread, asked=task.created_at, choice=choice
    )
    return {"adapter_id": adapter, **({} if backbone is None else {"backbone": backbone}), **done}


def activate_and_tell(
    storage: Storage,
    encoder: Encoder,
    decoders: Decoders,
    tenant: str,
    collection_id: str,
    adapter_id: str | None,
    progress: Tell,
    spread: Spread | None,
    asked: str,
    choice: BackboneChoice | None = None,
) -> dict[str, Any]:
    """`activate`: what came of it, for the task's result."""
    try:
        active = activate(storage, encoder, decoders, tenant, collection_id, adapter_id, progress, spread, asked, choice)
    except Superseded as error:
        return {"activated": False, "reason": str(error)}
    return {"activated": True, "generation_id": active.generation.id, "embedded": active.embedded}


def fill_chunk(
    storage: Storage, encoder: Encoder, decoders: Decoders, tenant: str, generation_id: str, video_ids: Sequence[str]
) -> list[str]:
    """Embeds these videos for a generation, from cached frames, and returns the ids that cannot be embedded: they fail.

    What is held already, or gone, is passed over: it may be run again.
    """
    with storage.database.read() as connection:
        try:
            generation = generation_rows.generation(connection, tenant, generation_id)
            maker = generation_rows.generation(connection, tenant, generation.vector_set)
        except NotFound:
            return []
        videos = video_rows.videos_by_id(connection, tenant, video_ids)
        lacking = [v for v in videos.values() if not segment_rows.has_vectors(connection, tenant, v.id, maker.id)]
    rows, broken = [], {}
    with ThreadPoolExecutor(READERS, thread_name_prefix="frames") as pool:
        read = index.embedded_segments
        reading = [
            (video, pool.submit(copy_context().run, read, storage, encoder, decoders, video, maker)) for video in lacking
        ]
        try:
            for video, future in reading:
                try:
                    rows.append((video, future.result()))
                except (BlobMissing, DamagedFrames) as error:
                    broken[video.id] = str(error)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    index.store_vectors(storage, tenant, generation.collection_id, maker, rows)
    return [video for video, why in broken.items() if index.fail_video(storage, tenant, video, "frames_damaged", why)]


def _round(
    storage: Storage,
    tenant: str,
    collection_id: str,
    adapter_id: str | None,
    asked: str | None,
    backbone: str | None = None,
    choice: BackboneChoice | None = None,
) -> tuple[Generation, list[str]]:
    """The generation of an adapter (None: zero-shot) and the ready videos that it lacks; with none lacking it is active now.

    A text-only adapter leaves the video tower as it is: its generation searches the vectors of the zero-shot one.
    """
    with storage.database.write() as connection:
        collection = collection_rows.lock_collection(connection, tenant, collection_id)
        if collection is None:
            raise NotFound("collection", collection_id)
        scope = None
        if adapter_id is not None:
            manifest = adapter_rows.adapter(connection, tenant, collection_id, adapter_id).manifest
            scope, backbone = manifest["scope"], manifest["backbone"]
        there = generation_rows.generations_of(connection, tenant, collection_id)
        if backbone is None:  # the one in use, or where there is none (`polyclip fsck` mends that), the data folder's own
            in_use = (g.backbone for g in there if g.id == collection.active_generation_id)
            backbone = next(in_use, None) or str(facts.fact(connection, "backbone")["fingerprint"])
        backbones.check_usable(connection, backbone)
        later = generation_rows.later_activation(connection, tenant, collection_id, asked) if asked is not None else None
        if later is not None and later[1:] != (adapter_id, None if choice is None else choice.to_json()):
            raise Superseded(f"another activation was asked for later, by {later[0]}")
        known = {g.adapter_id: g for g in there if g.backbone == backbone}

        def standing(adapter: str | None, vectors: str | None = None) -> Generation:
            if adapter in known:
                return known[adapter]
            row = generation_rows.add_generation(connection, tenant, collection_id, adapter, backbone, vectors, state="retired")
            return generation_rows.generation(connection, tenant, row["id"])

        generation = standing(adapter_id, standing(None).id if scope == "text" else None)
        missing = segment_rows.missing_vectors(connection, tenant, collection_id, generation.vector_set)
        if not missing and generation.state != "active":
            collection_rows.switch(connection, tenant, collection_id, generation.id)
        elif generation.state == "retired":
            generation_rows.set_generation_state(connection, tenant, generation.id, "building")
        return generation_rows.generation(connection, tenant, generation.id), missing


def _spread(
    storage: Storage,
    encoder: Encoder,
    decoders: Decoders,
    tenant: str,
    generation: Generation,
    chunks: Sequence[Sequence[str]],
    progress: Tell,
) -> None:
    """In this process, on a few threads."""
    done, total = 0, sum(len(chunk) for chunk in chunks)
    with ThreadPoolExecutor(CHUNKS_AT_ONCE, thread_name_prefix="chunks") as pool:
        try:
            running = {
                pool.submit(copy_context().run, fill_chunk, storage, encoder, decoders, tenant, generation.id, chunk): len(
                    chunk
                )
                for chunk in chunks
            }
            for future in as_completed(running):
                future.result()
                done += running[future]
                progress(_embedding(done, total))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
