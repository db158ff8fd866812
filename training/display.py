"""What a training run shows of itself: a progress bar in a terminal, JSON lines elsewhere."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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


def print_json(event: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


class JsonLines:
    """Every validation, and at most four steps a second. Ends the process when its parent has died."""

    def __init__(self) -> None:
        self._last = 0.0
        self._parent = os.getppid()

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def report(self, event: dict[str, Any]) -> None:
        if os.getppid() != self._parent:
            raise SystemExit(1)
        now = time.monotonic()
        often = event["event"] in ("step", "decoding")
        if not often or now - self._last > 0.25 or event["step"] == event["steps"]:
            self._last = now
            print_json(event)


class Bar:
    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        self._progress = Progress(*columns, TimeRemainingColumn(), console=errors)
        self._task = self._progress.add_task("training", total=None, note="")
        self._note = ""

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def report(self, event: dict[str, Any]) -> None:
        if event["event"] == "validation":
            recall = event["text_to_video"]
            self._note = f"R@1 {recall['R@1']}"
            self._progress.console.print(f"step {event['step']}: R@1 {recall['R@1']}, R@5 {recall['R@5']}")
        if event["event"] == "resumed":
            self._progress.console.print(f"going on after step {event['step']}")
        loss = f"loss {event['loss']:.3f} · " if event["event"] == "step" else ""
        what = {"decoding": "decoding", "cross_validation": "cross-validation"}.get(event["event"], "training")
        self._progress.update(
            self._task, description=what, completed=event["step"], total=event["steps"], note=loss + self._note
        )
