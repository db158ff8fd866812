"""A collection goes out as an archive (`service.upkeep.archive`): rows of one moment, then blobs and vectors, video by video.

Searches and uploads go on meanwhile; of what is deleted meanwhile nothing is in the archive, and the archive says so.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

from service.adapters.adapter_rows import AdapterVersion
from service.storage import collection_rows, facts, generation_rows
from service.storage.blobs import BlobMissing, adapter_key, frames_key, thumbnail_key, video_key
from service.storage.generation_rows import Generation
from service.storage.storage import Storage
from service.storage.tables import now
from service.upkeep import archive_rows
from service.upkeep.archive import CHUNK, CONTENTS, FIRST, FORMAT, Writer, gathered
from service.videos import vectors, video_rows
from service.videos.video_rows import Caption, Video

PAGE = 500  # videos whose rows are read at once

Tell = Callable[[float, str], None]  # (share that is done, what is being done); may raise to stop


class Export:
    """A collection on its way out. When all chunks have been taken, `left_out` says which ids did not come along and why:

    `failed` and `unfinished` videos (an unfinished one does come along if its file does), those `deleted` meanwhile, and what
    is `damaged`: videos without their frames or file, adapters without their tensors.
    """

    def __init__(self, storage: Storage, tenant: str, name: str, files: bool, every_generation: bool = False) -> None:
        """Reads the rows. `files`: the uploaded files too; `every_generation`: the vectors of retired ones too.

        Raises NotFound, and BlobMissing where the adapter in use is missing or damaged.
        """
        self._storage = storage
        self._tenant, self._files = tenant, files
        self.left_out: dict[str, list[str]] = {"failed": [], "unfinished": [], "deleted": [], "damaged": []}
        self.videos = self.bytes = self.written = 0
        with storage.database.read() as connection:
            archive_rows.freeze(connection)
            self.collection, active = collection_rows.active_generation(connection, tenant, name)
            known = generation_rows.generations_of(connection, tenant, self.collection.id)
            versions = archive_rows.adapters_of(connection, tenant, self.collection.id)
            self._versions = [v for v in versions if self._whole(v, needed=v.id == active.adapter_id)]
            self._generations = _exported(active, known, self._versions, every_generation)
            self._backbone = facts.fact(connection, "backbone")
            self._rows = tempfile.TemporaryFile(dir=storage.settings.scratch)  # noqa: SIM115
            after = ""
            while page := archive_rows.videos_after(connection, tenant, self.collection.id, after, PAGE):
                captions = video_rows.captions_of(connection, tenant, [video.id for video in page])
                for video in page:
                    self._note(video, captions[video.id])
                after = page[-1].id

    def chunks(self, progress: Tell = lambda share, note: None) -> Iterator[bytes]:
        """The archive's bytes, once."""
        return gathered(self._chunks(progress))

    def _chunks(self, progress: Tell) -> Iterator[bytes]:
        blobs, key = self._storage.blobs, self.collection.id
        with self._rows, tempfile.TemporaryFile(dir=self._storage.settings.scratch) as sums:
            writer = Writer(sums, time.time())
            yield from writer.whole(FIRST, _json(self._manifest()))
            for each in self._versions:
                yield from writer.whole(f"adapters/{each.digest}.json", _json(each.manifest))
                data = blobs.get(adapter_key(key, each.digest))
                yield from writer.whole(f"adapters/{each.digest}.safetensors", data)
            self._rows.seek(0)
            for number, line in enumerate(self._rows):
                progress(number / self.videos, f"{number} of {self.videos} videos")
                record = json.loads(line)
                with ExitStack() as held:
                    members = self._members(record, held)
                    for name, (size, part) in members.items():
                        yield from writer.member(f"videos/{record['id']}/{name}", size, part)
                    self.written += bool(members)
            yield from writer.whole(CONTENTS, _json({"videos": self.written, "left_out": self.left_out}))
            yield from writer.end()

    def _manifest(self) -> dict[str, Any]:
        own = self._generations
        return {
            "format": FORMAT,
            "created_at": now(),
            "polyclip": version("polyclip"),
            "backbone": {"name": self._backbone["name"], "fingerprint": own[0].backbone},
            "collection": {"name": self.collection.name, "settings": dict(self.collection.settings)},
            "videos": self.videos,
            "bytes": self.bytes,
            "files": self._files,
            "adapters": [{"digest": v.digest, "version": v.version, "created_at": v.created_at} for v in self._versions],
            "generations": [{"id": g.id, "adapter": g.digest, "vector_set": g.vector_set, "active": g is own[0]} for g in own],
        }

    def _note(self, video: Video, captions: list[Caption]) -> None:
        if video.status == "failed":
            self.left_out["failed"].append(video.id)
            return
        self.videos += 1
        self.bytes += video.size
        record = {
            "id": video.id,
            "filename": video.filename,
            "sha256": video.sha256,
            "size": video.size,
            "created_at": video.created_at,
            "media": video.media,
            "metadata": dict(video.metadata),
            "captions": [{"text": c.text, "start": c.start, "end": c.end} for c in captions],
        }
        self._rows.write(json.dumps(record).encode() + b"\n")

    def _whole(self, adapter: AdapterVersion, needed: bool) -> bool:
        try:
            data = self._storage.blobs.get(adapter_key(self.collection.id, adapter.digest))
            if hashlib.sha256(data).hexdigest() == adapter.digest:
                return True
        except BlobMissing:
            pass
        if needed:
            raise BlobMissing(f"the file of the adapter in use, version {adapter.version}, is missing or damaged")
        self.left_out["damaged"].append(adapter.id)
        return False

    def _members(self, record: dict[str, Any], held: ExitStack) -> dict[str, tuple[int, Iterator[bytes]]]:
        """What the archive holds of a video; nothing if it has been deleted or cannot be brought along.

        Blobs are opened before the rows are asked for once more, so that what is here stays readable to the end.
        """
        collection, video = self.collection.id, record["id"]
        media, without_file = record["media"], (record["media"] or {}).get("stored") is False
        frames = self._opened(frames_key(collection, video), held) if media else None
        thumbnails = [self._opened(thumbnail_key(collection, video, i), held) for i in range((media or {}).get("segments", 0))]
        file = self._opened(video_key(collection, video), held) if self._files and not without_file else None
        with self._storage.database.read() as connection:
            if video not in video_rows.videos_by_id(connection, self._tenant, [video]):
                self.left_out["deleted"].append(video)
                return {}
            rows = archive_rows.vector_rows(connection, self._tenant, video) if frames else {}
        if (media and frames is None) or (self._files and not without_file and file is None):
            self.left_out["damaged"].append(video)
        if frames is None:
            record["media"] = None  # decoded again where it arrives
            if file is None:
                if media is None:
                    self.left_out["unfinished"].append(video)
                return {}
        packed = {each.id: _packed(rows[each.id], media["segments"]) for each in self._generations if each.id in rows}
        parts: dict[str, tuple[int, Iterator[bytes]] | None] = {
            "video.json": _bytes(_json(record)),
            "frames.zip": frames,
            **{f"thumbnails/{i:04d}.jpg": part for i, part in enumerate(thumbnails)},
            **{f"vectors/{generation}.safetensors": _bytes(data) if data else None for generation, data in packed.items()},
            "file": file,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _opened(self, key: str, held: ExitStack) -> tuple[int, Iterator[bytes]] | None:
        try:
            file = held.enter_context(held.enter_context(self._storage.blobs.local(key)).open("rb"))
        except (BlobMissing, FileNotFoundError):
            return None
        size = file.seek(0, 2)
        file.seek(0)
        return size, iter(lambda: file.read(CHUNK), b"")


def _exported(active: Generation, known: list[Generation], versions: list[AdapterVersion], every: bool) -> list[Generation]:
    """The active generation first, others that stand if `every`, and those whose vectors these search."""
    digests = {None, *(version.digest for version in versions)}
    own = [active]
    if every:
        own += [g for g in known if g.state == "retired" and g.backbone == active.backbone and g.digest in digests]
    owners = {g.vector_set for g in own} - {g.id for g in own}
    return own + [g for g in known if g.id in owners]


def _packed(rows: vectors.Rows, segments: int) -> bytes | None:
    """Vectors that are damaged do not come along: they are made anew from the frames where these arrive."""
    dim = len(rows[0]["pooled"] or b"") // 2
    try:
        vectors.check(rows, dim, segments)
    except vectors.InvalidVectors:
        return None
    return vectors.pack(rows, dim)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"


def _bytes(data: bytes) -> tuple[int, Iterator[bytes]]:
    return len(data), iter([data])
