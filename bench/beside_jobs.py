"""Searches beside the worker: 20 requests a second, each with a new text, while the service is quiet, while it trains an
adapter, and while it embeds every video again and switches. Built-in backbone, 120 nightwatch clips. A row's time is that of
one query; the ratio is of the 99th percentiles. An answer that is not 200, or that mixes generations and adapters, ends it."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from bench.serving import WORDS, free_port, served
from bench.timing import Row
from demo.worlds import write_world

VIDEOS, RATE, QUIET_SECONDS = 120, 20, 20.0
ROOT = "bench-operator-key"
RECIPE = {"steps": 150, "batch_size": 32, "frames": 1, "learning_rate": 8e-3}


@dataclass(frozen=True, slots=True)
class Asked:
    milliseconds: float
    phase: str
    generation: str
    adapter: str | None


def run() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        port, data = free_port(), str(Path(folder) / "data")
        command = [sys.executable, "-m", "service.cli", "serve", "--data", data, "--port", str(port)]
        with served(command, f"http://127.0.0.1:{port}", "/readyz", {"POLYCLIP_ROOT_KEY": ROOT}) as url:
            key = fill(url, Path(folder) / "clips")
            asked = asyncio.run(measure(url, key))
    pools: dict[str, set[str | None]] = {}
    for query in asked:
        pools.setdefault(query.generation, set()).add(query.adapter)
    if len(pools) != 2 or any(len(adapters) != 1 for adapters in pools.values()):
        raise RuntimeError(f"two generations of one adapter each were expected, not {pools}")
    rows: list[Any] = []
    first = 0.0
    for phase in dict.fromkeys(query.phase for query in asked):
        times = [query.milliseconds for query in asked if query.phase == phase]
        low, p50, high, p99 = np.percentile(times, (10, 50, 90, 99)).tolist()
        first = first or p99
        against = "of the quiet p99" if rows else "(quiet)"
        rows.append(Row(f"{phase}: {len(times)} searches, p99 {p99:.0f} ms", p50, low, high, p99 / first, against))
    return rows


def fill(url: str, folder: Path) -> str:
    """A collection of ready, captioned clips; the key of its tenant."""
    with httpx.Client(base_url=url, timeout=60) as http:

        def post(path: str, key: str, **body: Any) -> Any:
            return http.post(path, headers={"X-API-Key": key}, **body).raise_for_status().json()

        post("/admin/tenants", ROOT, json={"name": "bench"})
        key = str(post("/admin/tenants/bench/keys", ROOT, json={"role": "admin"})["key"])
        post("/collections", key, json={"name": "films"})
        captions = write_world(folder, "nightwatch", VIDEOS, 1)
        for line in captions.read_text().splitlines():
            row = json.loads(line)
            files = {"file": (row["file"], (captions.parent / row["file"]).read_bytes(), "video/mp4")}
            post("/collections/films/videos", key, files=files, data={"captions": json.dumps(row["captions"])})
        look = {"headers": {"X-API-Key": key}}
        while http.get("/collections/films", **look).json()["videos"].get("ready") != VIDEOS:  # type: ignore[arg-type]
            time.sleep(0.5)
    return key


async def measure(url: str, key: str) -> list[Asked]:
    """Asks at a steady rate, whether or not the answers come, through all phases."""
    asked: list[Asked] = []
    rng = np.random.default_rng(0)
    phase, going = "quiet", True
    async with httpx.AsyncClient(base_url=url, headers={"X-API-Key": key}, timeout=60) as http:

        async def ask() -> None:
            started, asked_in = time.perf_counter(), phase
            text = f"{' '.join(rng.choice(WORDS, 6))} {rng.integers(10**6)}"
            answer = await http.post("/search", json={"collection": "films", "text": text})
            if answer.status_code != 200:
                raise RuntimeError(f"{answer.status_code}: {answer.text:.300}")
            pool = answer.json()["search_pool"]
            asked.append(Asked(1000 * (time.perf_counter() - started), asked_in, pool["generation"], pool["adapter"]))

        async def steadily() -> None:
            async with asyncio.TaskGroup() as group:
                due = time.perf_counter()
                while going:
                    group.create_task(ask())
                    due += 1 / RATE
                    await asyncio.sleep(max(0.0, due - time.perf_counter()))

        steady = asyncio.create_task(steadily())
        await asyncio.sleep(2)
        asked.clear()
        await asyncio.sleep(QUIET_SECONDS)
        phase = "training"
        answer = await http.post("/admin/collections/films/adapters", json={"recipe": RECIPE, "activate": "always"})
        path = f"/tasks/{answer.raise_for_status().json()['task_id']}"
        while (task := (await http.get(path)).json())["status"] in ("queued", "running"):
            if task["progress"] >= 0.8:
                phase = "embedding again, switch"
            await asyncio.sleep(0.25)
        if task["status"] != "succeeded":
            raise RuntimeError(f"the training ended {task['status']}: {task['error']}")
        phase = "after the switch"
        await asyncio.sleep(QUIET_SECONDS / 2)
        going = False
        await steady
    return asked
