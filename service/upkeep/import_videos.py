"""One video of an archive is taken in: every part of it is checked, then its blobs are stored, then its rows.

Frames are read in the decoder's sandbox and packed anew; files and vectors pass the checks of an upload and of `vectors`.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tarfile import TarInfo
from typing import Any

from indexer.decode import DecodedVideo, DecodeError, MediaFacts
from indexer.formats import HEAD_BYTES, looks_like_video
from indexer.frames import pack_frames
from service.adapters.encoder import Encoder
from service.storage import segment_rows
from service.storage.blobs import frames_key, thumbnail_key, video_key
from service.storage.storage import Storage
from service.upkeep import archive_rows
from service.upkeep.archive import Archive, InvalidArchive
from service.upkeep.archive_json import VideoRecord
from service.videos import vectors
from service.videos.decoders import Decoders
from service.videos.index import sampling
from service.videos.video_rows import Caption

VECTORS_BYTES, THUMBNAIL_BYTES = 1 << 28, 1 << 20  # of one video's members


@dataclass(frozen=True, slots=True)
class Arrival:
    """A hidden collection, and the archive from which it gets its videos.

    `sets` are the new ids of the archive's vector sets; searches will use the new one of `active_set`.
    """

    storage: Storage
    encoder: Encoder
    decoders: Decoders
    archive: Archive
    tenant: str
    collection: str
    settings: Mapping[str, Any]
    sets: Mapping[str, str]
    active_set: str

    def take(self, video: str, parts: Mapping[str, TarInfo]) -> int:
        """A video under the id `video`; `parts` are its members by the ends of their names. Returns the size of its file.

        Raises InvalidArchive, and NotFound if a sweep took the collection away.
        """
        collection, blobs = self.collection, self.storage.blobs
        with tempfile.TemporaryDirectory(dir=self.storage.settings.scratch, prefix="import-") as name:
            folder = Path(name)
            try:
                record = self.archive.json(parts["video.json"], VideoRecord)
                facts = record.media and record.media.facts()
                decoded = self._frames(parts["frames.zip"], facts, folder) if facts else None
                rows = self._vectors(parts, decoded) if decoded else {}
                if "file" in parts:
                    self._file(parts["file"], record, folder / "file")
                elif decoded is None:
                    raise InvalidArchive("there are neither frames nor a file")
            except KeyError as error:
                raise InvalidArchive(f"{error} is missing") from error
            except (DecodeError, vectors.InvalidVectors) as error:
                raise InvalidArchive(" ".join(str(error).split())[:300]) from error
            if "file" in parts:
                blobs.put_file(video_key(collection, video), folder / "file")
            if decoded is not None:
                for ordinal, segment in enumerate(decoded.segments):
                    thumbnail = self._thumbnail(parts.get(f"thumbnails/{ordinal:04d}.jpg"), folder / segment.thumbnail_file)
                    blobs.put(thumbnail_key(collection, video, ordinal), thumbnail)
                blobs.put(frames_key(collection, video), pack_frames(decoded, folder))
        row = {"id": video, **record.model_dump(include={"filename", "sha256", "size", "created_at", "metadata"})}
        if decoded is not None:
            stored = {} if "file" in parts else {"stored": False}
            row["media"] = {**asdict(decoded.facts), "segments": len(decoded.segments), **stored}
        row["status"] = "pending" if decoded is None else "ready" if self.active_set in rows else "queued"
        captions = [Caption(each.text, each.start, each.end) for each in record.captions]
        with self.storage.database.write() as connection:
            archive_rows.add_hidden_video(connection, self.tenant, collection, row, captions)
            for vector_set, segments in rows.items():
                segment_rows.add_segments(connection, self.tenant, video, self.sets[vector_set], segments)
        return record.size

    def _frames(self, member: TarInfo, facts: MediaFacts, folder: Path) -> DecodedVideo:
        """The frames, each looked at in the sandbox, in `folder`."""
        if member.size > (limit := self.storage.settings.decode_output_bytes):
            raise InvalidArchive(f"the frames may have {limit} bytes, they have {member.size}")
        with (folder / "frames.zip").open("wb") as file:
            file.writelines(self.archive.chunks(member))
        how = sampling(self.storage, self.encoder.backbone.image_size, self.settings)
        return self.decoders.reopen(folder / "frames.zip", folder, facts, how)

    def _vectors(self, parts: Mapping[str, TarInfo], decoded: DecodedVideo) -> dict[str, list[dict[str, Any]]]:
        """Rows of `segments` by the archive's vector set."""
        segments = [(s.start, s.end, len(s.frame_files)) for s in decoded.segments]
        dim = self.encoder.backbone.embed_dim
        return {
            own: vectors.unpack(self.archive.read(member, VECTORS_BYTES), dim, segments)
            for own in self.sets
            if (member := parts.get(f"vectors/{own}.safetensors")) is not None
        }

    def _file(self, member: TarInfo, record: VideoRecord, path: Path) -> None:
        """The uploaded file, with the checks of an upload."""
        if member.size != record.size or member.size > self.storage.settings.max_video_bytes:
            raise InvalidArchive(f"the file has {member.size} bytes: not what its record says, or over the limit of an upload")
        digest, head = hashlib.sha256(), b""
        with path.open("wb") as file:
            for chunk in self.archive.chunks(member):
                head = head or chunk[:HEAD_BYTES]
                digest.update(chunk)
                file.write(chunk)
        if not looks_like_video(head):
            raise InvalidArchive("the file does not begin like any video container")
        if digest.hexdigest() != record.sha256:
            raise InvalidArchive("the file is not the one of its record")

    def _thumbnail(self, member: TarInfo | None, made: Path) -> bytes:
        """The archive's if it looks like a JPEG: only browsers read it."""
        data = self.archive.read(member, THUMBNAIL_BYTES) if member is not None else b""
        return data if data.startswith(b"\xff\xd8\xff") else made.read_bytes()
