"""`polyclip fsck`: rows against blobs and vectors, and what of it can be repaired.

It may run beside the service: what it finds wrong it looks at twice, and it repairs under the same locks as everything else, so
that it may be stopped and run again. A finding is repaired before the next thing is looked at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from sqlalchemy.exc import DatabaseError, OperationalError

from adapters_store import DamagedAdapter, InvalidAdapter
from indexer.decode import DecodeError
from indexer.frames import DamagedFrames
from service.adapters import activate, adapter_rows
from service.adapters.adapter_rows import AdapterVersion
from service.adapters.encoder import Encoder
from service.storage import collection_rows, generation_rows, tenant_rows
from service.storage.blobs import BlobMissing, adapter_key
from service.storage.collection_rows import Collection
from service.storage.rows import ALL, NotFound
from service.storage.storage import Storage
from service.upkeep import archive_rows, check_rows, delete, erase_rows
from service.upkeep.fsck_videos import Finding, Tools, video_findings
from service.videos.decoders import Decoders
from training.progress import unheard

PAGE = 200  # videos whose rows are read at once
UNREPAIRABLE = (BlobMissing, DamagedFrames, DecodeError, NotFound, InvalidAdapter, DamagedAdapter)


class Fsck:
    """One check of a data folder; `counts` tells what has been looked at."""

    def __init__(
        self,
        storage: Storage,
        encoder: Encoder,
        decoders: Decoders,
        deep: bool = False,
        tell: Callable[[str], None] = lambda note: None,
    ) -> None:
        """`deep`: every stored file against its sha256 too. `tell` is told what is being looked at."""
        self._storage, self._tools, self._tell = storage, Tools(storage, encoder, decoders, deep), tell
        self.counts = {"collections": 0, "videos": 0, "adapters": 0}

    def run(self, tenant: str | None = None, collection: str | None = None, repair: bool = False) -> Iterator[Finding]:
        """Everything, or a tenant's collections, or one of them. With `repair`, each finding tells its outcome."""
        for finding in self._findings(tenant, collection):
            if not repair or finding.mend is None:
                yield finding
                continue
            try:
                finding.mend()
                yield replace(finding, outcome="repaired")
            except UNREPAIRABLE as error:
                yield replace(finding, outcome=f"not repaired: {error}")

    def _findings(self, tenant: str | None, collection: str | None) -> Iterator[Finding]:
        if tenant is None:
            if broken := _damaged(self._storage):
                yield from broken
                return  # nothing else that the database says can be trusted
            for check in (_stray_vectors, _vectors_without_generation, _rows_without_video):
                yield from check(self._storage)
        with self._storage.database.read() as connection:
            if tenant is None:
                owners = tenant_rows.list_tenants(connection, ALL, None).rows
            else:
                owners = [tenant_rows.tenant_named(connection, tenant)]
            if tenant and collection:
                collection_rows.collection_named(connection, owners[0].id, collection)
        checked: set[str] = set()
        for owner in owners:
            with self._storage.database.read() as connection:
                theirs = collection_rows.list_collections(connection, owner.id, ALL, None).rows
            for found in theirs:
                if collection is None or found.name == collection:
                    checked.add(found.id)
                    yield from self._collection(f"{owner.name}/{found.name}", found)
        for key in delete.orphans(self._storage):
            if tenant is None or key.split("/")[1] in checked:
                yield Finding("blob_of_nothing", f"blob {key}", "belongs to no row", partial(self._storage.blobs.delete, key))

    def _collection(self, name: str, collection: Collection) -> Iterator[Finding]:
        self.counts["collections"] += 1
        self._tell(name)
        yield from _confirmed(lambda: _active_generation(self._tools, name, collection))
        with self._storage.database.read() as connection:
            versions = adapter_rows.adapters_of(connection, collection.tenant_id, collection.id)
        for version in versions:
            self.counts["adapters"] += 1
            yield from _confirmed(partial(_adapter_file, self._storage, version))
        after = ""
        while True:
            with self._storage.database.read() as connection:
                page = archive_rows.videos_after(connection, collection.tenant_id, collection.id, after, PAGE)
            if not page:
                return
            for video in page:
                self.counts["videos"] += 1
                self._tell(f"{name}, {self.counts['videos']} videos")
                yield from _confirmed(partial(video_findings, self._tools, video))
            after = page[-1].id


def _confirmed(look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What is found twice: what is being changed just now looks different the second time."""
    first = list(look())
    return [finding for finding in look() if finding in first] if first else []


# --- the database


def _damaged(storage: Storage) -> list[Finding]:
    try:
        with storage.database.read() as connection:
            broken = check_rows.damage(connection)
    except DatabaseError as error:
        if isinstance(error, OperationalError):  # locked, or not there
            raise
        broken = [str(error.orig)]
    return [Finding("database_damaged", "database", f"{line}: restore it from a backup") for line in broken]


def _stray_vectors(storage: Storage) -> Iterator[Finding]:
    with storage.database.read() as connection:
        strays = check_rows.stray_vectors(connection)
    for owner, where, vector_set, video in strays:
        detail = f"generation {vector_set} holds vectors of it, and it is not there"
        mend = partial(_write, storage, check_rows.replace_vectors, owner, where, vector_set, video, ())
        yield Finding("vectors_of_nothing", f"video {video}", detail, mend)


def _vectors_without_generation(storage: Storage) -> Iterator[Finding]:
    with storage.database.read() as connection:
        sets = erase_rows.orphaned_vector_sets(connection)
    for vector_set in sets:
        mend = partial(delete.drop_vectors, storage, None, vector_set)
        yield Finding("vectors_of_nothing", f"generation {vector_set}", "has vectors and no row", mend)


def _rows_without_video(storage: Storage) -> Iterator[Finding]:
    for what in check_rows.OF_VIDEOS:
        with storage.database.read() as connection:
            lost = check_rows.rows_of_nothing(connection, what)
        for video in lost:
            mend = partial(_write, storage, check_rows.drop_rows_of_nothing, what, video)
            yield Finding(f"{what}_of_nothing", f"video {video}", f"has {what} and no row", mend)


def _write(storage: Storage, change: Callable[..., None], *values: Any) -> None:
    with storage.database.write() as connection:
        change(connection, *values)


# --- collections and adapters


def _active_generation(tools: Tools, name: str, collection: Collection) -> Iterator[Finding]:
    with tools.storage.database.read() as connection:
        known = generation_rows.generations_of(connection, collection.tenant_id, collection.id)
        now = {c.id: c for c in collection_rows.list_collections(connection, collection.tenant_id, ALL, None).rows}
    active = [g.id for g in known if g.state == "active"]
    if collection.id in now and active != [pointer := now[collection.id].active_generation_id]:
        detail = f"its searches use generation {pointer}, active are {', '.join(active) or 'none'}"
        yield Finding("active_generation_wrong", f"collection {name}", detail, partial(_choose_generation, tools, collection))


def _choose_generation(tools: Tools, collection: Collection) -> None:
    """The one that searches use, if it is there, or else the one that was active last, or else the frozen backbone's."""
    tenant = collection.tenant_id
    with tools.storage.database.write() as connection:
        if (now := collection_rows.lock_collection(connection, tenant, collection.id)) is None:
            return
        known = generation_rows.generations_of(connection, tenant, collection.id)
        if known:
            best = max(known, key=lambda g: (g.id == now.active_generation_id, g.state == "active", g.activated_at or ""))
            collection_rows.switch(connection, tenant, collection.id, best.id)
            return
    activate.activate(tools.storage, tools.encoder, tools.decoders, tenant, collection.id, None, unheard)


def _adapter_file(storage: Storage, version: AdapterVersion) -> Iterator[Finding]:
    key = adapter_key(version.collection_id, version.digest)
    try:
        if _sha256(storage.blobs.get(key)) == version.digest:
            return
        code, detail = "adapter_damaged", "its file has other bytes than were published"
    except BlobMissing:
        code, detail = "adapter_missing", "its file is gone"
    with storage.database.read() as connection:
        copies = [adapter_key(each, version.digest) for each in check_rows.copies_of_adapter(connection, version.digest)]
    for copy in copies:
        try:
            data = storage.blobs.get(copy)
        except BlobMissing:
            continue
        if _sha256(data) == version.digest:
            yield Finding(code, f"adapter {version.id}", detail, partial(storage.blobs.put, key, data))
            return
    hint = "import the same file once more (polyclip adapters import), or activate another version, or none"
    yield Finding(code, f"adapter {version.id}", f"{detail}: {hint}")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
