"""A collection goes out as an archive (`service.upkeep.archive`): rows of one moment, then blobs and vectors, video by video.

Searches and uploads go on meanwhile; of what is deleted meanwhile nothing is in the archive, and the archive says so.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

from service.adapters import adapter_rows, backbones
from service.adapters.adapter_rows import AdapterVersion
from service.storage import collection_rows, generation_rows
from service.storage.blobs import BlobMissing, adapter_key, frames_key, thumbnail_key, video_key
from service.storage.generation_rows import Generation
from service.storage.storage import Storage
from service.storage.tables import now
from service.upkeep import archive_rows
from service.upkeep.archive import CHUNK, CONTENTS, FIRST, Writer, gathered
from service.upkeep.archive_json import FORMAT
from service.videos import vectors, video_rows
from service.videos.video_rows import Caption, Video
from training.progress import Progress, Tell, unheard

PAGE = 500  # videos whose rows are read at once

Content = tuple[int, Iterator[bytes]]  # of a member: its size and its bytes


class Export:
    """A collection on its way out. When all chunks have been taken, `written` is the number of videos in the archive, and
    `left_out` says which ids did not come along and why:

    `failed` and `unfinished` videos (an unfinished one does come along if its file does), those `deleted` meanwhile, and what
    is `damaged`: videos without their frames or file, adapters without their tensors.
    """

    def __init__(self, storage: Storage, tenant: str, name: str, files: bool, every_generation: bool = False) -> None:
        """Reads the rows. `files`: the uploaded files too; `every_generation`: the vectors of retired ones too.

        Raises NotFound, and BlobMissing where the adapter in use is missing or damaged.
        """
        self._storage, self._tenant, self._files = storage, tenant, files
        self.left_out: dict[str, list[str]] = {"failed": [], "unfinished": [], "deleted": [], "damaged": []}
        self.written = videos = size = 0
        with storage.database.read() as connection:
            archive_rows.freeze(connection)
            collection, active = collection_rows.active_generation(connection, tenant, name)
            self._collection = collection.id
            versions = adapter_rows.adapters_of(connection, tenant, collection.id)
            self._versions = [each for each in versions if self._whole(each, needed=each.id == active.adapter_id)]
            known = generation_rows.generations_of(connection, tenant, collection.id)
            own = self._generations = _exported(active, known, self._versions, every_generation)
            backbone = backbones.described(connection, active.backbone)
            self._rows = tempfile.TemporaryFile(dir=storage.settings.scratch)  # noqa: SIM115
            after = ""
            while page := archive_rows.videos_after(connection, tenant, collection.id, after, PAGE):
                captions = video_rows.captions_of(connection, tenant, [video.id for video in page])
                for video in page:
                    if video.status == "failed":
                        self.left_out["failed"].append(video.id)
                    else:
                        videos, size = videos + 1, size + video.size
                        self._rows.write(json.dumps(_record(video, captions[video.id])).encode() + b"\n")
                after = page[-1].id
        self._manifest: dict[str, Any] = {
            "format": FORMAT,
            "created_at": now(),
            "polyclip": version("polyclip"),
            "backbone": {"name": backbone["name"], "fingerprint": active.backbone},
            "collection": {"name": collection.name, "settings": dict(collection.settings)},
            "videos": videos,
            "bytes": size,
            "files": files,
            "adapters": [{"digest": v.digest, "version": v.version, "created_at": v.created_at} for v in self._versions],
            "generations": [{"id": g.id, "adapter": g.digest, "vector_set": g.vector_set, "active": g is active} for g in own],
        }

    def chunks(self, progress: Tell = unheard) -> Iterator[bytes]:
        """The archive's bytes, once."""
        return gathered(self._chunks(progress))

    def _chunks(self, progress: Tell) -> Iterator[bytes]:
        videos = int(str(self._manifest["videos"]))
        with self._rows, tempfile.TemporaryFile(dir=self._storage.settings.scratch) as sums:
            writer = Writer(sums, time.time())
            yield from writer.whole(FIRST, _json(self._manifest))
            for each in self._versions:
                yield from writer.whole(f"adapters/{each.digest}.json", _json(each.manifest))
                data = self._storage.blobs.get(adapter_key(self._collection, each.digest))
                yield from writer.whole(f"adapters/{each.digest}.safetensors", data)
            self._rows.seek(0)
            for number, line in enumerate(self._rows):
                progress(Progress(f"{number} of {videos} videos", number, videos))
                record = json.loads(line)
                with ExitStack() as held:
                    members = self._members(record, held)
                    for name, (size, content) in members.items():
                        yield from writer.member(f"videos/{record['id']}/{name}", size, content)
                    self.written += bool(members)
            yield from writer.whole(CONTENTS, _json({"videos": self.written, "left_out": self.left_out}))
            yield from writer.end()

    def _whole(self, adapter: AdapterVersion, needed: bool) -> bool:
        try:
            data = self._storage.blobs.get(adapter_key(self._collection, adapter.digest))
            if hashlib.sha256(data).hexdigest() == adapter.digest:
                return True
        except BlobMissing:
            pass
        if needed:
            raise BlobMissing(f"the file of the adapter in use, version {adapter.version}, is missing or damaged")
        self.left_out["damaged"].append(adapter.id)
        return False

    def _members(self, record: dict[str, Any], held: ExitStack) -> dict[str, Content]:
        """What the archive holds of a video; nothing if it has been deleted or cannot be brought along.

        Blobs are opened before the rows are asked for once more, so that what is here stays readable to the end.
        """
        collection, video, media = self._collection, record["id"], record["media"]
        with_file = self._files and (media or {}).get("stored") is not False
        frames = self._opened(frames_key(collection, video), held) if media else None
        thumbnails = [self._opened(thumbnail_key(collection, video, i), held) for i in range((media or {}).get("segments", 0))]
        file = self._opened(video_key(collection, video), held) if with_file else None
        with self._storage.database.read() as connection:
            if video not in video_rows.videos_by_id(connection, self._tenant, [video]):
                self.left_out["deleted"].append(video)
                return {}
            rows = archive_rows.vector_rows(connection, self._tenant, video) if frames else {}
        if (media and frames is None) or (with_file and file is None):
            self.left_out["damaged"].append(video)
        if frames is None:
            record["media"] = None  # decoded again where it arrives
            if file is None:
                if media is None:
                    self.left_out["unfinished"].append(video)
                return {}
        packed = {each.id: _packed(rows[each.id], media["segments"]) for each in self._generations if each.id in rows}
        members = {
            "video.json": _bytes(_json(record)),
            "frames.zip": frames,
            **{f"thumbnails/{i:04d}.jpg": content for i, content in enumerate(thumbnails)},
            **{f"vectors/{generation}.safetensors": _bytes(data) for generation, data in packed.items()},
            "file": file,
        }
        return {name: content for name, content in members.items() if content is not None}

    def _opened(self, key: str, held: ExitStack) -> Content | None:
        try:
            file = held.enter_context(held.enter_context(self._storage.blobs.local(key)).open("rb"))
        except (BlobMissing, FileNotFoundError):
            return None
        size = file.seek(0, 2)
        file.seek(0)
        return size, iter(lambda: file.read(CHUNK), b"")


def _exported(active: Generation, known: list[Generation], versions: list[AdapterVersion], every: bool) -> list[Generation]:
    """The active generation first, others that can come along if `every`, and those whose vectors these search."""
    digests = {None, *(version.digest for version in versions)}
    own = [active]
    if every:
        own += [g for g in known if g.state == "retired" and g.backbone == active.backbone and g.digest in digests]
    searched = {g.vector_set for g in own} - {g.id for g in own}
    return own + [g for g in known if g.id in searched]


def _record(video: Video, captions: Sequence[Caption]) -> dict[str, Any]:
    own = {name: getattr(video, name) for name in ("id", "filename", "sha256", "size", "created_at", "media")}
    texts = [{"text": each.text, "start": each.start, "end": each.end} for each in captions]
    return {**own, "metadata": dict(video.metadata), "captions": texts}


def _packed(rows: vectors.Rows, segments: int) -> bytes | None:
    """Damaged vectors are left out: they are made again from the frames after an import."""
    dim = len(rows[0]["pooled"] or b"") // 2
    try:
        vectors.check(rows, dim, segments)
    except vectors.InvalidVectors:
        return None
    return vectors.pack(rows, dim)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"


def _bytes(data: bytes | None) -> Content | None:
    return None if data is None else (len(data), iter([data]))
