"""Named points of the service's code at which a process kills itself by SIGKILL when it is told to.

The service has no hooks for this. Its functions at the points are wrapped when their modules are imported. Each passing looks
into the file CRASH_ORDER: if it names this point, the k-th passing removes the file and is the process's last.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

WORKER, API, TRAINER = "service.cli.worker", "service.cli", "training"  # what follows `python -m`
WRITE = "service.storage.database:Database.write"


@dataclass(frozen=True, slots=True)
class Point:
    """`committed`: after the transaction in which the function was called. `inside`: only during a call of that function.
    `often`: passed more than once a round."""

    name: str
    process: str
    when: Literal["before", "after", "committed"]
    function: str
    inside: str | None = None
    often: bool = False


POINTS = {
    point.name: point
    for point in (
        Point("after the file, before the row", API, "after", "service.storage.blobs:Blobs.put_file", often=True),
        Point("after the row, before the enqueue", API, "before", "service.jobs.queue:Jobs.enqueue", often=True),
        Point("after the cached frames, before their row", WORKER, "after", "service.storage.blobs:Blobs.put_file", often=True),
        Point("after the vectors, before ready", WORKER, "committed", "service.storage.segment_rows:add_segments", often=True),
        Point(
            "after a task's end, before the engine knows", WORKER, "committed", "service.jobs.task_rows:end_task", often=True
        ),
        Point("mid-purge", WORKER, "after", "service.storage.blobs:Blobs.delete"),
        Point(
            "mid-chunk",
            WORKER,
            "after",
            "service.storage.segment_rows:add_segments",
            "service.adapters.activate:fill_chunk",
            often=True,
        ),
        Point("just before the switch", WORKER, "before", "service.storage.collection_rows:switch"),
        Point("in the switch", WORKER, "after", "service.storage.collection_rows:switch"),
        Point("just after the switch", WORKER, "committed", "service.storage.collection_rows:switch"),
        Point("mid-snapshot", API, "before", "os:replace", "indexer.snapshot:write"),
        Point("mid-checkpoint", TRAINER, "before", "os:replace", "training.checkpoint:write_tensors"),
        Point("after the adapter's file, before its row", WORKER, "before", "service.adapters.adapter_rows:add_adapter"),
    )
}

CONSTANTS = {"service.search.views:WORTH": 4}  # rows after which a snapshot is written: few, so that small collections have one

_passings: Counter[str] = Counter()
_inside: Counter[str] = Counter()
_lock = threading.Lock()
_thread = threading.local()


def install() -> None:
    """Wraps, in this process, the functions at the points that are its own."""
    words = sys.orig_argv
    mine = [point for point in POINTS.values() if "-m" in words and words[words.index("-m") + 1] == point.process]
    wrappers: dict[str, list[Callable[[Any], Any]]] = {}
    for point in mine:
        wrappers.setdefault(point.function, []).append(functools.partial(_stop_at, point))
        if point.inside is not None and point.inside not in wrappers:
            wrappers[point.inside] = [functools.partial(_count, point.inside)]
    if any(point.when == "committed" for point in mine):
        wrappers[WRITE] = [_notice_commit]
    for constant, value in CONSTANTS.items():
        wrappers[constant] = [functools.partial(_always, value)]
    sys.meta_path.insert(0, _Importer(wrappers))
    for function in wrappers:
        if (module := sys.modules.get(function.split(":")[0])) is not None:
            _wrap(module, wrappers)


class _Importer:
    """Imports as the finders behind it do, and wraps functions of a module as soon as it has run."""

    def __init__(self, wrappers: dict[str, list[Callable[[Any], Any]]]) -> None:
        self._wrappers = wrappers
        self._modules = {function.split(":")[0] for function in wrappers}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self._modules:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec: Any = next(spec for spec in specs if spec is not None)
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _wrap(module, self._wrappers)

        spec.loader.exec_module = exec_module
        return spec


def _wrap(module: ModuleType, wrappers: dict[str, list[Callable[[Any], Any]]]) -> None:
    for function, around in wrappers.items():
        where, _, attribute = function.partition(":")
        if where == module.__name__:
            *owners, name = attribute.split(".")
            owner = functools.reduce(getattr, owners, module)
            for wrapper in around:
                setattr(owner, name, wrapper(getattr(owner, name)))


def _stop_at(point: Point, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def passing(*arguments: Any, **named: Any) -> Any:
        counts = point.inside is None or _inside[point.inside] > 0
        if point.when == "before" and counts:
            _pass(point.name)
        result = function(*arguments, **named)
        if point.when == "after" and counts:
            _pass(point.name)
        if point.when == "committed":
            _thread.noticed = [*getattr(_thread, "noticed", []), point.name]
        return result

    return passing


def _always(value: Any, _: Any) -> Any:
    return value


def _count(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def counted(*arguments: Any, **named: Any) -> Any:
        with _lock:
            _inside[name] += 1
        try:
            return function(*arguments, **named)
        finally:
            with _lock:
                _inside[name] -= 1

    return counted


def _notice_commit(write: Callable[..., Any]) -> Callable[..., Any]:
    @contextmanager
    def writing(database: Any) -> Iterator[Any]:
        _thread.noticed = []
        with write(database) as connection:
            yield connection
        for name in _thread.noticed:
            _pass(name)

    return writing


def _pass(name: str) -> None:
    file = Path(os.environ["CRASH_ORDER"])
    with _lock:
        try:
            order = file.read_text()
        except FileNotFoundError:
            return
        wanted, passing, _ = order.split("\n")
        if wanted == name:
            _passings[order] += 1
            if _passings[order] == int(passing):
                file.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
