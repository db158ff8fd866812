"""A search inside one process, built-in backbone, 2,000 one-segment videos of one collection: a query whose text is new, a
query whose text is in the cache, and the first stage alone (no rescoring); against the naive way, which reads every vector
from the database for each query."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import numpy as np
import torch

from backbone import q_score
from bench.timing import Row, compare
from service.adapters.encoder import Encoder
from service.cli.parts import Parts
from service.search.query import Searcher
from service.settings import Settings
from service.storage import collection_rows, segment_rows, tenant_rows
from service.storage.storage import Storage
from service.videos import video_rows

VIDEOS = 2_000


def run() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        parts = Parts.over(Settings(data=Path(folder)))
        tenant, generation = fill(parts.storage, parts.encoder)
        searcher = Searcher(parts.storage, parts.encoder)
        number = itertools.count()

        def naive() -> object:
            tokens = parts.encoder.backbone.tokenize([f"a naive query {next(number)}"]).ids
            with torch.inference_mode():
                query = parts.encoder.backbone.encode_text(tokens)
            with parts.storage.database.read() as connection:
                rows = segment_rows.segments_after(connection, tenant, generation, 0, VIDEOS)
                frames = segment_rows.frame_vectors(connection, tenant, generation, [row["seq"] for row in rows])
            stored = np.stack([np.frombuffer(f, np.float16).reshape(12, -1) for f in frames.values()]).astype(np.float32)
            return q_score(query, torch.from_numpy(stored)).argsort(descending=True)[:10]

        try:
            return compare(
                {
                    "naive: read and score all": naive,
                    "new text": lambda: searcher.search(tenant, "bench", f"a query {next(number)}"),
                    "cached text": lambda: searcher.search(tenant, "bench", "always the same"),
                    "cached text, no rescoring": lambda: searcher.search(tenant, "bench", "always the same", exact=False),
                },
                naive="naive: read and score all",
            )
        finally:
            parts.close()


def fill(storage: Storage, encoder: Encoder) -> tuple[str, str]:
    """A collection of random vectors; returns the tenant's id and the generation's."""
    rng = np.random.default_rng(0)
    dim = encoder.backbone.embed_dim
    with storage.database.write() as connection:
        tenant = tenant_rows.create_tenant(connection, "bench", {})
        collection = collection_rows.create_collection(connection, tenant, "bench", {}, encoder.backbone.fingerprint)
        for i in range(VIDEOS):
            video = f"vid_{i:05d}"
            video_rows.add_video(connection, tenant.id, collection.id, video, f"{i}.mp4", f"{i}", 1, {}, [])
            video_rows.set_video(connection, tenant.id, video, status="ready", media={"duration": 5.0})
            frames = rng.normal(size=(12, dim)).astype(np.float16)
            pooled = frames.astype(np.float32).mean(0)
            row = {"ordinal": 0, "start": 0.0, "end": 5.0, "frames": frames.tobytes()}
            row["pooled"] = (pooled / np.linalg.norm(pooled)).astype(np.float16).tobytes()
            segment_rows.add_segments(connection, tenant.id, video, collection.active_generation_id, [row])
    return tenant.id, collection.active_generation_id
