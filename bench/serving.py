"""Searches over HTTP, ViT-B/32 with random weights, 64 collections of 8 tenants, each with an adapter of its own and 200
videos: closed-loop clients that each ask a new text of about 12 tokens, of collections drawn uniformly or by zipf's law. Our
service and the naive one (`bench/naive.py`) take turns on the same machine, which also runs the clients. A row's time is that
of one query; the ratio is of queries a second, ours to the naive one's, at as many clients: there, more is faster. It is the
median of the turns, and may differ from the ratio of the whole rates. Then where one query's time goes with one client of the
standard library: the stages as the answer's `timings_ms` tells them, and what HTTP
and the framework add to their sum."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import httpx
import numpy as np
from numpy.typing import NDArray

from bench.timing import Row

BACKBONE = "ViT-B-32"
TENANTS, EACH, VIDEOS, FRAMES = 8, 8, 200, 12
# Clients: turns of each service, and seconds of a turn: twice what the naive one needs to answer every client once, or more.
TURNS = {1: (3, 3.0), 8: (3, 4.0), 32: (3, 8.0), 128: (1, 30.0)}
WORDS = ("red", "dog", "man", "car", "runs", "small", "large", "near", "street", "water", "plays", "green", "black", "old")
ROOT_KEY = "bench-operator-key"
_seeds = itertools.count()


@dataclass(frozen=True, slots=True)
class Listing:
    """What the naive service knows of a collection."""

    collection: str
    key: str
    adapter: Path
    videos: list[str]
    pooled: NDArray[np.float32]  # (videos, D)
    frames: list[bytes]


def run() -> list[Row]:
    rows, of_one = [], []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        fill(data)
        targets = [(listing.collection, listing.key) for listing in listings(data)]
        with ours(data) as mine, naive(data) as theirs:
            for law in ("uniform", "zipf"):
                for clients in TURNS:
                    rows += paired({"naive": theirs, "ours": mine}, targets, law, clients)
            of_one = split(alone(mine, targets))
    return rows + of_one


def paired(urls: dict[str, str], targets: list[tuple[str, str]], law: str, clients: int) -> list[Row]:
    """The services take turns, so that a machine that changes its pace does so for both; the ratio is the turns' median."""
    turns, seconds = TURNS[clients]
    measured: dict[str, list[list[Asked]]] = {name: [] for name in urls}
    for url in urls.values():
        asyncio.run(load(url, targets, law, clients, 1.5))
    for _ in range(turns):
        for name, url in urls.items():
            measured[name].append(asyncio.run(load(url, targets, law, clients, seconds)))
    rows = []
    for name, asked in measured.items():
        times = [query.milliseconds for turn in asked for query in turn]
        low, p50, high, p95, p99 = np.percentile(times, (10, 50, 90, 95, 99)).tolist()
        rate = len(times) / (turns * seconds)
        what = f"{law}, {clients} clients, {name}: {rate:.1f} queries/s, p95 {p95:.0f} ms, p99 {p99:.0f} ms"
        ratio = float(np.median([len(own) / len(naive) for own, naive in zip(asked, measured["naive"], strict=True)]))
        rows.append(Row(what, p50, low, high, ratio, "of the naive queries/s" if name == "ours" else "(naive)"))
    return rows


def alone(url: str, targets: list[tuple[str, str]], queries: int = 200) -> list[Asked]:
    """One client of the standard library, which costs next to nothing itself."""
    address = urlsplit(url)
    http = HTTPConnection(str(address.hostname), address.port)
    asked = []
    for i in range(queries):
        collection, key = targets[i % len(targets)]
        body = json.dumps({"collection": collection, "text": f"a small dog runs near the old street {i}"})
        started = time.perf_counter()
        http.request("POST", "/search", body, {"X-API-Key": key, "Content-Type": "application/json"})
        answer = json.loads(http.getresponse().read())
        asked.append(Asked(1000 * (time.perf_counter() - started), answer["timings_ms"]))
    return asked


def split(asked: list[Asked]) -> list[Row]:
    """Where the time of one query goes."""
    whole = float(np.median([query.milliseconds for query in asked]))
    stages = {name: [query.stages[name] for query in asked] for name in asked[0].stages if name != "total"}
    stages["HTTP and framework"] = [query.milliseconds - query.stages["total"] for query in asked]
    rows = []
    for name, times in stages.items():
        low, p50, high = np.percentile(times, (10, 50, 90)).tolist()
        rows.append(Row(f"1 client, ours: {name}", p50, low, high, p50 / whole, "of the whole query"))
    return rows


@dataclass(frozen=True, slots=True)
class Asked:
    """A query as its client saw it; `stages` as the answer told them."""

    milliseconds: float
    stages: dict[str, float]


async def load(url: str, targets: list[tuple[str, str]], law: str, clients: int, seconds: float) -> list[Asked]:
    """The queries that were answered within the time. Raises RuntimeError for any answer but 200.

    Each client has a connection of its own: httpx's pool of 128 takes a core to itself for seconds at a time.
    """
    rng = np.random.default_rng(next(_seeds))  # or the texts of an earlier load would be in the cache
    weights = 1 / np.arange(1, len(targets) + 1) if law == "zipf" else np.ones(len(targets))
    weights /= weights.sum()
    asked: list[Asked] = []
    end = time.perf_counter() + seconds

    async def client() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60, verify=False) as http:  # no TLS here
            while (started := time.perf_counter()) < end:
                collection, key = targets[rng.choice(len(targets), p=weights)]
                text = " ".join(rng.choice(WORDS, 9)) + f" {rng.integers(1000)}"
                answer = await http.post("/search", json={"collection": collection, "text": text}, headers={"X-API-Key": key})
                if answer.status_code != 200:
                    raise RuntimeError(f"{answer.status_code}: {answer.text:.300}")
                if (now := time.perf_counter()) < end:
                    asked.append(Asked(1000 * (now - started), answer.json().get("timings_ms", {})))

    await asyncio.gather(*(client() for _ in range(clients)))
    return asked


def fill(
    data: Path, tenants: int = TENANTS, each: int = EACH, videos_each: int = VIDEOS, scope: Literal["both", "text"] = "both"
) -> None:
    """Tenants, collections, adapters and random vectors, through the rows; what the naive service needs, beside it."""
    import adapters_store
    from backbone import AdapterShape
    from service.adapters.publish import publish
    from service.cli.parts import Parts
    from service.settings import Settings
    from service.storage import collection_rows, generation_rows, keys, segment_rows, tenant_rows
    from service.videos import video_rows

    parts = Parts.over(Settings(data=data, backbone=BACKBONE, pretrained="random", root_key=ROOT_KEY))
    backbone, rng = parts.encoder.backbone, np.random.default_rng(0)
    shape = AdapterShape(backbone.dims, scope=scope, shared=16 if scope == "both" else 0)
    about = []
    for t in range(tenants):
        with parts.storage.database.write() as connection:
            tenant = tenant_rows.create_tenant(connection, f"tenant-{t}", {})
            key_id, key = keys.new_key()
            tenant_rows.add_key(connection, tenant.id, key_id, "search", keys.hash_key(key), None)
        for c in range(each):
            name = f"films-{t}-{c}"
            with parts.storage.database.write() as connection:
                collection = collection_rows.create_collection(connection, tenant, name, {}, backbone.fingerprint)
            packed = adapters_store.pack(shape, backbone.fingerprint, shape.initial(each * t + c))
            version = publish(parts.storage, parts.encoder, tenant.id, collection.id, packed, adapters_store.describe(packed))
            frames = rng.normal(size=(videos_each, FRAMES, backbone.embed_dim)).astype(np.float16)
            pooled = frames.astype(np.float32).mean(1)
            pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
            videos = [f"vid_{t}_{c}_{i:04d}" for i in range(videos_each)]
            with parts.storage.database.write() as connection:
                generation = generation_rows.add_generation(
                    connection, tenant.id, collection.id, version.id, backbone.fingerprint, None, "building"
                )["id"]
                for i, video in enumerate(videos):
                    video_rows.add_video(connection, tenant.id, collection.id, video, f"{i}.mp4", f"{i}", 1, {}, [])
                    video_rows.set_video(connection, tenant.id, video, status="ready", media={"duration": 5.0})
                    row = {"ordinal": 0, "start": 0.0, "end": 5.0, "frames": frames[i].tobytes()}
                    row["pooled"] = pooled[i].astype(np.float16).tobytes()
                    segment_rows.add_segments(connection, tenant.id, video, generation, [row])
                collection_rows.switch(connection, tenant.id, collection.id, generation)
            place = data / "naive" / name
            place.mkdir(parents=True)
            (place / "adapter.safetensors").write_bytes(packed)
            np.save(place / "frames.npy", frames)
            about.append({"collection": name, "key": key, "videos": videos})
    parts.close()
    (data / "naive" / "collections.json").write_text(json.dumps(about))


def listings(data: Path) -> list[Listing]:
    found = []
    for entry in json.loads((data / "naive" / "collections.json").read_text()):
        place = data / "naive" / entry["collection"]
        frames = np.load(place / "frames.npy")
        pooled = frames.astype(np.float32).mean(1)
        pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
        raw = [video.tobytes() for video in frames]
        found.append(Listing(entry["collection"], entry["key"], place / "adapter.safetensors", entry["videos"], pooled, raw))
    return found


@contextmanager
def ours(data: Path, **settings: int) -> Iterator[str]:
    """Our service; `settings` by their names."""
    port = free_port()
    command = [sys.executable, "-m", "service.cli", "serve", "--data", str(data), "--port", str(port), "--no-worker"]
    environment = {f"POLYCLIP_{name.upper()}": str(value) for name, value in settings.items()}
    with served(command, f"http://127.0.0.1:{port}", "/healthz", environment) as url:
        yield url


@contextmanager
def naive(data: Path) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "bench.naive", str(data), str(port)]
    with served(command, f"http://127.0.0.1:{port}", "/openapi.json") as url:
        yield url


@contextmanager
def served(command: list[str], url: str, path: str, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """A server for the length of the block."""
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ, **(environment or {})}
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                if httpx.get(url + path).status_code == 200:
                    break
            except httpx.TransportError:
                if child.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{command[2]} did not start") from None
                time.sleep(0.2)
        yield url
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(timeout=30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
