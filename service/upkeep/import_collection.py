"""A collection comes in from an archive (`service.upkeep.archive`) under new ids: the whole archive is checked first, then
everything is stored out of sight (`archive_rows`), then one transaction makes it visible.

Nothing in the archive is trusted: JSON is checked field by field, adapters and videos pass the checks of their own kind.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from pathlib import Path
from tarfile import TarInfo
from typing import Any

from sqlalchemy import Connection

import adapters_store
from service.adapters import adapter_rows, backbones
from service.adapters.encoder import Encoder
from service.adapters.publish import check_adapter
from service.errors import PolyclipError
from service.jobs.task_rows import Task
from service.settings import settings_json
from service.storage import collection_rows, facts, generation_rows, tenant_rows
from service.storage.blobs import adapter_key
from service.storage.rows import NotFound
from service.storage.storage import Storage
from service.storage.tables import new_id
from service.storage.tenant_rows import Tenant
from service.upkeep import archive_rows, delete
from service.upkeep.archive import FIRST, Archive, InvalidArchive
from service.upkeep.archive_json import Adapter, AdapterManifest, Generation, Manifest
from service.upkeep.import_videos import Arrival
from service.videos.decoders import Decoders
from service.videos.video_rows import Video
from training.progress import Progress, Tell, unheard

VERIFYING = 0.3  # share of an import's progress


class ArchiveOfOtherBackbone(PolyclipError):
    """The archive's vectors and adapters were made with another backbone than the one at hand."""

    code, status, hint = "archive_of_other_backbone", 409, "serve the archive's backbone, or import with `re_embed`"


@dataclass(frozen=True, slots=True)
class Imported:
    """A collection that has arrived; `queued` videos have yet to be indexed, adapters `left_out` are for another backbone."""

    collection_id: str
    name: str
    videos: int
    queued: list[Video]
    adapters: int
    left_out: list[str]

    def to_json(self) -> dict[str, Any]:
        numbers = {"videos": self.videos, "queued": len(self.queued), "adapters": self.adapters}
        return {"collection_id": self.collection_id, "collection": self.name, **numbers, "adapters_left_out": self.left_out}


@dataclass(frozen=True, slots=True)
class _Plan:
    """What an import will make; `needs` counts against the quotas, digests of adapters `left_out` are for another backbone."""

    name: str
    settings: Mapping[str, Any]
    needs: Mapping[str, int]
    adapters: Sequence[Adapter]
    generations: Sequence[Generation]
    left_out: list[str]


def import_archive(
    storage: Storage,
    encoder: Encoder,
    decoders: Decoders,
    tenant: Tenant,
    path: Path,
    *,
    name: str | None = None,
    re_embed: bool = False,
    collection: str | None = None,
    progress: Tell = unheard,
) -> Imported:
    """The archive as a new collection of the tenant: all of it or nothing.

    An archive of another backbone is refused, unless `re_embed`: its frames are then embedded anew, its adapters left out.
    `collection`: the id that it gets; what an import that died has left of it goes first. Raises InvalidArchive,
    ArchiveOfOtherBackbone, AlreadyExists, InvalidName, QuotaExceeded.
    """
    collection = collection or new_id("col")
    ids: defaultdict[str, str] = defaultdict(lambda: new_id("vid"))  # the new ones, by the archive's
    _ = encoder.backbone  # the data folder has one from now on
    with Archive(path) as archive:
        with storage.database.read() as connection:
            own = _backbone_for(connection, archive.manifest())
        encoder = encoder.of(own["fingerprint"])
        plan = _planned(archive.manifest(), own, name, re_embed)
        told = archive.verify(lambda part: progress(part.within(0, VERIFYING))).videos
        delete.purge_collection(storage, tenant.id, collection)
        try:
            with storage.database.write() as connection:
                _check_room(connection, tenant, plan)
                archive_rows.add_hidden_collection(connection, tenant, collection, plan.name, plan.settings)
            adapters = _take_adapters(storage, encoder, archive, plan.adapters, tenant.id, collection, ids)
            made = _add_generations(storage, plan.generations, adapters, tenant.id, collection, own["fingerprint"])
            sets = {each.id: made[each.id] for each in plan.generations if each.id == each.vector_set}
            active = next(each for each in plan.generations if each.active)
            arrival = Arrival(
                storage, encoder, decoders, archive, tenant.id, collection, plan.settings, sets, active.vector_set
            )
            sizes: dict[str, int] = {}  # of the files, by the archive's ids
            for folder, members in groupby(archive.members(), key=_folder):
                if folder is not None:
                    parts = {member.name.split("/", 2)[2]: member for member in members}
                    if folder in sizes:
                        raise InvalidArchive(f"videos/{folder} is there twice")
                    try:
                        sizes[folder] = arrival.take(ids[folder], parts)
                    except InvalidArchive as error:
                        raise InvalidArchive(f"videos/{folder}: {error}") from error
                    at = max(member.offset_data for member in parts.values())
                    progress(Progress(f"{len(sizes)} of {told} videos", at, archive.size).within(VERIFYING, 1))
            if told != len(sizes):
                raise InvalidArchive(f"the archive holds {len(sizes)} videos, its contents say {told}")
            with storage.database.write() as connection:
                queued = archive_rows.reveal(connection, tenant, collection, made[active.id], len(sizes), sum(sizes.values()))
            return Imported(collection, plan.name, len(sizes), queued, len(plan.adapters), plan.left_out)
        except BaseException:
            delete.purge_collection(storage, tenant.id, collection)
            raise


def look(storage: Storage, tenant: Tenant, path: Path, name: str | None, re_embed: bool) -> str:
    """The name that an import would give the collection. Raises what the archive's beginning is enough to refuse it for."""
    with Archive(path) as archive, storage.database.read() as connection:
        plan = _planned(archive.manifest(), _backbone_for(connection, archive.manifest()), name, re_embed)
        _check_room(connection, tenant, plan)
        return plan.name


def import_for_task(
    storage: Storage, encoder: Encoder, decoders: Decoders, task: Task, progress: Tell, start: Callable[[Video], None]
) -> dict[str, Any]:
    """The job of an import over HTTP; it may be run again after a crash. `start`: for videos that have yet to be indexed.

    Raises what `import_archive` does.
    """
    collection = _collection_of(task)
    with storage.database.read() as connection:
        tenant = tenant_rows.tenant_named(connection, task.request["tenant"])
        try:
            name = collection_rows.collection_name(connection, tenant.id, collection)
            return {"collection_id": collection, "collection": name}  # a crash came after the last step
        except NotFound:
            pass
    with storage.blobs.local(task.request["archive"]) as path:
        wish = {"name": task.request["collection"], "re_embed": task.request["re_embed"]}
        done = import_archive(storage, encoder, decoders, tenant, path, collection=collection, progress=progress, **wish)
    for video in done.queued:
        start(video)
    return done.to_json()


def discard(storage: Storage, task: Task) -> None:
    """Removes what an import that has ended needs no more: the stored archive, and whatever it has left out of sight."""
    storage.blobs.delete(task.request["archive"])
    delete.purge_collection(storage, task.tenant_id, _collection_of(task))


def _collection_of(task: Task) -> str:
    """The id of the collection that an import's task makes: the same at each of its starts."""
    return f"col_{task.id.removeprefix('task_')}"


def _backbone_for(connection: Connection, manifest: Manifest) -> dict[str, Any]:
    """The backbone that an archived collection will be on: the one it was made with, if it can be used here, or our own."""
    own, theirs = facts.fact(connection, "backbone"), manifest.backbone.fingerprint
    if backbones.known(connection, theirs) is not None and backbones.usable(connection, theirs):
        return backbones.described(connection, theirs)
    return own  # type: ignore[no-any-return]


def _planned(manifest: Manifest, own: Mapping[str, Any], name: str | None, re_embed: bool) -> _Plan:
    """Raises ArchiveOfOtherBackbone."""
    fingerprint = own["fingerprint"]
    theirs, adapters, generations, left_out = manifest.backbone, manifest.adapters, manifest.generations, []
    if theirs.fingerprint != fingerprint:
        if not re_embed:
            raise ArchiveOfOtherBackbone(
                f"the archive was made with backbone {theirs.name!r:.80} ({theirs.fingerprint:.12}), this one is {own['name']} "
                f"({fingerprint[:12]}): its frames can be embedded anew, its adapters cannot come along"
            )
        left_out, adapters = [each.digest for each in adapters], []
        generations = [Generation(id="", adapter=None, vector_set="", active=True)]  # no archive has vectors of this name
    needs = {"collections": 1, "videos": manifest.videos, "bytes": manifest.bytes}
    settings = settings_json(manifest.collection.settings)
    return _Plan(name or manifest.collection.name, settings, needs, adapters, generations, left_out)


def _check_room(connection: Connection, tenant: Tenant, plan: _Plan) -> None:
    """Raises QuotaExceeded, AlreadyExists, InvalidName."""
    tenant_rows.check_quota(connection, tenant, **plan.needs)
    archive_rows.check_name_free(connection, tenant.id, plan.name)


def _take_adapters(
    storage: Storage,
    encoder: Encoder,
    archive: Archive,
    adapters: Sequence[Adapter],
    tenant: str,
    collection: str,
    ids: Mapping[str, str],
) -> dict[str | None, tuple[str | None, str]]:
    """Files and rows; (new id, scope) by digest. The videos that a manifest names get their new ids."""
    parts = {member.name: member for member in takewhile(lambda member: _folder(member) is None, archive.members())}
    made: dict[str | None, tuple[str | None, str]] = {None: (None, "")}
    for each in adapters:
        try:
            data = archive.read(parts[f"adapters/{each.digest}.safetensors"], adapters_store.artifact.MAX_BYTES)
            told = archive.json(parts[f"adapters/{each.digest}.json"], AdapterManifest)
            check_adapter(storage, encoder, data)
            if held_out := told.data.get("validation_videos"):
                told.data["validation_videos"] = sorted(ids[str(video)] for video in held_out)
            manifest = adapters_store.describe(data, **told.model_dump())
            if manifest.digest != each.digest:
                raise InvalidArchive("its tensors are those of another one")
        except (KeyError, ValueError) as error:
            raise InvalidArchive(f"adapter {each.digest:.12}: {' '.join(str(error).split())}"[:300]) from error
        storage.blobs.put(adapter_key(collection, each.digest), data)
        with storage.database.write() as connection:
            row = adapter_rows.add_adapter(connection, tenant, collection, manifest.to_json(), each.version, each.created_at)
        made[each.digest] = row.id, manifest.scope
    return made


def _add_generations(
    storage: Storage,
    generations: Sequence[Generation],
    adapters: Mapping[str | None, tuple[str | None, str]],
    tenant: str,
    collection: str,
    backbone: str,
) -> dict[str, str]:
    """The new ids by the archive's."""
    made: dict[str, str] = {}
    with storage.database.write() as connection:
        for each in sorted(generations, key=lambda each: each.vector_set != each.id):  # first those that others search
            adapter, scope = adapters[each.adapter]
            if each.vector_set != each.id and scope != "text":
                raise InvalidArchive(f"{FIRST}: an adapter of the vision tower has no vectors of its own")
            state, shared = "active" if each.active else "retired", made.get(each.vector_set)
            row = generation_rows.add_generation(connection, tenant, collection, adapter, backbone, shared, state)
            if not each.active:
                generation_rows.set_generation_state(connection, tenant, row["id"], "retired")
            made[each.id] = row["id"]
    return made


def _folder(member: TarInfo) -> str | None:
    """The video that a member belongs to, by the archive's id."""
    return member.name.split("/")[1] if member.name.startswith("videos/") else None
