"""The training process of a collection's adapter: `python -m training` as a child, which tells its events line by line."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from contextvars import copy_context
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO

import structlog

from service.errors import ERRNO
from service.jobs.kinds import JobFailed, TurnOver
from service.jobs.supervisor import without_root_key
from training.progress import Progress, Tell

Trainers = set[subprocess.Popen[str]]  # training processes that are children of this one

GRACE, GRACE_SECONDS = 1.5, 600.0  # a training is waited for so much longer than its steps may take: decoding, folds
MAY_PASS = ("io_error", "in_use", "stopped")  # codes of the training process
OUT_OF_MEMORY = (  # in the words of torch, oneDNN, Python, C++
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "could not create a primitive",
    "MemoryError",
    "bad_alloc",
)

log = structlog.get_logger()


class TrainingFailed(JobFailed):
    """The training process ended without an adapter; `code` and the message are its own words."""

    code, hint = "training_failed", "`code` and `detail` are those of `python -m training`"

    def __init__(self, code: str, detail: str) -> None:
        lasts = code == "io_error" and any(os.strerror(number) in detail for number in ERRNO)
        super().__init__(code, detail, code in MAY_PASS, lasts)


def run(
    command: Sequence[str],
    collection_id: str,
    trainers: Trainers,
    limit: float,
    turn: float,
    progress: Tell,
    waited_for: Callable[[], bool],
) -> None:
    """Runs a training to its end; the child is one of `trainers` meanwhile. `limit`, `turn` in seconds.

    What `progress` raises ends the child. After its turn, where another tenant's
    training is `waited_for`, the child stops at a checkpoint, and TurnOver is raised. Raises TrainingFailed.
    """
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=without_root_key(os.environ),
    )
    trainers.add(child)
    assert child.stderr is not None and child.stdout is not None
    last_words = ""

    def hear(line: str) -> None:
        nonlocal last_words
        last_words = line.strip() or last_words
        log.warning("training_process_says", line=line.rstrip())

    listener = threading.Thread(target=copy_context().run, args=(_read, child.stderr, hear), daemon=True)
    try:
        listener.start()
        log.info("training_process_started", pid=child.pid)
        killed = _killed_for_memory()
        _first_to_be_killed(child)
        now, recall = Progress("preparing", 0, 1), ""
        started, stepping, asked = time.monotonic(), math.inf, False
        for line in _lines(child.stdout):
            clock = time.monotonic()
            if clock - started > GRACE * limit + GRACE_SECONDS:
                raise TrainingFailed("training_timeout", f"the training has not ended long after its {limit:g} s")
            if clock - stepping > turn and not asked and waited_for():
                asked = True
                child.terminate()  # it stops after a checkpoint
            if line is None:
                progress(now)
                continue
            event = json.loads(line)
            if event["event"] == "error" and event["code"] == "stopped" and asked:
                raise TurnOver(event["detail"])
            if event["event"] == "error":
                raise _failure(event["code"], event["detail"])
            if event["event"] == "done":
                continue
            told = Progress.of(event)
            if told.stage == "resumed":
                log.info("training_resumed", collection=collection_id, step=told.done)
                continue
            if told.stage == "cross_validation":
                stepping = math.inf  # what it has done it would do anew
                note = f"cross-validation: part {told.done + 1} of {told.total}{recall}"
                now = replace(told, stage=note).within(0.5, 1)
            if told.stage == "validation":
                best = told.facts["text_to_video"]["R@1"]
                recall = f", validation R@1 {best:g}"
                log.info("training_validation", step=told.done, recall_at_1=best)
            if told.stage == "step":
                stepping = min(stepping, clock)
                now = replace(told, total=told.facts["work"])
            if told.stage in ("step", "validation"):
                now = replace(now, stage=f"step {told.done} of {told.total}{recall}")
            progress(now)
        if child.wait() == -signal.SIGKILL and _killed_for_memory() > killed:
            raise _failure("out_of_memory", "the system killed it")
        if child.returncode != 0:
            listener.join(timeout=1)
            raise _failure("training_crashed", f"the training process ended with status {child.returncode}. {last_words}")
    finally:
        _end(child)
        listener.join(timeout=1)
        trainers.discard(child)


def _failure(code: str, detail: str) -> TrainingFailed:
    if code == "out_of_memory" or any(words in detail for words in OUT_OF_MEMORY):
        hint = "a smaller `micro_batch` in the recipe needs less"
        code, detail = "training_out_of_memory", f"the training ran out of memory: {hint} ({detail})"
    return TrainingFailed(code, detail[:500])


def _read(stream: IO[str], take: Callable[[str], None]) -> None:
    with stream:
        for line in stream:
            take(line)


def _lines(stream: IO[str]) -> Iterator[str | None]:
    """The lines of a stream, and None after each second without one."""
    queue: SimpleQueue[str | None] = SimpleQueue()

    def read() -> None:
        _read(stream, queue.put)
        queue.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    while True:
        try:
            if (line := queue.get(timeout=1.0)) is None:
                return
            yield line
        except Empty:
            yield None


def _first_to_be_killed(child: subprocess.Popen[str]) -> None:
    """Where memory runs out, the kernel ends the training and not what serves or waits."""
    with suppress(OSError):
        Path(f"/proc/{child.pid}/oom_score_adj").write_text("800")


def _killed_for_memory() -> int:
    """How many processes the kernel has killed since it started because memory ran out."""
    with suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _end(child: subprocess.Popen[str]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
