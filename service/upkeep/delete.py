"""How things are removed. A request marks what is to go: it leaves every list and search in one transaction (`delete_…`).
A purge job then takes away vectors, files and rows (`purge`); it may be broken off anywhere and run again. A sweep finds what
a crash left behind: generations that nobody builds, marks without a purge, vectors without a generation, files without a row.

Whoever still works on what has been marked finds it gone at its next transaction and takes its own files away again.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

import structlog
from sqlalchemy import ColumnElement, Connection, and_, true

from service.adapters import adapter_rows
from service.alerts import alert_rows
from service.jobs import task_rows
from service.jobs.task_rows import Task
from service.search import views
from service.storage import collection_rows, facts, generation_rows, idempotency, segment_rows, tenant_rows
from service.storage.blobs import adapter_key
from service.storage.generation_rows import Generation
from service.storage.storage import Storage
from service.storage.tables import now, tasks
from service.upkeep import erase_rows
from service.videos import index, video_rows

GRACE = 3600.0  # seconds: a file comes before its row, a purge some time after its mark
SETTLED = 60.0  # seconds for which searches may still be under way on a generation that has been retired
KINDS = ("videos", "frames", "thumbnails", "adapters")  # folders of blobs, each with a folder for every collection
VIDEOS = 200  # rows erased in one transaction
VECTORS = 500
PAUSE = 0.02  # seconds between two such transactions, for the other writers

log = structlog.get_logger()


def delete_video(connection: Connection, tenant: str, collection: str, video: str) -> Task:
    """Marks, and adds the task of the purge, as all of these four do; the caller enqueues it. Raises NotFound."""
    gone = video_rows.mark_video_deleted(connection, tenant, video)
    return _purge_of(connection, tenant, collection, "video", video, tasks.c.id == gone.task_id)


def delete_adapter(connection: Connection, tenant: str, collection: str, adapter: str) -> Task:
    """Raises NotFound, AdapterInUse."""
    collection_rows.lock_collection(connection, tenant, collection)
    adapter_rows.mark_adapter_deleted(connection, tenant, collection, adapter)
    concerned = and_(tasks.c.collection_id == collection, tasks.c.request["adapter_id"].as_string() == adapter)
    return _purge_of(connection, tenant, collection, "adapter", adapter, concerned)


def delete_collection(connection: Connection, tenant: str, collection: str) -> Task:
    collection_rows.mark_collection_deleted(connection, tenant, collection)
    return _purge_of(connection, tenant, collection, "collection", collection, tasks.c.collection_id == collection)


def delete_tenant(connection: Connection, tenant: str) -> Task:
    """Its keys stop working and its name is free at once. The purge takes its own task away too: no key could look at it."""
    tenant_rows.mark_tenant_deleted(connection, tenant)
    for collection in erase_rows.all_collections(connection, tenant):
        collection_rows.mark_collection_deleted(connection, tenant, collection)
    task = _purge_of(connection, tenant, None, "tenant", tenant, true())
    tenant_rows.free_tenant_name(connection, tenant)
    return task


def _purge_of(
    connection: Connection, tenant: str, collection: str | None, what: str, name: str, concerned: ColumnElement[bool]
) -> Task:
    """The purge's task; the open tasks that it concerns are cancelled."""
    task_rows.cancel_tasks(connection, tenant, concerned)
    return task_rows.add_task(connection, tenant, collection, "purge", {"what": what, "id": name})


def purge(storage: Storage, task: Task) -> dict[str, Any]:
    """Does what a purge task asks, and sees to it that it cannot be read in the database's files either."""
    _purge(storage, task.tenant_id, task.collection_id, task.request["what"], task.request["id"])
    with storage.database.write() as connection:
        facts.set_fact(connection, "traces", True)
    with storage.database.read() as connection:
        others = task_rows.open_tasks(connection, tasks.c.kind == "purge", tasks.c.id != task.id)
    if not others:  # the last of several does it for all
        _scrub(storage, anew=task.request["what"] != "video")
    return {"what": task.request["what"], "id": task.request["id"]}


def _scrub(storage: Storage, anew: bool) -> None:
    """Writes the database anew for large purges at once, for single videos when the sweep comes: others cannot write then."""
    if storage.database.scrub(anew):
        with storage.database.write() as connection:
            facts.set_fact(connection, "traces", False)
    elif anew:
        log.warning("traces_left", hint="VACUUM the database at a quiet hour")


def _purge(storage: Storage, tenant: str, collection: str | None, what: str, name: str) -> None:
    if what == "video":
        purge_video(storage, tenant, str(collection), name)
    elif what == "adapter":
        purge_adapter(storage, tenant, str(collection), name)
    elif what == "collection":
        purge_collection(storage, tenant, name)
    else:
        purge_tenant(storage, name)
    log.info("purged", what=what, id=name)


def purge_video(storage: Storage, tenant: str, collection: str, video: str) -> None:
    """Files and rows of a deleted video; its vectors went with the mark."""
    index.remove_files(storage, collection, video)
    with storage.database.write() as connection:
        views.forget(storage, tenant, generation_rows.vector_sets(connection, tenant, collection))
        erase_rows.erase_videos(connection, tenant, [video])


def purge_adapter(storage: Storage, tenant: str, collection: str, adapter: str) -> None:
    """A deleted adapter with its generations; nothing if the same bytes have been published again meanwhile."""
    with storage.database.write() as connection:
        collection_rows.lock_collection(connection, tenant, collection)
        erased = erase_rows.erase_adapter(connection, tenant, collection, adapter)
        if erased is not None:
            storage.blobs.delete(adapter_key(collection, erased[0]))
            views.forget(storage, tenant, erased[1])
    _drop_orphaned_vectors(storage)  # after a crash at this point too, when nothing else tells whose they were


def purge_collection(storage: Storage, tenant: str, collection: str) -> None:
    """Everything of a deleted collection, its own row last."""
    with storage.database.read() as connection:
        if not erase_rows.is_marked(connection, tenant, collection):
            return
        known = generation_rows.generations_of(connection, tenant, collection)
    for generation in known:
        drop_vectors(storage, tenant, generation.id)
    erased = VIDEOS
    while erased:
        with storage.database.write() as connection:
            some = erase_rows.some_videos(connection, tenant, collection, VIDEOS)
            erased = erase_rows.erase_videos(connection, tenant, some)
        time.sleep(PAUSE)
    for kind in KINDS:
        storage.blobs.delete_all(f"{kind}/{collection}/")
    with storage.database.write() as connection:
        erase_rows.erase_collection(connection, tenant, collection)


def purge_tenant(storage: Storage, tenant: str) -> None:
    """Everything of a deleted tenant, its own row last."""
    with storage.database.write() as connection:
        theirs = erase_rows.all_collections(connection, tenant)
        for collection in theirs:  # one that was made while the tenant was deleted too
            collection_rows.mark_collection_deleted(connection, tenant, collection)
    for collection in theirs:
        purge_collection(storage, tenant, collection)
    with storage.database.write() as connection:
        erase_rows.erase_tenant(connection, tenant)


def remove_generation(storage: Storage, generation: Generation) -> bool:
    """Removes a retired generation and its vectors; False if it is in use again, or another one searches its vectors."""
    with storage.database.write() as connection:
        collection_rows.lock_collection(connection, generation.tenant_id, generation.collection_id)
        if not generation_rows.remove_generation(connection, generation.tenant_id, generation.id):
            return False
    drop_vectors(storage, generation.tenant_id, generation.id)
    return True


def retain(storage: Storage, settled: float = SETTLED) -> int:
    """Removes the retired generations that no collection's settings keep; returns their number.

    The generation without adapter of the backbone in use stays in any case: the way back to it is short, and text-only adapters
    search its vectors.
    """
    with storage.database.read() as connection:
        retired = generation_rows.retired_generations(connection)
    kept: Counter[str] = Counter()
    removed = 0
    for generation, own in retired:
        since = generation.retired_at or generation.activated_at or generation.created_at
        age = (datetime.now(UTC) - datetime.fromisoformat(since)).total_seconds()
        days = own.get("keep_generation_days", storage.settings.keep_generation_days)
        most = own.get("keep_generations", storage.settings.keep_generations)
        if age <= settled or (age <= 86400 * days and kept[generation.collection_id] < most):
            kept[generation.collection_id] += 1
        else:
            removed += remove_generation(storage, generation)
    return removed


def sweep(storage: Storage, grace: float = GRACE) -> None:
    """All that a crash may have left, and what retention lets go. For a worker, at its start and about once an hour."""
    with storage.database.write() as connection:
        idempotency.forget(connection, now(-3600 * storage.settings.idempotency_hours))
        alert_rows.forget_events(connection, now(-86400 * storage.settings.keep_task_days))
        abandoned = generation_rows.retire_abandoned(connection)
    with storage.database.read() as connection:
        forgotten = erase_rows.forgotten(connection, now(-grace))
    for what, tenant, collection, name in forgotten:
        try:
            _purge(storage, tenant, collection, what, name)
        except Exception:  # one that cannot go now does not hold up the others
            log.exception("purge_failed", what=what, id=name)
    removed = retain(storage)
    orphans = sweep_orphans(storage, grace)
    with storage.database.read() as connection:
        traces = facts.fact(connection, "traces")
    if traces or forgotten:
        _scrub(storage, anew=True)
    log.info("swept", abandoned=abandoned, forgotten=len(forgotten), generations=removed, **orphans)


def sweep_orphans(storage: Storage, grace: float = GRACE) -> dict[str, int]:
    """Vectors without a generation, files without a row, scratch of trainings that have ended; how many of each there were.

    No file younger than `grace` seconds is touched.
    """
    with storage.database.read() as connection:
        training = {f"train-{task.id}" for task in task_rows.open_tasks(connection)}
    sets = _drop_orphaned_vectors(storage)
    left = [path for path in storage.settings.scratch.glob("train-*") if path.name not in training]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    storage.blobs.sweep_scratch()
    files = 0
    for key in orphans(storage, grace):
        storage.blobs.delete(key)
        files += 1
    for kind in KINDS:
        folders = storage.blobs.folders(f"{kind}/")
        with storage.database.read() as connection:
            unknown = set(folders) - erase_rows.known_collections(connection, folders)
        for folder in unknown:  # what a job left that ended after its collection's purge
            if not storage.blobs.keys(f"{kind}/{folder}/"):
                storage.blobs.delete_all(f"{kind}/{folder}/")
    return {"vector_sets": sets, "files": files, "scratch": len(left)}


def orphans(storage: Storage, grace: float = GRACE) -> Iterator[str]:
    """Keys of files, `grace` seconds old at least, that belong to no row and, of archives that came in, to no open task."""
    for kind in KINDS:
        for keys in storage.blobs.older(f"{kind}/", grace):
            yield from _unknown(storage, kind, keys)
    for keys in storage.blobs.older("imports/", grace):
        with storage.database.read() as connection:
            wanted = {task.request.get("archive") for task in task_rows.open_tasks(connection)}
        yield from set(keys) - wanted


def _unknown(storage: Storage, kind: str, keys: Iterable[str]) -> list[str]:
    """Those of these keys whose owner has no row; keys that are none of ours are left alone."""
    parts = {key: key.split("/") for key in keys}
    owners = {key: (p[1], p[2].split(".")[0]) for key, p in parts.items() if len(p) > 2}
    with storage.database.read() as connection:
        if kind == "adapters":
            adapters = erase_rows.known_adapters(connection, owners.values())
            return [key for key, owner in owners.items() if owner not in adapters]
        videos = erase_rows.known_videos(connection, [video for _, video in owners.values()])
        return [key for key, (_, video) in owners.items() if video not in videos]


def _drop_orphaned_vectors(storage: Storage) -> int:
    with storage.database.read() as connection:
        sets = erase_rows.orphaned_vector_sets(connection)
    for vector_set in sets:
        drop_vectors(storage, None, vector_set)
    return len(sets)


def drop_vectors(storage: Storage, tenant: str | None, vector_set: str) -> None:
    """In parts, so that the database's write lock is never held for long."""
    if tenant is not None:
        views.forget(storage, tenant, [vector_set])
    dropped = VECTORS
    while dropped == VECTORS:
        with storage.database.write() as connection:
            dropped = segment_rows.drop_vectors(connection, tenant, vector_set, VECTORS)
        time.sleep(PAUSE)
