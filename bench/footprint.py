"""What it costs to stand there. Start: `polyclip serve` from its first instruction to the first answered search, ViT-B/32 with
random weights, against a process that only imports open_clip and makes the same model. Memory: what an adapter of rank 8
takes in the host's memory and in a slot of the device's stack, against a fine-tuned copy of CLIP for each collection."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np

from adapters_store import pack
from backbone import VOCABULARY_ROWS, AdapterShape, AdapterStack, FlatAdapter, load_backbone
from bench.serving import BACKBONE, fill, listings, ours
from bench.timing import Row

ROUNDS = 3
MB = 1e6


def run() -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        fill(data, tenants=1, each=1, videos_each=3)
        collection, key = next((listing.collection, listing.key) for listing in listings(data))

        def served() -> None:
            with ours(data) as url:
                body = {"collection": collection, "text": "a person walks a small dog"}
                httpx.post(f"{url}/search", json=body, headers={"X-API-Key": key}, timeout=60).raise_for_status()
                times["polyclip serve, to the first answered search"].append(1000 * (time.perf_counter() - started))

        def bare() -> None:
            code = f"import open_clip; open_clip.create_model({BACKBONE!r})"
            subprocess.run([sys.executable, "-c", code], check=True)
            times["open_clip alone: import and create_model"].append(1000 * (time.perf_counter() - started))

        ways: dict[str, Callable[[], None]] = {
            "open_clip alone: import and create_model": bare,
            "polyclip serve, to the first answered search": served,
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for way in ways.values():
                started = time.perf_counter()
                way()
        naive = next(iter(ways))
        for name, taken in times.items():
            low, p50, high = np.percentile(taken, (0, 50, 100)).tolist()
            ratio = float(np.median(np.asarray(taken) / np.asarray(times[naive])))
            rows.append(Row(name, p50, low, high, ratio, f"of {naive}" if name != naive else "(naive)"))
    return rows + memory()


def memory() -> list[Row]:
    """Bytes, told in the first column; no times."""
    backbone = load_backbone(BACKBONE, "random")
    shape = AdapterShape(backbone.dims)
    tensors = shape.initial(0)
    whole = 4 * sum(p.numel() for p in backbone._model.parameters())
    flat = FlatAdapter.of(shape.assemble(tensors), backbone.dims)
    sizes = {
        "a fine-tuned copy of CLIP": whole,
        "an adapter's file": len(pack(shape, backbone.fingerprint, tensors)),
        "an adapter in the host's memory": flat.values.nbytes,
        "an adapter in the stack, room for rank 16 and 512 vocabulary rows": AdapterStack.slot_bytes(
            backbone.dims, 16, words=VOCABULARY_ROWS, tokens=backbone.tokens
        ),
    }
    return [
        Row(f"{name}: {size / MB:.1f} MB", 0, 0, 0, size / whole, "of the bytes of a fine-tuned copy")
        for name, size in sizes.items()
    ]
