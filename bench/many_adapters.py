"""A thousand collections, each with an adapter of its own, and room for 64 adapters on the device: zipf traffic of 32 clients
over HTTP, ViT-B/32 with random weights, three videos a collection. Against the same service with room for all of them. A row's
time is that of one query; the ratio is of queries a second. Any answer but 200 ends the bench."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import numpy as np

from backbone import VOCABULARY_ROWS, AdapterStack, load_backbone
from bench.serving import BACKBONE, fill, listings, load, ours
from bench.timing import Row

TENANTS, EACH, VIDEOS = 20, 50, 3
CLIENTS, SECONDS = 32, 15.0
ROOM = {"room for all": TENANTS * EACH, "room for 64": 64}


def run() -> list[Row]:
    backbone = load_backbone(BACKBONE, "random")
    slot = AdapterStack.slot_bytes(backbone.dims, 16, words=VOCABULARY_ROWS, tokens=backbone.tokens)
    rows: list[Row] = []
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        fill(data, TENANTS, EACH, VIDEOS, scope="text")
        targets = [(listing.collection, listing.key) for listing in listings(data)]
        for name, room in ROOM.items():
            with ours(data, adapter_bytes=(1 + room) * slot) as url:
                asyncio.run(load(url, targets, "zipf", CLIENTS, 5.0))
                times = [query.milliseconds for query in asyncio.run(load(url, targets, "zipf", CLIENTS, SECONDS))]
            rates[name] = len(times) / SECONDS
            low, p50, p95, p99, high = np.percentile(times, (10, 50, 95, 99, 90)).tolist()
            what = f"1,000 adapters, {name}: {rates[name]:.1f} queries/s, p95 {p95:.0f} ms, p99 {p99:.0f} ms"
            first = next(iter(ROOM))
            against = "(all resident)" if name == first else "of the queries/s with all resident"
            rows.append(Row(what, p50, low, high, rates[name] / rates[first], against))
    return rows
