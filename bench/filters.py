"""Filters over 100,000 videos in SQLite, 512 dimensions, 200 candidates: the first stage of a search whose filter lets 1 % or
50 % of the videos through, by a word, a number, a duration, a time and an element of a list; against the naive way, which
reads the metadata of all videos and judges each in Python. Processor time of one thread, the index's scan included."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import insert

from bench.timing import Row, compare
from indexer.index import IndexView
from service.search import filters
from service.search.allowed import Allowed, nearest
from service.settings import Settings
from service.storage import collection_rows, tenant_rows
from service.storage.storage import Storage
from service.storage.tables import videos
from service.videos import video_rows

VIDEOS, DIM, K = 100_000, 512, 200
FILTERS: dict[str, dict[str, Any]] = {
    "1 %, a word": {"metadata.place": "hall 7"},
    "1 %, a number": {"metadata.shelf": 7},
    "1 %, a duration": {"duration": {"lt": 1.0}},
    "1 %, a time": {"metadata.at": {"gte": "2026-12-28T09:00:00Z"}},
    "1 %, an element": {"metadata.tags": "tag 7"},
    "50 %, a word": {"metadata.camera": "north"},
    "50 %, a number": {"metadata.shelf": {"gte": 50}},
    "50 %, a time": {"metadata.at": {"gte": "2026-07-02T12:00:00Z"}},
}


def run() -> list[Row]:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(Settings(data=Path(folder)))
        storage.prepare()
        tenant, collection, ids = fill(storage)
        view = IndexView(DIM)
        vectors = rng.normal(size=(VIDEOS, DIM)).astype(np.float16)
        row = {"ordinal": 0, "start": 0.0, "end": 5.0}
        view.apply({**row, "seq": i + 1, "video_id": video, "pooled": vectors[i].tobytes()} for i, video in enumerate(ids))
        query = rng.normal(size=DIM).astype(np.float32)
        rows: list[Row] = []
        for name, where in FILTERS.items():
            parsed = filters.parse(where)

            def ours(parsed: filters.Filter = parsed) -> object:
                return nearest(view, query, K, Allowed(storage.database, tenant, collection, parsed, threading.Event(), 60))

            def naive(parsed: filters.Filter = parsed) -> object:
                with storage.database.read() as connection:
                    values = video_rows.filterable(connection, tenant, collection, parsed.metadata, ids)
                    return view.search(query, K, {video for video, each in values if parsed.matches(each)})

            assert [hit.seq for hit in ours()] == [hit.seq for hit in naive()]  # type: ignore[attr-defined]
            ways: dict[str, Callable[[], object]] = {f"{name}: read into Python": naive, f"{name}: in the database": ours}
            rows += compare(ways, f"{name}: read into Python", rounds=3, warmup=1, clock=time.thread_time)
        plain: dict[str, Callable[[], object]] = {"no filter": lambda: view.search(query, K)}
        rows += compare(plain, "no filter", rounds=3, warmup=1, clock=time.thread_time)
        storage.close()
        return rows


def fill(storage: Storage) -> tuple[str, str, list[str]]:
    """Tenant, collection and the ids of its videos."""
    with storage.database.write() as connection:
        tenant = tenant_rows.create_tenant(connection, "bench", {})
        collection = collection_rows.create_collection(connection, tenant, "bench", {}, "no backbone")
        ids = [f"vid_{i:026d}" for i in range(VIDEOS)]
        same = {"tenant_id": tenant.id, "collection_id": collection.id, "size": 1_000_000, "status": "ready"}
        times = {"created_at": "2026-01-31T12:00:00.000000Z", "updated_at": "2026-01-31T12:00:00.000000Z"}
        for first in range(0, VIDEOS, 5000):
            rows = [
                {
                    **same, **times, "id": ids[i], "task_id": f"task_{i:026d}", "filename": f"{i}.mp4", "sha256": f"{i:064x}",
                    "media": {"duration": i * 37 % 1000 / 10, "width": 1280, "height": 720, "fps": 25.0, "codec": "h264",
                              "container": "mov,mp4,m4a", "frames": 312, "decoder": "pyav", "segments": 1},
                    "metadata": {"camera": ("north", "south")[i % 2], "shelf": i * 17 % 100, "place": f"hall {i * 31 % 100}",
                                 "at": str(np.datetime64("2026-01-01T00:00:00") + i * 7919 % VIDEOS * 315) + "Z",
                                 "tags": [f"tag {i * 13 % 100}", "all"]},
                }
                for i in range(first, first + 5000)
            ]  # fmt: skip
            connection.execute(insert(videos), rows)
    return tenant.id, collection.id, ids
