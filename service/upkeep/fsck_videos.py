"""What `fsck` looks at of one video, and how it repairs it: a function for each check, `CHECKS` in their order."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from indexer.decode import MediaFacts
from indexer.frames import DamagedFrames, FrameArchive
from service.adapters.encoder import Encoder
from service.storage import generation_rows
from service.storage.blobs import BlobMissing, frames_key, thumbnail_key, video_key
from service.storage.generation_rows import Generation
from service.storage.storage import Storage
from service.upkeep import archive_rows, check_rows
from service.videos import index, vectors, video_rows
from service.videos.decoders import Decoders
from service.videos.video_rows import Video


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


@dataclass(frozen=True, slots=True)
class Tools:
    """What checks and repairs work with; `deep`: stored files are read against their sha256."""

    storage: Storage
    encoder: Encoder
    decoders: Decoders
    deep: bool


@dataclass(frozen=True)
class _Seen:
    """A ready video as it is now, with its collection's generations and its vectors by vector set."""

    tools: Tools
    video: Video
    generations: list[Generation]
    rows: dict[str, list[dict[str, Any]]]

    @property
    def media(self) -> dict[str, Any]:
        return dict(self.video.media or {})

    @property
    def segments(self) -> int:
        return int(self.media.get("segments", 0))

    @property
    def decodable(self) -> bool:
        """Whether there is a good file from which frames can be made."""
        return self.file is None and self.media.get("stored") is not False

    @cached_property
    def file(self) -> tuple[str, str] | None:
        """(code, detail) of what is wrong with the uploaded file."""
        if self.media.get("stored") is False:
            return None
        blobs, key = self.tools.storage.blobs, video_key(self.video.collection_id, self.video.id)
        try:
            size = blobs.size(key)
            whole = size == self.video.size
            if whole and self.tools.deep:
                digest = hashlib.sha256()
                for chunk in blobs.stream(key, 0, size):
                    digest.update(chunk)
                whole = digest.hexdigest() == self.video.sha256
        except (BlobMissing, FileNotFoundError):
            return "file_missing", "its file is gone; an upload of the same file brings it back"
        if whole:
            return None
        return "file_damaged", f"its file is not what was uploaded; remove blob {key} and upload the same file"

    @cached_property
    def frames(self) -> tuple[str, str] | None:
        """(code, detail) of what is wrong with the cached frames."""
        try:
            archive = FrameArchive(self.tools.storage.blobs.get(frames_key(self.video.collection_id, self.video.id)))
            archive.check()
        except BlobMissing:
            return "frames_missing", "its cached frames are gone"
        except DamagedFrames as error:
            return "frames_damaged", str(error)
        if self.segments != len(archive.segments):
            return "frames_damaged", f"there are frames of {len(archive.segments)} segments, the video has {self.segments}"
        return None


Found = Iterator[tuple[str, str, Callable[[], None] | None]]  # code, detail, repair


def video_findings(tools: Tools, seen: Video) -> Iterator[Finding]:
    """What is wrong with a video now; nothing if it has been deleted meanwhile."""
    with tools.storage.database.read() as connection:
        video = video_rows.videos_by_id(connection, seen.tenant_id, [seen.id]).get(seen.id)
        if video is None or video.status == "failed":
            return
        if video.status != "ready":
            if not check_rows.has_open_task(connection, video.tenant_id, video.task_id):
                detail, mend = f"is {video.status}, and no task works on it", partial(_index_again, tools, video)
                yield Finding("video_abandoned", f"video {video.id}", detail, mend)
            return
        known = generation_rows.generations_of(connection, video.tenant_id, video.collection_id)
        rows = archive_rows.vector_rows(connection, video.tenant_id, video.id)
    now = _Seen(tools, video, known, rows)
    for check in CHECKS:
        for code, detail, repair in check(now):
            yield Finding(code, f"video {video.id}", detail, repair)


def _file(seen: _Seen) -> Found:
    if seen.file is not None:
        yield *seen.file, None


def _frames(seen: _Seen) -> Found:
    if seen.frames is not None and seen.decodable:
        yield *seen.frames, partial(_decode_again, seen.tools, seen.video)
    elif seen.frames is not None:
        yield seen.frames[0], f"{seen.frames[1]}, and there is no good file to make them from", None


def _thumbnails(seen: _Seen) -> Found:
    if seen.frames is not None:  # they come with the frames
        return
    folder = f"{seen.video.collection_id}/{seen.video.id}"
    there = set(seen.tools.storage.blobs.keys(f"thumbnails/{folder}/"))
    wanted = {n: thumbnail_key(seen.video.collection_id, seen.video.id, n) for n in range(seen.segments)}
    if missing := [ordinal for ordinal, key in wanted.items() if key not in there]:
        yield "thumbnails_missing", f"{len(missing)} of {seen.segments} are gone", partial(_draw_thumbnails, seen, missing)


def _vectors(seen: _Seen) -> Found:
    """A retired generation may lack videos that came later; of what it holds, nothing may be wrong."""
    makers = {g.id: g for g in seen.generations}
    in_use = {g.vector_set for g in seen.generations if g.state == "active"}
    for vector_set in sorted({g.vector_set for g in seen.generations}):
        rows, maker = seen.rows.get(vector_set, []), makers.get(vector_set)
        code, wrong = "vectors_damaged", None
        if not rows:
            code, wrong = "vectors_missing", "has no vectors of it" if vector_set in in_use else None
        elif maker is None:
            wrong = "is not there, though another one searches its vectors: activate another adapter, or none"
        else:
            try:
                vectors.check(rows, seen.tools.encoder.of(maker.backbone).backbone.embed_dim, seen.segments)
            except vectors.InvalidVectors as error:
                wrong = str(error)
        if wrong is not None:
            with_frames = seen.decodable or seen.frames is None
            mend = partial(_embed_again, seen.tools, seen.video, maker) if maker is not None and with_frames else None
            yield code, f"generation {vector_set}: {wrong}", mend


CHECKS: tuple[Callable[[_Seen], Found], ...] = (_file, _frames, _thumbnails, _vectors)


def _index_again(tools: Tools, video: Video) -> None:
    with tools.storage.database.write() as connection:
        check_rows.queue_again(connection, video.tenant_id, video.id)
    index.index_video(tools.storage, tools.encoder, tools.decoders, video.tenant_id, video.id)


def _decode_again(tools: Tools, video: Video) -> None:
    """Frames and thumbnails from the file, and then the vectors of every generation that has some from the frames."""
    index.decode_again(tools.storage, tools.encoder, tools.decoders, video)
    with tools.storage.database.read() as connection:
        known = generation_rows.generations_of(connection, video.tenant_id, video.collection_id)
        held = archive_rows.vector_rows(connection, video.tenant_id, video.id)
    for maker in known:
        if maker.id in held:
            _embed_again(tools, video, maker)


def _embed_again(tools: Tools, video: Video, maker: Generation) -> None:
    """Replaces the vectors in one step; searches go on with the old ones until then."""
    rows = index.embedded_segments(tools.storage, tools.encoder, tools.decoders, video, maker)
    with tools.storage.database.write() as connection:
        check_rows.replace_vectors(connection, video.tenant_id, video.collection_id, maker.id, video.id, rows)


def _draw_thumbnails(seen: _Seen, missing: list[int]) -> None:
    facts = MediaFacts(**{each.name: seen.media[each.name] for each in fields(MediaFacts)})
    storage, video = seen.tools.storage, seen.video
    frames = storage.blobs.local(frames_key(video.collection_id, video.id))
    with tempfile.TemporaryDirectory(dir=storage.settings.scratch) as name, frames as path:
        how = index.sampling(storage, seen.tools.encoder.backbone.image_size, {})
        decoded = seen.tools.decoders.reopen(path, Path(name), facts, how)
        for ordinal in missing:
            picture = Path(name, decoded.segments[ordinal].thumbnail_file).read_bytes()
            storage.blobs.put(thumbnail_key(video.collection_id, video.id, ordinal), picture)
