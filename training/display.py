"""What a training run shows of itself: a progress bar in a terminal, JSON lines elsewhere."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich import progress as bars
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from training.progress import Progress

errors = Console(stderr=True, highlight=False)


def evidence(done: Mapping[str, Any], queries: int) -> Iterator[str]:
    """What must be known to read the figures of a run, of so many held-out queries."""
    if "timed_out" in done:
        yield "the time was over after {steps} of {of} steps: this is the best until then".format(**done["timed_out"])
    if "not_enough_evidence" in done:
        yield f"not enough evidence: {queries} held-out queries are too few to tell whether the adapter helps"
    if (crossed := done.get("cross_validation")) is not None:
        before, after = (crossed[side]["text_to_video"]["R@1"] for side in ("before", "after"))
        gain = "{mean:+.1f}, 95 % interval {low:+.1f} to {high:+.1f}".format(**crossed["gain"])
        told = "cross-validated: R@1 {} → {} ({}) over {queries} queries, {folds} folds of {steps} steps"
        yield told.format(before, after, gain, **crossed)


def print_json(event: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


class JsonLines:
    """Every validation, and at most four steps a second. Ends the process when its parent has died."""

    def __init__(self) -> None:
        self._last = 0.0
        self._parent = os.getppid()

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def report(self, progress: Progress) -> None:
        if os.getppid() != self._parent:
            raise SystemExit(1)
        now = time.monotonic()
        often = progress.stage in ("step", "decoding")
        if not often or now - self._last > 0.25 or progress.done == progress.total:
            self._last = now
            print_json(progress.to_json())


class Bar:
    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        self._bar = bars.Progress(*columns, TimeRemainingColumn(), console=errors)
        self._task = self._bar.add_task("training", total=None, note="")
        self._note = ""

    def __enter__(self) -> None:
        self._bar.start()

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def report(self, progress: Progress) -> None:
        facts = progress.facts
        if progress.stage == "validation":
            recall = facts["text_to_video"]
            self._note = f"R@1 {recall['R@1']}"
            self._bar.console.print(f"step {progress.done}: R@1 {recall['R@1']}, R@5 {recall['R@5']}")
        if progress.stage == "resumed":
            self._bar.console.print(f"going on after step {progress.done}")
        note = (f"loss {facts['loss']:.3f} · " if progress.stage == "step" else "") + self._note
        what = {"decoding": "decoding", "cross_validation": "cross-validation"}.get(progress.stage, "training")
        self._bar.update(self._task, description=what, completed=progress.done, total=progress.total, note=note)
