"""How long the stages of a search take."""

from __future__ import annotations

import time


class Clock:
    """Milliseconds of each stage; `took` moves a part of the stage that runs to a name of its own."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name] = self._laps.get(name, 0.0) + 1000 * (now - self._last)
        self._last = now

    def took(self, name: str, seconds: float) -> None:
        self._laps[name] = 1000 * seconds
        self._last += seconds

    def timings(self) -> dict[str, float]:
        total = 1000 * (self._last - self._started)
        return {name: round(value, 3) for name, value in {"queue": 0.0, **self._laps, "total": total}.items()}
