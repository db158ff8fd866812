"""`make bench`: runs the benchmarks, prints their tables and writes docs/benchmarks.md and bench/results/*.json."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from bench.timing import Row

ROOT = Path(__file__).parent.parent
BENCHES = (
    "mixed_batch",
    "mechanisms",
    "backbones",
    "adapter_swap",
    "many_adapters",
    "search_path",
    "filters",
    "index_sizes",
    "serving",
    "beside_jobs",
    "indexing",
    "training_step",
    "footprint",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(BENCHES)}; default: all")
    names = parser.parse_args().names or BENCHES
    if unknown := [name for name in names if name not in BENCHES]:
        parser.error(f"unknown bench {unknown[0]!r}: take from {', '.join(BENCHES)}")
    results = ROOT / "bench" / "results"
    results.mkdir(exist_ok=True)
    for name in names:
        sys.stdout.write(f"{name} …\n")
        rows = importlib.import_module(f"bench.{name}").run()
        at = datetime.now(UTC).isoformat(timespec="seconds")
        facts = {"machine": machine(), "at": at, "rows": [row.to_json() for row in rows]}
        (results / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n")
        sys.stdout.write(table(rows) + "\n")
    (ROOT / "docs" / "benchmarks.md").write_text(page(results))


def machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"{device}; torch {torch.__version__}; {platform.system()} {platform.machine()}"


def table(rows: list[Row]) -> str:
    lines = ["| what | median | spread (10–90 %) | against the naive way |", "|---|---|---|---|"]
    for r in rows:
        times = f"{r.median_ms:.1f} ms | {r.low_ms:.1f}–{r.high_ms:.1f} ms" if r.median_ms else "|"
        lines.append(f"| {r.what} | {times} | {r.ratio:.3g}× {r.against} |")
    return "\n".join(lines)


def page(results: Path) -> str:
    parts = [
        "# Benchmarks\n",
        "Medians of paired runs in one process; ratios below 1 are faster than what they are compared with. "
        "Machines are shared and noisy: read the ratios, not the milliseconds. `make bench` makes this page.\n",
    ]
    for name in BENCHES:
        path = results / f"{name}.json"
        if path.exists():
            facts = json.loads(path.read_text())
            rows = [Row(**row) for row in facts["rows"]]
            about = (importlib.import_module(f"bench.{name}").__doc__ or "").strip()
            made = f"`python -m bench {name}` · {facts['machine']} · {facts['at']}"
            parts.append(f"## {name}\n\n{about}\n\n{made}\n\n{table(rows)}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    main()
