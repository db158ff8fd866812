"""Index views by size, 512 dimensions, one thread, 200 candidates: flat in float32 (what FAISS does by itself), our flat view
(float16), our approximate view (inverted lists of 8-bit vectors) and HNSW (8 bits, 16 links); then the approximate view with a
filter, and how long a view takes to open from its snapshot and from its rows in SQLite. The vectors are synthetic but shaped
like CLIP's: topics of Zipf sizes in a decaying spectrum, videos of four near segments, texts off the pictures' side. `recall`
is the share of the 200 that the flat scan finds too. Last, 2,000 collections of three videos."""

from __future__ import annotations

import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray
from sqlalchemy import insert

from bench.serving import BACKBONE
from bench.timing import Row
from indexer.index import IndexView, use_one_thread
from service.adapters.encoder import Encoder
from service.cli.parts import Parts
from service.search.views import Views
from service.settings import Settings
from service.storage import collection_rows, tenant_rows
from service.storage.generation_rows import Generation
from service.storage.storage import Storage
from service.storage.tables import segments

faiss: Any = _faiss
DIM, K, QUERIES = 512, 200, 60
SIZES = (10_000, 50_000, 200_000)
TINY = 2000


def run() -> list[Row]:
    use_one_thread()
    with tempfile.TemporaryDirectory() as folder:
        parts = Parts.over(Settings(data=Path(folder), backbone=BACKBONE, pretrained="random"))
        with parts.storage.database.write() as connection:
            tenant_rows.create_tenant(connection, "bench", {})
        try:
            small = tiny(parts.storage, parts.encoder)  # first, while the process has no freed memory to give them
            rows = []
            for size in SIZES:
                vectors, queries = clip_like(size)
                rows += searches(vectors, queries) + opening(parts.storage, parts.encoder, vectors)
            return rows + small
        finally:
            parts.close()


def clip_like(count: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Unit vectors of pictures (count, DIM), exact in float16, and of texts (QUERIES, DIM)."""
    rng = np.random.default_rng(0)
    spectrum = (1 + np.arange(DIM)) ** -0.5
    spectrum /= np.linalg.norm(spectrum)
    basis = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0]
    topics, videos = max(50, count // 100), count // 4
    centres = rng.normal(size=(topics, DIM)) * spectrum
    popular = np.arange(1, topics + 1) ** -0.8
    shown = centres[rng.choice(topics, videos, p=popular / popular.sum())]
    shown += 0.8 * rng.normal(size=shown.shape) * spectrum
    pictures = np.repeat(shown, 4, axis=0) + 0.35 * rng.normal(size=(count, DIM)) * spectrum
    texts = 0.6 * shown[rng.integers(videos, size=QUERIES)] + 0.5 * rng.normal(size=(QUERIES, DIM)) * spectrum
    sides = rng.normal(size=(2, DIM))
    sides *= 0.9 / np.linalg.norm(sides, axis=1, keepdims=True)
    found = [(vectors + side) @ basis for vectors, side in ((pictures, sides[0]), (texts, sides[1]))]
    unit = [(v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float16).astype(np.float32) for v in found]
    return unit[0], unit[1]


@dataclass(frozen=True, slots=True)
class Way:
    """A way to the best K of a query: their positions."""

    name: str
    search: Callable[[NDArray[np.float32]], Sequence[int]]
    bytes: int
    built: float  # seconds


def searches(vectors: NDArray[np.float32], queries: NDArray[np.float32]) -> list[Row]:
    flat, approximate = IndexView(DIM), IndexView(DIM)
    naive, graph = faiss.IndexFlatIP(DIM), faiss.IndexHNSWSQ(DIM, faiss.ScalarQuantizer.QT_8bit, 16, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = 80
    wide = faiss.SearchParametersHNSW(efSearch=4 * K)
    approximate.apply(numbered(vectors))
    built = [
        seconds(lambda: naive.add(vectors)),
        seconds(lambda: flat.apply(numbered(vectors))),
        seconds(approximate.settle),
        seconds(lambda: (graph.train(vectors[:20_000]), graph.add(vectors))),
    ]

    def plain(index: Any, params: Any = None) -> Callable[[NDArray[np.float32]], Sequence[int]]:
        return lambda query: index.search(query[None], K, params=params)[1][0].tolist()

    def ours(view: IndexView, videos: set[str] | None = None) -> Callable[[NDArray[np.float32]], Sequence[int]]:
        return lambda query: [hit.seq - 1 for hit in view.search(query, K, videos)]

    rows = against_the_first(
        f"{len(vectors):,}",
        queries,
        Way("flat float32", plain(naive), vectors.nbytes, built[0]),
        Way("our flat view", ours(flat), flat.bytes, built[1]),
        Way("our approximate view", ours(approximate), approximate.bytes, built[2]),
        Way("HNSW", plain(graph, wide), len(vectors) * (DIM + 16 * 2 * 4 + 16), built[3]),
    )
    for share in (0.01, 0.5) if len(vectors) == SIZES[-1] else ():
        videos = {f"v{i}" for i in np.random.default_rng(0).permutation(len(vectors) // 4)[: int(share * len(vectors) / 4)]}
        rows += against_the_first(
            f"{len(vectors):,}, {share:.0%} allowed",
            queries,
            Way("our flat view", ours(flat, videos), flat.bytes, built[1]),
            Way("our approximate view", ours(approximate, videos), approximate.bytes, built[2]),
        )
    return rows


def against_the_first(what: str, queries: NDArray[np.float32], *ways: Way) -> list[Row]:
    rows: list[Row] = []
    truth: list[set[int]] = []
    for way in ways:
        found, times = [], []
        for query in queries:
            started = time.perf_counter()
            found.append(set(way.search(query)))
            times.append(1000 * (time.perf_counter() - started))
        truth = truth or found
        recall = float(np.mean([len(mine & theirs) / len(theirs) for mine, theirs in zip(found, truth, strict=True)]))
        name = f"{what}: {way.name}, recall {recall:.3f}, {way.bytes / 1e6:.0f} MB, built in {way.built:.1f} s"
        low, median, high = np.percentile(times, (10, 50, 90)).tolist()
        against = f"of {ways[0].name}" if rows else "(naive)"
        rows.append(Row(name, median, low, high, median / rows[0].median_ms if rows else 1.0, against))
    return rows


def opening(storage: Storage, encoder: Encoder, vectors: NDArray[np.float32]) -> list[Row]:
    """A view opened by a process that has none: from all rows, and from the snapshot that was written beside."""
    tenant, generation = collection(storage, encoder, f"films-{len(vectors)}")
    frames = np.zeros((12, DIM), np.float16).tobytes()
    for first in range(0, len(vectors), 5000):
        with storage.database.write() as connection:
            part = [{**row, "frames": frames} for row in table(vectors[first : first + 5000], first)]
            connection.execute(insert(segments), [row | {"vector_set": generation.vector_set} for row in part])
    times: dict[str, list[float]] = {"from its rows": [], "from its snapshot": []}
    for name, turns in (("from its rows", 1), ("from its snapshot", 5)):
        for _ in range(turns):
            views, done = Views(storage, encoder), threading.Event()
            times[name].append(1000 * seconds(lambda views=views: views.view(tenant, generation)))  # type: ignore[misc]
            views.beside(done.set)
            done.wait()
            views.close()
    rows: list[Row] = []
    for name, taken in times.items():
        low, median, high = np.percentile(taken, (10, 50, 90)).tolist()
        ratio = median / rows[0].median_ms if rows else 1.0
        rows.append(Row(f"{len(vectors):,}: opened {name}", median, low, high, ratio, "of its rows" if rows else "(naive)"))
    return rows


def tiny(storage: Storage, encoder: Encoder) -> list[Row]:
    """Opening and searching many small views, and what each adds to the process's memory."""
    vectors, _ = clip_like(12)
    made = []
    for i in range(TINY):
        tenant, generation = collection(storage, encoder, f"tiny-{i}")
        with storage.database.write() as connection:
            rows = [{**row, "frames": b"", "vector_set": generation.vector_set} for row in table(vectors[:3])]
            connection.execute(insert(segments), rows)
        made.append(generation)
    views = Views(storage, encoder)
    for g in made[:20]:
        views.view(tenant, g).search(vectors[0], K)
    before = resident()
    times = [1000 * seconds(lambda g=g: views.view(tenant, g).search(vectors[0], K)) for g in made[20:]]  # type: ignore[misc]
    low, median, high = np.percentile(times, (10, 50, 90)).tolist()
    grown = (resident() - before) / (TINY - 20)
    views.close()
    return [
        Row(f"{TINY:,} collections of 3 segments: open and search one, {grown / 1e3:.1f} kB each", median, low, high, 1, "")
    ]


def collection(storage: Storage, encoder: Encoder, name: str) -> tuple[str, Generation]:
    backbone = encoder.backbone.fingerprint
    with storage.database.write() as connection:
        tenant = tenant_rows.tenant_named(connection, "bench")
        collection_rows.create_collection(connection, tenant, name, {}, backbone)
        return tenant.id, collection_rows.active_generation(connection, tenant.id, name)[1]


def table(vectors: NDArray[np.float32], first: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of `segments`, four segments to a video."""
    for i, vector in enumerate(vectors, start=first):
        row = {"video_id": f"v{i // 4}", "ordinal": i % 4, "start": 5.0 * (i % 4), "end": 5.0 * (i % 4) + 5}
        yield {**row, "pooled": vector.astype(np.float16).tobytes()}


def numbered(vectors: NDArray[np.float32]) -> Iterator[dict[str, Any]]:
    return ({**row, "seq": seq} for seq, row in enumerate(table(vectors), start=1))


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
