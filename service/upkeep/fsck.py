"""`polyclip fsck`: rows against blobs and vectors, and what of it can be mended.

It may run beside the service: what it finds wrong it looks at twice, and it mends under the same locks as everything else, so
that it may be broken off and run again. A finding is mended before the next thing is looked at.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy.exc import DatabaseError, OperationalError

from adapters_store import DamagedAdapter, InvalidAdapter
from indexer.decode import DecodeError, MediaFacts
from indexer.frames import DamagedFrames, FrameArchive
from service.adapters import activate
from service.adapters.adapter_rows import AdapterVersion
from service.adapters.encoder import Encoder
from service.storage import collection_rows, generation_rows, rows, tenant_rows
from service.storage.blobs import BlobMissing, adapter_key, frames_key, thumbnail_key, video_key
from service.storage.collection_rows import Collection
from service.storage.generation_rows import Generation
from service.storage.storage import Storage
from service.storage.tenant_rows import Tenant
from service.upkeep import archive_rows, check_rows, delete, erase_rows
from service.videos import index, vectors, video_rows
from service.videos.decoders import Decoders
from service.videos.video_rows import Video

PAGE = 200  # videos whose rows are read at once
UNREPAIRABLE = (BlobMissing, DamagedFrames, DecodeError, rows.NotFound, InvalidAdapter, DamagedAdapter)


@dataclass(frozen=True, slots=True)
class Finding:
    """`code` is stable; `mend` None: it cannot be repaired here, `detail` says what can be done. `outcome` of a repair:
    `repaired`, or why not.
    """

    code: str
    object: str
    detail: str
    mend: Callable[[], None] | None = field(default=None, compare=False, repr=False)
    outcome: str | None = None

    def to_json(self) -> dict[str, Any]:
        shown = {"code": self.code, "object": self.object, "detail": self.detail}
        return {**shown, "repairable": self.mend is not None, "outcome": self.outcome}


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
        self._storage, self._encoder, self._decoders = storage, encoder, decoders
        self._deep, self._tell = deep, tell
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
            if broken := self._broken():
                yield from (Finding("database_damaged", "database", f"{line}: restore it from a backup") for line in broken)
                return  # nothing else that it says can be trusted
            with self._storage.database.read() as connection:
                strays, lost = check_rows.stray_vectors(connection), check_rows.captions_of_nothing(connection)
                sets = erase_rows.orphaned_vector_sets(connection)
            for owner, where, vector_set, video in strays:
                detail = f"generation {vector_set} holds vectors of it, and it is not there"
                yield Finding("vectors_of_nothing", f"video {video}", detail, self._dropping(owner, where, vector_set, video))
            for vector_set in sets:
                mend = partial(delete.drop_vectors, self._storage, None, vector_set)
                yield Finding("vectors_of_nothing", f"generation {vector_set}", "has vectors and no row", mend)
            for video in lost:
                yield Finding("captions_of_nothing", f"video {video}", "has captions and no row", self._uncaptioning(video))
        with self._storage.database.read() as connection:
            tenants = [tenant_rows.tenant_named(connection, tenant)] if tenant else check_rows.living_tenants(connection)
            if tenant and collection:
                collection_rows.collection_named(connection, tenants[0].id, collection)
        checked: set[str] = set()
        for each in tenants:
            with self._storage.database.read() as connection:
                theirs = check_rows.living_collections(connection, each.id)
            for found in theirs:
                if collection is None or found.name == collection:
                    checked.add(found.id)
                    yield from self._collection(each, found)
        for key in delete.orphans(self._storage):
            if tenant is None or key.split("/")[1] in checked:
                yield Finding("blob_of_nothing", f"blob {key}", "belongs to no row", partial(self._storage.blobs.delete, key))

    def _broken(self) -> list[str]:
        try:
            with self._storage.database.read() as connection:
                return check_rows.broken_pages(connection) or check_rows.dangling_rows(connection)
        except DatabaseError as error:
            if isinstance(error, OperationalError):  # locked, or not there
                raise
            return [str(error.orig)]

    def _collection(self, tenant: Tenant, collection: Collection) -> Iterator[Finding]:
        self.counts["collections"] += 1
        name = f"{tenant.name}/{collection.name}"
        self._tell(name)
        yield from self._generations(tenant, collection, name)
        with self._storage.database.read() as connection:
            versions = archive_rows.adapters_of(connection, tenant.id, collection.id)
        for version in versions:
            self.counts["adapters"] += 1
            if (fault := self._adapter_fault(version)) is not None:
                yield fault
        after = ""
        while True:
            with self._storage.database.read() as connection:
                page = archive_rows.videos_after(connection, tenant.id, collection.id, after, PAGE)
            if not page:
                return
            for video in page:
                self.counts["videos"] += 1
                self._tell(f"{name}, {self.counts['videos']} videos")
                if first := self._video(video):
                    again = self._video(video)  # what is being changed just now looks different the second time
                    yield from (finding for finding in again if finding in first)
            after = page[-1].id

    # --- collections and adapters

    def _generations(self, tenant: Tenant, collection: Collection, name: str) -> Iterator[Finding]:
        def fault() -> str | None:
            with self._storage.database.read() as connection:
                known = generation_rows.generations_of(connection, tenant.id, collection.id)
                pointer = {c.id: c.active_generation_id for c in check_rows.living_collections(connection, tenant.id)}
            active = [g.id for g in known if g.state == "active"]
            if collection.id not in pointer or active == [pointer[collection.id]]:
                return None
            return f"its searches use generation {pointer[collection.id]}, active are {', '.join(active) or 'none'}"

        if fault() is not None and (detail := fault()) is not None:
            mend = partial(self._choose_generation, tenant.id, collection)
            yield Finding("active_generation_wrong", f"collection {name}", detail, mend)

    def _choose_generation(self, tenant: str, collection: Collection) -> None:
        """The one that searches use, if it is there, or else the one that was active last, or else the frozen backbone's."""
        with self._storage.database.write() as connection:
            if (now := collection_rows.lock_collection(connection, tenant, collection.id)) is None:
                return
            known = generation_rows.generations_of(connection, tenant, collection.id)
            if known:
                best = max(known, key=lambda g: (g.id == now.active_generation_id, g.state == "active", g.activated_at or ""))
                collection_rows.switch(connection, tenant, collection.id, best.id)
                return
        activate.activate(self._storage, self._encoder, self._decoders, tenant, collection.id, None, lambda done, total: None)

    def _adapter_fault(self, version: AdapterVersion) -> Finding | None:
        key = adapter_key(version.collection_id, version.digest)
        what = f"adapter {version.id}"
        try:
            if _sha256(self._storage.blobs.get(key)) == version.digest:
                return None
            code, detail = "adapter_damaged", "its file has other bytes than were published"
        except BlobMissing:
            code, detail = "adapter_missing", "its file is gone"
        with self._storage.database.read() as connection:
            copies = [adapter_key(c, version.digest) for c in check_rows.copies_of_adapter(connection, version.digest)]
        for copy in copies:
            try:
                data = self._storage.blobs.get(copy)
            except BlobMissing:
                continue
            if _sha256(data) == version.digest:
                return Finding(code, what, detail, partial(self._storage.blobs.put, key, data))
        hint = "import the same file once more (polyclip adapters import), or activate another version, or none"
        return Finding(code, what, f"{detail}: {hint}")

    # --- videos

    def _video(self, seen: Video) -> list[Finding]:
        """What is wrong with a video now; nothing if it has been deleted meanwhile."""
        with self._storage.database.read() as connection:
            video = video_rows.videos_by_id(connection, seen.tenant_id, [seen.id]).get(seen.id)
            if video is None or video.status == "failed":
                return []
            if video.status != "ready":
                worked_on = check_rows.has_open_task(connection, video.tenant_id, video.task_id)
                mend = partial(self._index_again, video)
                detail = f"is {video.status}, and no task works on it"
                return [] if worked_on else [Finding("video_abandoned", f"video {video.id}", detail, mend)]
            known = generation_rows.generations_of(connection, video.tenant_id, video.collection_id)
            rows = archive_rows.vector_rows(connection, video.tenant_id, video.id)
        what = f"video {video.id}"
        file, frames = self._file_fault(video), self._frames_fault(video)
        found = []
        if file is not None:
            found.append(Finding(file[0], what, file[1]))
        decodable = file is None and (video.media or {}).get("stored") is not False
        if frames is not None:
            detail = frames[1] if decodable else f"{frames[1]}, and there is no good file to make them from"
            found.append(Finding(frames[0], what, detail, partial(self._decode_again, video) if decodable else None))
        elif missing := self._missing_thumbnails(video):
            detail = f"{len(missing)} of {(video.media or {})['segments']} are gone"
            found.append(Finding("thumbnails_missing", what, detail, partial(self._draw_thumbnails, video, missing)))
        makers = {g.id: g for g in known}
        for vector_set in sorted({g.vector_set for g in known}):
            used = any(g.vector_set == vector_set and g.state == "active" for g in known)
            fault = self._vectors_fault(video, rows.get(vector_set, []), makers.get(vector_set), used)
            if fault is not None:
                maker = makers.get(vector_set) if decodable or frames is None else None
                mend_vectors = partial(self._embed_again, video, maker) if maker is not None else None
                found.append(Finding(fault[0], what, f"generation {vector_set}: {fault[1]}", mend_vectors))
        return found

    def _file_fault(self, video: Video) -> tuple[str, str] | None:
        if (video.media or {}).get("stored") is False:
            return None
        key = video_key(video.collection_id, video.id)
        try:
            size = self._storage.blobs.size(key)
            whole = size == video.size
            if whole and self._deep:
                digest = hashlib.sha256()
                for chunk in self._storage.blobs.stream(key, 0, size):
                    digest.update(chunk)
                whole = digest.hexdigest() == video.sha256
        except (BlobMissing, FileNotFoundError):
            return "file_missing", "its file is gone; an upload of the same file brings it back"
        if whole:
            return None
        return "file_damaged", f"its file is not what was uploaded; remove blob {key} and upload the same file"

    def _frames_fault(self, video: Video) -> tuple[str, str] | None:
        try:
            archive = FrameArchive(self._storage.blobs.get(frames_key(video.collection_id, video.id)))
            archive.check()
        except BlobMissing:
            return "frames_missing", "its cached frames are gone"
        except DamagedFrames as error:
            return "frames_damaged", str(error)
        segments = (video.media or {}).get("segments")
        if segments != len(archive.segments):
            return "frames_damaged", f"there are frames of {len(archive.segments)} segments, the video has {segments}"
        return None

    def _missing_thumbnails(self, video: Video) -> list[int]:
        keys = set(self._storage.blobs.keys(f"thumbnails/{video.collection_id}/{video.id}/"))
        count = int((video.media or {})["segments"])
        return [ordinal for ordinal in range(count) if thumbnail_key(video.collection_id, video.id, ordinal) not in keys]

    def _vectors_fault(self, video: Video, rows: vectors.Rows, maker: Generation | None, used: bool) -> tuple[str, str] | None:
        """A retired generation may lack videos that came later; of what it holds, nothing may be wrong."""
        if not rows:
            return ("vectors_missing", "has no vectors of it") if used else None
        if maker is None:
            return "vectors_damaged", "is not there, though another one searches its vectors: activate another adapter, or none"
        try:
            vectors.check(rows, self._encoder.backbone.embed_dim, int((video.media or {}).get("segments", 0)))
        except vectors.InvalidVectors as error:
            return "vectors_damaged", str(error)
        return None

    # --- mending

    def _index_again(self, video: Video) -> None:
        with self._storage.database.write() as connection:
            check_rows.queue_again(connection, video.tenant_id, video.id)
        index.index_video(self._storage, self._encoder, self._decoders, video.tenant_id, video.id)

    def _decode_again(self, video: Video) -> None:
        """Frames and thumbnails from the file, and then the vectors of every generation that has some from the frames."""
        index.decode_again(self._storage, self._encoder, self._decoders, video)
        with self._storage.database.read() as connection:
            known = generation_rows.generations_of(connection, video.tenant_id, video.collection_id)
            held = archive_rows.vector_rows(connection, video.tenant_id, video.id)
        for maker in known:
            if maker.id in held:
                self._embed_again(video, maker)

    def _embed_again(self, video: Video, maker: Generation) -> None:
        """Old and new vectors change places in one step; searches go on with the old ones until then."""
        rows = index.embedded_segments(self._storage, self._encoder, self._decoders, video, maker)
        with self._storage.database.write() as connection:
            check_rows.replace_vectors(connection, video.tenant_id, video.collection_id, maker.id, video.id, rows)

    def _draw_thumbnails(self, video: Video, missing: list[int]) -> None:
        facts = MediaFacts(**{each.name: (video.media or {})[each.name] for each in fields(MediaFacts)})
        blobs, frames = self._storage.blobs, frames_key(video.collection_id, video.id)
        with tempfile.TemporaryDirectory(dir=self._storage.settings.scratch) as name, blobs.local(frames) as path:
            decoded = self._decoders.reopen(path, Path(name), facts, index.sampling(self._storage, self._encoder, {}))
            for ordinal in missing:
                picture = Path(name, decoded.segments[ordinal].thumbnail_file).read_bytes()
                blobs.put(thumbnail_key(video.collection_id, video.id, ordinal), picture)

    def _dropping(self, tenant: str, collection: str, vector_set: str, video: str) -> Callable[[], None]:
        def drop() -> None:
            with self._storage.database.write() as connection:
                check_rows.replace_vectors(connection, tenant, collection, vector_set, video, [])

        return drop

    def _uncaptioning(self, video: str) -> Callable[[], None]:
        def drop() -> None:
            with self._storage.database.write() as connection:
                check_rows.drop_captions_of_nothing(connection, video)

        return drop


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
