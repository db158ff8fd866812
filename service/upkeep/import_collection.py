"""A collection comes in from an archive (`upkeep.archive`) under new ids: the whole archive is checked first, then everything
is put in place out of sight (`archive_rows`), then one transaction makes it visible.

Nothing in the archive is trusted: JSON is checked field by field, frames are looked at in the decoder's cage and packed anew,
adapters, vectors and files pass the checks of their own kind.
"""

from __future__ import annotations

import hashlib
import math
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

import adapters_store
from indexer.decode import DecodedVideo, DecodeError, MediaFacts
from indexer.formats import HEAD_BYTES, looks_like_video
from indexer.frames import pack_frames
from service.adapters import train
from service.adapters.encoder import Encoder
from service.jobs.task_rows import Task
from service.settings import SHORTEST_SEGMENT, CollectionSettings, settings_json
from service.storage import segment_rows, tenant_rows
from service.storage.blobs import adapter_key, frames_key, thumbnail_key, video_key
from service.storage.rows import AlreadyExists, InvalidName, QuotaExceeded
from service.storage.storage import Storage
from service.storage.tables import new_id, now
from service.storage.tenant_rows import Tenant
from service.upkeep import archive_rows, delete
from service.upkeep.archive import FIRST, Archive, InvalidArchive, Member
from service.upkeep.export_collection import Tell
from service.videos import vectors
from service.videos.captions import MAX_CAPTIONS, CaptionIn
from service.videos.decoders import Decoders
from service.videos.index import sampling
from service.videos.video_rows import Caption, Video

VECTORS_BYTES, THUMBNAIL_BYTES = 1 << 28, 1 << 20  # of one video's members
VERIFYING = 0.3  # share of an import's progress
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


class ArchiveOfOtherBackbone(ValueError):
    """The archive's vectors and adapters were made with another backbone than the one at hand."""


class ImportFailed(RuntimeError):
    """An import as a task has ended with nothing; `code` and the message say why."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


CODES: dict[type[Exception], str] = {
    InvalidArchive: "invalid_archive",
    ArchiveOfOtherBackbone: "archive_of_other_backbone",
    AlreadyExists: "collection_exists",
    InvalidName: "invalid_name",
    QuotaExceeded: "quota_exceeded",
}


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
    progress: Tell = lambda share, note: None,
) -> Imported:
    """The archive as a new collection of the tenant: all of it or nothing.

    An archive of another backbone is refused, unless `re_embed`: its frames are then embedded anew, its adapters left out.
    `collection`: the id that it gets; what an import that died has left of it goes first. Raises InvalidArchive,
    ArchiveOfOtherBackbone, AlreadyExists, InvalidName, QuotaExceeded.
    """
    collection = collection or new_id("col")
    with Archive(path) as archive:
        contents = archive.verify(lambda share: progress(VERIFYING * share, "checking the archive"))
        arrival = _Arrival(storage, encoder, decoders, tenant, collection, archive, name, re_embed)
        delete.purge_collection(storage, tenant.id, collection)
        try:
            arrival.begin()
            for folder, members in groupby(archive.members(), key=lambda member: member.folder):
                if folder.startswith("videos/"):
                    parts = {member.name.removeprefix(f"{folder}/"): member for member in members}
                    arrival.take(folder.removeprefix("videos/"), parts)
                    share = max(member.offset for member in parts.values()) / archive.size
                    progress(VERIFYING + (1 - VERIFYING) * share, f"{len(arrival.ids)} of {contents.get('videos')} videos")
            if contents.get("videos") != len(arrival.ids):
                raise InvalidArchive(f"the archive holds {len(arrival.ids)} videos, its contents say {contents.get('videos')}")
            return arrival.reveal()
        except BaseException:
            delete.purge_collection(storage, tenant.id, collection)
            raise


def look(
    storage: Storage, encoder: Encoder, decoders: Decoders, tenant: Tenant, path: Path, name: str | None, re_embed: bool
) -> str:
    """The name that an import would give the collection. Raises what the archive's beginning is enough to refuse it for."""
    with Archive(path) as archive, storage.database.read() as connection:
        arrival = _Arrival(storage, encoder, decoders, tenant, "", archive, name, re_embed)
        arrival.check_room(connection)
        return arrival.name


def import_for_task(
    storage: Storage, encoder: Encoder, decoders: Decoders, task: Task, progress: Tell, start: Callable[[Video], None]
) -> dict[str, Any]:
    """The job of an import over HTTP; it may be run again after a crash. `start`: for videos that have yet to be indexed.

    Raises ImportFailed.
    """
    collection = _collection_of(task)
    with storage.database.read() as connection:
        tenant = tenant_rows.tenant_named(connection, task.request["tenant"])
        if (
            name := archive_rows.name_if_visible(connection, tenant.id, collection)
        ) is not None:  # a crash came after the last step
            return {"collection_id": collection, "collection": name}
    try:
        with storage.blobs.local(task.request["archive"]) as path:
            wish = {"name": task.request["collection"], "re_embed": task.request["re_embed"]}
            done = import_archive(storage, encoder, decoders, tenant, path, collection=collection, progress=progress, **wish)
    except tuple(CODES) as error:
        raise ImportFailed(CODES[type(error)], str(error)) from error
    for video in done.queued:
        start(video)
    return done.to_json()


def discard(storage: Storage, task: Task) -> None:
    """What an import that has ended needs no more: the stored archive, and whatever it has left out of sight."""
    storage.blobs.delete(task.request["archive"])
    delete.purge_collection(storage, task.tenant_id, _collection_of(task))


def _collection_of(task: Task) -> str:
    """The id of the collection that an import's task makes: the same at each of its starts."""
    return f"col_{task.id.removeprefix('task_')}"


class _Arrival:
    """An import under way: what the manifest promises, and what has been taken in, out of sight, of a checked archive."""

    def __init__(
        self,
        storage: Storage,
        encoder: Encoder,
        decoders: Decoders,
        tenant: Tenant,
        collection: str,
        archive: Archive,
        name: str | None,
        re_embed: bool,
    ) -> None:
        self._storage, self._encoder, self._decoders = storage, encoder, decoders
        self._tenant, self._collection, self._archive = tenant, collection, archive
        self.ids: set[str] = set()  # of the archive's videos that have been taken in
        self._new_ids: dict[str, str] = {}
        manifest = archive.manifest()
        try:
            theirs = manifest["collection"]
            self.name = name or str(theirs["name"])
            settings = dict(theirs["settings"])
            if 0 < (settings.get("segment_seconds") or 0) < SHORTEST_SEGMENT:  # of a version that knew no shortest
                settings["segment_seconds"] = SHORTEST_SEGMENT
            self._settings = settings_json(CollectionSettings(**settings))
            self._claims = {"collections": 1, "videos": _whole(manifest["videos"]), "bytes": _whole(manifest["bytes"])}
            fingerprint = str(manifest["backbone"]["fingerprint"])
            self.adapters = [(str(a["digest"]), _whole(a["version"]), _time(a["created_at"])) for a in manifest["adapters"]]
            self._generations = [
                (str(g["id"]), g["adapter"] and str(g["adapter"]), str(g["vector_set"]), g["active"] is True)
                for g in manifest["generations"]
            ]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InvalidArchive(f"{FIRST} is not what it should be: {_one_line(error)}") from error
        self.left_out: list[str] = []
        if fingerprint != encoder.backbone.fingerprint:
            if not re_embed:
                own, named = encoder.backbone, manifest["backbone"].get("name")
                raise ArchiveOfOtherBackbone(
                    f"the archive was made with backbone {named!r:.80} ({fingerprint:.12}), this one is {own.name} "
                    f"({own.fingerprint[:12]}): its frames can be embedded anew, its adapters cannot come along"
                )
            self.left_out, self.adapters = [digest for digest, _, _ in self.adapters], []
            self._generations = [("", None, "", True)]  # no archive has vectors of this name
        self._check_generations()

    def _check_generations(self) -> None:
        """As the house makes them: one is active, each adapter has one, and only the frozen one's vectors are shared."""
        frozen = [own for own, adapter, vector_set, _ in self._generations if adapter is None and own == vector_set]
        made_with = [adapter for _, adapter, _, _ in self._generations]
        digests = {digest for digest, _, _ in self.adapters}
        fits = all(s == own or [s] == frozen for own, _, s, _ in self._generations) and len(digests) == len(self.adapters)
        versions = {number for _, number, _ in self.adapters}
        if not (
            fits
            and sum(active for *_, active in self._generations) == 1
            and len({own for own, *_ in self._generations}) == len(set(made_with)) == len(made_with)
            and set(made_with) <= digests | {None}
            and len(versions) == len(digests)
            and all(0 < number < 1 << 31 for number in versions)
        ):
            raise InvalidArchive(f"{FIRST}: the generations and adapters do not fit together")

    def check_room(self, connection: Connection) -> None:
        """Raises QuotaExceeded, AlreadyExists, InvalidName."""
        tenant_rows.check_quota(connection, self._tenant, **self._claims)
        archive_rows.check_name_free(connection, self._tenant.id, self.name)

    def begin(self) -> None:
        """A collection that nobody sees yet, its adapters and generations."""
        tenant = self._tenant
        new = {own: new_id("gen") for own, *_ in self._generations}
        self._sets = {own: new[own] for own, _, vector_set, _ in self._generations if own == vector_set}
        self._active_set, active = next((shared, new[own]) for own, _, shared, is_active in self._generations if is_active)
        with self._storage.database.write() as connection:
            self.check_room(connection)
            archive_rows.add_hidden_collection(connection, tenant, self._collection, self.name, self._settings, active)
        parts = {m.name: m for m in takewhile(lambda m: not m.name.startswith("videos/"), self._archive.members())}
        manifests = []
        for digest, number, created_at in self.adapters:
            try:
                data = self._archive.read(parts[f"adapters/{digest}.safetensors"], adapters_store.artifact.MAX_BYTES)
                told = self._archive.json(parts[f"adapters/{digest}.json"])
                train.check_adapter(self._storage, self._encoder, data)
                manifest = adapters_store.describe(data, **self._origin(told))
                if manifest.digest != digest:
                    raise InvalidArchive("it is another one")
            except (KeyError, TypeError, ValueError) as error:
                raise InvalidArchive(f"adapter {digest:.12}: {_one_line(error)}") from error
            self._storage.blobs.put(adapter_key(self._collection, digest), data)
            manifests.append((number, manifest.to_json(), created_at))
        scopes = {told["digest"]: told["scope"] for _, told, _ in manifests}
        if any(own != vector_set and scopes[str(a)] != "text" for own, a, vector_set, _ in self._generations):
            raise InvalidArchive(f"{FIRST}: an adapter of both towers has no vectors of its own")
        with self._storage.database.write() as connection:
            rows: dict[str | None, str | None] = {None: None}
            for number, told, created_at in manifests:
                added = archive_rows.add_moved_adapter(connection, tenant.id, self._collection, number, told, created_at)
                rows[told["digest"]] = added
            for own, adapter, vector_set, is_active in self._generations:
                archive_rows.add_moved_generation(
                    connection, tenant.id, self._collection, new[own], rows[adapter],
                    self._encoder.backbone.fingerprint, new[vector_set], is_active,
                )  # fmt: skip

    def take(self, theirs: str, parts: Mapping[str, Member]) -> None:
        """One video: its blobs, then its rows."""
        if theirs in self.ids or "video.json" not in parts:
            raise InvalidArchive(f"videos/{theirs}: there twice, or without its video.json")
        self.ids.add(theirs)
        collection, video = self._collection, self._new_id(theirs)
        with tempfile.TemporaryDirectory(dir=self._storage.settings.scratch, prefix="import-") as name:
            folder = Path(name)
            try:
                row, captions, facts = _told(self._archive.json(parts["video.json"]))
                decoded = self._frames(parts["frames.zip"], facts, folder) if facts is not None else None
                rows = self._vectors(parts, decoded) if decoded is not None else {}
                if "file" in parts:
                    self._file(parts["file"], row, folder / "file")
                elif decoded is None:
                    raise InvalidArchive("it has neither frames nor its file")
            except (KeyError, DecodeError, vectors.InvalidVectors, InvalidArchive) as error:
                raise InvalidArchive(f"videos/{theirs}: {_one_line(error)}") from error
            if "file" in parts:
                self._storage.blobs.put_file(video_key(collection, video), folder / "file")
            if decoded is not None:
                for ordinal, segment in enumerate(decoded.segments):
                    thumbnail = self._thumbnail(parts.get(f"thumbnails/{ordinal:04d}.jpg"), folder / segment.thumbnail_file)
                    self._storage.blobs.put(thumbnail_key(collection, video, ordinal), thumbnail)
                self._storage.blobs.put(frames_key(collection, video), pack_frames(decoded, folder))
                row["media"] = {**asdict(decoded.facts), "segments": len(decoded.segments)}
                row["media"] |= {} if "file" in parts else {"stored": False}
        row["status"] = "pending" if decoded is None else "ready" if self._active_set in rows else "queued"
        with self._storage.database.write() as connection:
            archive_rows.add_moved_video(connection, self._tenant.id, collection, {"id": video, **row}, captions)
            for vector_set, segments in rows.items():
                segment_rows.add_segments(connection, self._tenant.id, video, self._sets[vector_set], segments)

    def reveal(self) -> Imported:
        with self._storage.database.write() as connection:
            queued = archive_rows.reveal(connection, self._tenant, self._collection)
        return Imported(self._collection, self.name, len(self.ids), queued, len(self.adapters), self.left_out)

    def _new_id(self, theirs: str) -> str:
        return self._new_ids.setdefault(theirs, new_id("vid"))

    def _origin(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """What an adapter's manifest tells beyond the file itself, with the videos that it names under their new ids."""
        facts = {name: told.get(name) or {} for name in ("recipe", "metrics", "data")}
        sides = [dict(facts["metrics"]).get(side, {}) for side in ("before", "after", "in_use")]
        if not all(_is_dict(value) and _is_dict(value.get("text_to_video", {})) for value in [*facts.values(), *sides]):
            raise InvalidArchive("the manifest of an adapter is not what it should be")
        held_out = facts["data"].get("validation_videos", [])
        if held_out:
            facts["data"]["validation_videos"] = sorted(self._new_id(str(video)) for video in held_out)
        parent = told.get("parent")
        return {**facts, "parent": str(parent)[:64] if parent else None, "created_at": _time(told.get("created_at"))}

    def _frames(self, member: Member, facts: MediaFacts, folder: Path) -> DecodedVideo:
        """The frames, each looked at in the decoder's cage, in `folder`."""
        if member.size > (limit := self._storage.settings.decode_output_bytes):
            raise InvalidArchive(f"{member.name} may have {limit} bytes, it has {member.size}")
        with (folder / "frames.zip").open("wb") as file:
            file.writelines(self._archive.chunks(member))
        return self._decoders.reopen(
            folder / "frames.zip", folder, facts, sampling(self._storage, self._encoder, self._settings)
        )

    def _vectors(self, parts: Mapping[str, Member], decoded: DecodedVideo) -> dict[str, list[dict[str, Any]]]:
        segments = [(s.start, s.end, len(s.frame_files)) for s in decoded.segments]
        found = {own: parts.get(f"vectors/{own}.safetensors") for own in self._sets}
        dim = self._encoder.backbone.embed_dim
        return {
            own: vectors.unpack(self._archive.read(member, VECTORS_BYTES), dim, segments)
            for own, member in found.items()
            if member is not None
        }

    def _file(self, member: Member, row: Mapping[str, Any], path: Path) -> None:
        """The uploaded file, with the checks of an upload."""
        if member.size != row["size"] or member.size > self._storage.settings.max_video_bytes:
            raise InvalidArchive(f"the file has {member.size} bytes: not what its record says, or over the limit of an upload")
        digest, head = hashlib.sha256(), b""
        with path.open("wb") as file:
            for chunk in self._archive.chunks(member):
                head = head or chunk[:HEAD_BYTES]
                digest.update(chunk)
                file.write(chunk)
        if not looks_like_video(head):
            raise InvalidArchive("the file does not begin like any video container")
        if digest.hexdigest() != row["sha256"]:
            raise InvalidArchive("the file is not the one of its record")

    def _thumbnail(self, member: Member | None, made: Path) -> bytes:
        """Theirs if it looks like a JPEG: only browsers read it."""
        data = self._archive.read(member, THUMBNAIL_BYTES) if member is not None else b""
        return data if data.startswith(b"\xff\xd8\xff") else made.read_bytes()


def _told(record: Mapping[str, Any]) -> tuple[dict[str, Any], list[Caption], MediaFacts | None]:
    """A video's row, captions and facts. Raises InvalidArchive."""
    media = record.get("media")
    try:
        if len(record["captions"]) > MAX_CAPTIONS:
            raise ValueError(f"a video may have {MAX_CAPTIONS} captions, it has {len(record['captions'])}")
        captions = [CaptionIn(**each) for each in record["captions"]]
        size, sha256, metadata = record["size"], record["sha256"], record["metadata"]
        label = "".join(c for c in re.split(r"[/\\]", record["filename"])[-1] if c.isprintable())[:255] or "video"
        if not (_is_int(size) and re.fullmatch("[0-9a-f]{64}", sha256) and _is_dict(metadata)):
            raise ValueError("size, sha256 or metadata")
        facts = None if media is None else MediaFacts(**{each.name: media[each.name] for each in fields(MediaFacts)})
        if facts is not None and not all(KINDS[each.type](getattr(facts, each.name)) for each in fields(facts)):
            raise ValueError("media")
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArchive(f"video.json is not what it should be: {_one_line(error)}") from error
    row = {"filename": label, "sha256": sha256, "size": size, "metadata": metadata}
    return {**row, "created_at": _time(record.get("created_at"))}, [Caption(c.text, c.start, c.end) for c in captions], facts


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _whole(value: Any) -> int:
    if not _is_int(value):
        raise ValueError(f"{value!r:.40} is no whole number")
    return int(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


KINDS: dict[Any, Callable[[Any], bool]] = {  # of a video's facts
    "int": _is_int,
    "float": lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf,
    "str": lambda value: isinstance(value, str) and len(value) <= 100 and value.isprintable(),
}


def _time(value: Any) -> str:
    """A time as the tables hold it; now, where it is none."""
    return value if isinstance(value, str) and TIME.fullmatch(value) else now()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
