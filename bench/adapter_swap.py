"""The first use of an adapter, by where it lies: in a slot of the stack, in host memory, in a file on the local disk; lease,
one text of 12 tokens through ViT-B/32 with random weights, release. Then the lease alone. Adapters of both towers, rank 8.
Against the naive way, which reads, checks and assembles the adapter's file for each text. Under it, the 99th percentiles,
with the smallest and the largest time as spread, against the resident one's."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import numpy as np
import torch

from adapters_store import Residency, pack, slots_of, unpack
from backbone import AdapterShape, AdapterStack, load_backbone
from bench.timing import Row, compare

ROUNDS = 100


def run() -> list[Row]:
    backbone = load_backbone("ViT-B-32", "random", "cuda" if torch.cuda.is_available() else "cpu")
    shape = AdapterShape(backbone.dims)
    tokens = backbone.tokenize(["a person walks a small brown dog there"]).ids
    room = 3 * AdapterStack.slot_bytes(backbone.dims, 16)
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for seed in range(8):
            data = pack(shape, backbone.fingerprint, shape.initial(seed))
            digest = hashlib.sha256(data).hexdigest()
            files[digest] = Path(folder) / digest
            files[digest].write_bytes(data)

        def store(host_bytes: int) -> Residency:
            made = Residency(backbone.fingerprint, backbone.dims, backbone.device, stack_bytes=room, host_bytes=host_bytes)
            for digest, file in files.items():  # all come by once: what has no slot is in host memory, if there is any
                made.lease(digest, file.read_bytes).release()
            return made

        roomy, without_host = store(1 << 30), store(0)
        took: dict[str, list[float]] = {}

        def timed(name: str, way: Callable[[], object]) -> Callable[[], object]:
            def once() -> None:
                started = time.perf_counter()
                with torch.inference_mode():
                    way()
                took.setdefault(name, []).append(1000 * (time.perf_counter() - started))

            return once

        def leased(residency: Residency, digests: list[str], encode: bool) -> Callable[[], object]:
            """Each call takes the next digest; with more of them than slots, none is there when its turn comes."""
            turn = cycle(digests)

            def way() -> object:
                digest = next(turn)
                with residency.lease(digest, files[digest].read_bytes) as lease:
                    return backbone.encode_text(tokens, slots_of([lease])).cpu() if encode else lease

            return way

        def naive() -> object:
            adapter = unpack(next(iter(files.values())).read_bytes()).adapter(backbone.fingerprint)
            return backbone.encode_text(tokens, adapter.to(backbone.device)).cpu()

        known = list(files)
        roomy.pin(known[0], "bench", "bench")
        rows = []
        for encode in (True, False):
            what = "one text" if encode else "lease"
            ways = {
                f"{what}, adapter resident": leased(roomy, known[:1], encode),
                f"{what}, adapter in host memory": leased(roomy, known[1:], encode),
                f"{what}, adapter on disk": leased(without_host, known, encode),
            }
            if encode:
                ways["one text, adapter read for each (naive)"] = naive
            first = f"{what}, adapter resident"
            took.clear()
            rows += compare({name: timed(name, way) for name, way in ways.items()}, naive=first, rounds=ROUNDS)
            resident = float(np.percentile(took[first][-ROUNDS:], 99))
            for name, times in took.items():
                low, high, most = np.percentile(times[-ROUNDS:], (0, 99, 100)).tolist()
                against = "(p99)" if name == first else f"of {first}, p99"
                rows.append(Row(f"{name}, p99", high, low, most, high / resident, against))
        for each in (roomy, without_host):
            each.close()
    return rows
