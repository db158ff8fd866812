"""A data folder without a server: one tenant, its collections, small real MP4 files, and everything that is in it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from serving import clip
from sqlalchemy import func, select

import adapters_store
from backbone import AdapterShape
from service.adapters import activate as generations
from service.adapters.adapter_rows import AdapterVersion
from service.adapters.publish import publish
from service.cli.parts import Parts
from service.search.query import Searcher
from service.settings import Settings
from service.storage import collection_rows, tenant_rows
from service.storage.blobs import video_key
from service.storage.collection_rows import Collection
from service.storage.tables import metadata, new_id
from service.storage.tenant_rows import Tenant
from service.upkeep import archive_rows
from service.videos import video_rows
from service.videos.index import index_video
from service.videos.video_rows import Caption, Video
from training.progress import unheard


class House:
    """`with House(folder)`: a data folder, and its first tenant."""

    def __init__(self, folder: Path, tenant: str = "default", **settings: Any) -> None:
        self.parts = Parts.over(Settings(data=folder, threads=1, **settings))
        self.storage, self.encoder, self.decoders = self.parts.storage, self.parts.encoder, self.parts.decoders
        self.tenant = self.add_tenant(tenant)

    def __enter__(self) -> House:
        return self

    def __exit__(self, *_: object) -> None:
        self.parts.close()

    def add_tenant(self, name: str, **quotas: int) -> Tenant:
        with self.storage.database.write() as connection:
            return tenant_rows.create_tenant(connection, name, quotas)

    def add_collection(self, name: str, **settings: Any) -> Collection:
        fingerprint = self.encoder.backbone.fingerprint
        with self.storage.database.write() as connection:
            return collection_rows.create_collection(connection, self.tenant, name, settings, fingerprint)

    def add_video(self, collection: Collection, number: int, seconds: float = 1.0, index: bool = True) -> Video:
        """A clip with a caption and metadata; `index` False: it stays pending."""
        data, video = clip(number, seconds), new_id("vid")
        self.storage.blobs.put(video_key(collection.id, video), data)
        row = (f"clip-{number}.mp4", hashlib.sha256(data).hexdigest(), len(data), {"number": number})
        with self.storage.database.write() as connection:
            captions = [Caption(f"colour number {number}", 0.0, seconds), Caption("ein Ball für Zoë")]
            video_rows.add_video(connection, self.tenant.id, collection.id, video, *row, captions)
        if index:
            index_video(self.storage, self.encoder, self.decoders, self.tenant.id, video)
        return self.video(video)

    def add_adapter(
        self, collection: Collection, seed: int, scope: Literal["both", "text", "vision"] = "both", held_out: Sequence[str] = ()
    ) -> AdapterVersion:
        """A version with random weights that matter, in use at once."""
        backbone = self.encoder.backbone
        shape = AdapterShape(backbone.dims, rank=2, shared=0, scope=scope)
        tensors = {name: 30 * tensor for name, tensor in shape.initial(seed).items()}
        data = adapters_store.pack(shape, backbone.fingerprint, tensors)
        manifest = adapters_store.describe(
            data, data={"validation_videos": list(held_out)}, recipe={"seed": seed}, words=["kilo"]
        )
        version = publish(self.storage, self.encoder, self.tenant.id, collection.id, data, manifest)
        self.activate(collection, version.id)
        return version

    def activate(self, collection: Collection, adapter: str | None) -> int:
        """The number of videos that had to be embedded."""
        return generations.activate(
            self.storage, self.encoder, self.decoders, self.tenant.id, collection.id, adapter, unheard
        ).embedded

    def collection(self, name: str, tenant: Tenant | None = None) -> Collection:
        with self.storage.database.read() as connection:
            return collection_rows.collection_named(connection, (tenant or self.tenant).id, name)

    def video(self, video: str) -> Video:
        with self.storage.database.read() as connection:
            return video_rows.video(connection, self.tenant.id, video)

    def videos(self, name: str, tenant: Tenant | None = None) -> dict[str, Video]:
        """The collection's videos by file name."""
        found = self.collection(name, tenant)
        with self.storage.database.read() as connection:
            return {v.filename: v for v in archive_rows.videos_after(connection, found.tenant_id, found.id, "", 1000)}

    def captions(self, video: Video) -> list[Caption]:
        with self.storage.database.read() as connection:
            return video_rows.captions_of(connection, video.tenant_id, [video.id])[video.id]

    def scores(self, name: str, tenant: Tenant | None = None, text: str = "a red ball") -> list[tuple[str, int, float]]:
        """(file name, segment, score) of every hit, best first."""
        with closing(Searcher(self.storage, self.encoder)) as searcher:
            found = searcher.search((tenant or self.tenant).id, name, text, group_by="segment", wanted=100)
        return [(hit.video.filename, hit.segment, hit.score) for hit in found.hits]

    def inventory(self) -> tuple[dict[str, int], set[str]]:
        """How many rows each table has, but for the installation's own facts, and the keys of all blobs."""
        with self.storage.database.read() as connection:
            tables = [table for table in metadata.sorted_tables if table.name != "house"]
            rows = {t.name: connection.scalar(select(func.count()).select_from(t)) or 0 for t in tables}
        kinds = ("videos", "frames", "thumbnails", "adapters", "imports")
        return rows, {key for kind in kinds for key in self.storage.blobs.keys(f"{kind}/")}
