"""Indexing, ViT-B/32 with random weights: 24 H.264 videos of 640 × 360 and 10 seconds, 12 frames each. Decoding alone (in the
sandbox, frames and thumbnails stored), encoding alone (from the stored frames, vectors stored), both one after the other, and
the pipeline as the worker runs it. A row's time is that of one video. Where decoding and encoding share the cores, the
pipeline can at best be as fast as the two one after the other on all cores; with a GPU, as the slower of the two. Last, a few
videos encoded in bfloat16, which not every processor multiplies by itself."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np

from bench.timing import Row
from service.adapters.encoder import Encoder
from service.cli.parts import Parts
from service.jobs.queue import QUEUES
from service.settings import Settings
from service.storage import collection_rows, tenant_rows
from service.storage.blobs import video_key
from service.storage.storage import Storage
from service.storage.tables import new_id
from service.videos import index, video_rows

VIDEOS, FEW, SECONDS, SIZE = 24, 8, 10, (640, 360)


def run() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(data=Path(folder), backbone="ViT-B-32", pretrained="random")
        parts = Parts.over(settings)
        with parts.storage.database.write() as connection:
            tenant = tenant_rows.create_tenant(connection, "bench", {})
        files = [film(seed) for seed in range(VIDEOS)]
        warm = put(parts.storage, parts.encoder, tenant, "warm", files[:2])
        for video in warm:
            index.index_video(parts.storage, parts.encoder, parts.decoders, tenant.id, video)
        apart = put(parts.storage, parts.encoder, tenant, "apart", files)
        decode = timed(
            apart, lambda video: index.prepare_frames(parts.storage, parts.encoder, parts.decoders, tenant.id, video)
        )
        encode = timed(apart, lambda video: index.embed_video(parts.storage, parts.encoder, parts.decoders, tenant.id, video))
        both = timed(
            put(parts.storage, parts.encoder, tenant, "both", files),
            lambda video: index.index_video(parts.storage, parts.encoder, parts.decoders, tenant.id, video),
        )
        few = put(parts.storage, parts.encoder, tenant, "few", files[: 1 + FEW])
        timed(few, lambda video: index.prepare_frames(parts.storage, parts.encoder, parts.decoders, tenant.id, video))
        parts.close()
        half = Parts.over(settings.model_copy(update={"precision": "bfloat16"}))
        index.embed_video(half.storage, half.encoder, half.decoders, tenant.id, few[0])
        halved = (
            timed(few[1:], lambda video: index.embed_video(half.storage, half.encoder, half.decoders, tenant.id, video))
            * VIDEOS
            / FEW
        )
        half.close()
    slower = max(decode, encode)
    return [
        row("decoding alone", decode, decode / slower, "of the slower of the two"),
        row("encoding alone", encode, encode / slower, "of the slower of the two"),
        row("decoding, then encoding", decode + encode, (decode + encode) / slower, "of the slower of the two"),
        row("indexing", both, both / slower, "of the slower of the two"),
        row("indexing", both, both / (decode + encode), "of decoding, then encoding"),
        row("encoding alone in bfloat16", halved, halved / encode, "of encoding alone"),
    ]


def row(what: str, seconds: float, ratio: float, against: str) -> Row:
    each = 1000 * seconds / VIDEOS
    return Row(f"{what}: {VIDEOS / seconds:.2f} videos/s", each, each, each, ratio, against)


def timed(videos: list[str], work: Callable[[str], object]) -> float:
    """Seconds for all videos, as many at once as the worker takes."""
    with ThreadPoolExecutor(QUEUES["index"].at_once) as pool:
        started = time.perf_counter()
        for _ in pool.map(work, videos):
            pass
        return time.perf_counter() - started


def put(storage: Storage, encoder: Encoder, tenant: tenant_rows.Tenant, name: str, files: list[bytes]) -> list[str]:
    """A collection that has received these files; the videos' ids."""
    fingerprint = encoder.backbone.fingerprint  # loaded outside of the transaction below: it writes in one of its own
    with storage.database.write() as connection:
        collection = collection_rows.create_collection(connection, tenant, name, {}, fingerprint)
    videos = []
    for number, data in enumerate(files):
        video = new_id("vid")
        storage.blobs.put(video_key(collection.id, video), data)
        with storage.database.write() as connection:
            video_rows.add_video(connection, tenant.id, collection.id, video, "film.mp4", str(number), len(data), {}, [])
        videos.append(video)
    return videos


def film(seed: int) -> bytes:
    """An MP4 file of drifting coloured clouds."""
    rng = np.random.default_rng(seed)
    clouds = rng.integers(0, 256, (1, 3, 24, 40)).astype(np.float32)
    big = np.kron(clouds[0].transpose(1, 2, 0), np.ones((20, 20, 1), np.float32)).astype(np.uint8)
    memory = BytesIO()
    with av.open(memory, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for frame in range(25 * SECONDS):
            shift = frame % (big.shape[1] - SIZE[0])
            picture = np.ascontiguousarray(big[: SIZE[1], shift : shift + SIZE[0]])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return memory.getvalue()
