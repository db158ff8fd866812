"""Paired timing: the ways take turns, so that a noisy machine disturbs all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table; `ratio` is the median of the paired ratios to the way named in `against`. Times of 0: none taken."""

    what: str
    median_ms: float
    low_ms: float
    high_ms: float
    ratio: float
    against: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    ways: dict[str, Callable[[], object]],
    naive: str,
    rounds: int = 15,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Times each way once a round by `clock` (seconds), after `warmup` rounds, and sets each against `naive`."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(warmup + rounds):
        for name, way in ways.items():
            started = clock()
            way()
            if turn >= warmup:
                times[name].append(1000 * (clock() - started))
    rows = []
    for name, taken in times.items():
        low, median, high = np.percentile(taken, (10, 50, 90))
        ratio = float(np.median(np.asarray(taken) / np.asarray(times[naive])))
        rows.append(Row(name, float(median), float(low), float(high), ratio, f"of {naive}" if name != naive else "(naive)"))
    return rows
