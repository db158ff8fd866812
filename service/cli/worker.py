"""A worker process: `polyclip worker`, or beside the API `python -m service.cli.worker`. Here the kinds of tasks meet what
does them."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from sqlalchemy import Connection

from adapters_store import LeaseTimeout
from backbone.batcher import BatcherFull
from service.adapters import activate, train
from service.adapters.evaluate import evaluate
from service.alerts import deliver, match
from service.cli.parts import Parts
from service.jobs import worker
from service.jobs.kinds import Kind, Kinds
from service.jobs.queue import GROUPS, Jobs
from service.jobs.run import Report, Runner
from service.jobs.task_rows import Task
from service.jobs.worker import Worker
from service.settings import Settings
from service.storage import collection_rows
from service.upkeep import delete, import_collection
from service.videos import fetch, index, video_rows

PR_SET_PDEATHSIG = 1


def _index_video(parts: Parts, runner: Runner, task: Task, report: Report) -> None:
    """Ends its task itself, with the video."""
    video = task.request["video_id"]
    more = index.index_video(parts.storage, parts.encoder, parts.decoders, task.tenant_id, video, report)
    if more is not None:
        runner.hand_on(more.tenant_id, more.id)


def _fetch_video(parts: Parts, runner: Runner, task: Task, report: Report) -> dict[str, Any]:
    return fetch.fetch_video(parts.storage, task, report, lambda found: runner.hand_on(found.tenant_id, found.id))


def _lock_video(connection: Connection, task: Task) -> None:
    video_rows.lock_video(connection, task.tenant_id, task.request["video_id"])


def _fail_video(connection: Connection, task: Task, error: Any) -> None:
    video_rows.set_video(connection, task.tenant_id, task.request["video_id"], status="failed", error=error)


def _train_adapter(parts: Parts, runner: Runner, task: Task, report: Report) -> dict[str, Any]:
    runner.take_turn(task)
    shared = parts.storage, parts.encoder, parts.decoders
    waited_for, spread = lambda: bool(runner.others_wait(task)), runner.spread(task)
    return train.train_adapter(*shared, runner.children, task.tenant_id, task, report, spread, waited_for)


def _activate(parts: Parts, runner: Runner, task: Task, report: Report) -> dict[str, Any]:
    shared = parts.storage, parts.encoder, parts.decoders
    return activate.activate_adapter(*shared, task.tenant_id, task, report, runner.spread(task))


def _evaluate(parts: Parts, runner: Runner, task: Task, report: Report) -> dict[str, Any]:
    with parts.storage.database.read() as connection:
        name = collection_rows.collection_name(connection, task.tenant_id, str(task.collection_id))
    found = evaluate(parts.storage, parts.encoder, task.tenant_id, name, task.request["split"]).found
    report.check()
    return found.to_json(intervals=True)


def _match_alerts(parts: Parts, runner: Runner, task: Task, report: Report) -> dict[str, Any]:
    def hand_on(delivery: Task) -> None:
        runner.hand_on(delivery.tenant_id, delivery.id)

    return match.match_alerts(parts.storage, parts.encoder, task.tenant_id, task, report, hand_on)


def _deliver_event(parts: Parts, runner: Runner, task: Task, report: Report) -> dict[str, Any]:
    return deliver.deliver_event(parts.storage, task)


def _purge(parts: Parts, runner: Runner, task: Task, report: Report) -> dict[str, Any]:
    return delete.purge(parts.storage, task)


def _import_collection(parts: Parts, runner: Runner, task: Task, report: Report) -> dict[str, Any]:
    def start(video: video_rows.Video) -> None:
        runner.hand_on(video.tenant_id, video.task_id)

    return import_collection.import_for_task(parts.storage, parts.encoder, parts.decoders, task, report, start)


def _fill(parts: Parts, tenant: str, generation: str, videos: Sequence[str]) -> None:
    activate.fill_chunk(parts.storage, parts.encoder, parts.decoders, tenant, generation, videos)


KINDS = Kinds(
    by_name={
        "index_video": Kind(_index_video, lock=_lock_video, failed=_fail_video),
        "fetch_video": Kind(_fetch_video),
        "train_adapter": Kind(_train_adapter, discard=lambda parts, task: train.discard(parts.storage, task)),
        "activate": Kind(_activate),
        "evaluate": Kind(_evaluate),
        "match_alerts": Kind(_match_alerts),
        "deliver_event": Kind(_deliver_event, failed=deliver.failed),
        "purge": Kind(_purge),
        "import_collection": Kind(
            _import_collection, discard=lambda parts, task: import_collection.discard(parts.storage, task)
        ),
    },
    fill=_fill,
    passing=(torch.OutOfMemoryError, LeaseTimeout, BatcherFull),
)


def runner(parts: Parts, jobs: Jobs | None = None) -> Runner:
    return Runner(parts.storage, KINDS, parts, jobs)


def make(settings: Settings, queues: Sequence[str], name: str) -> Worker:
    """A worker that has not been launched."""
    parts, jobs = Parts.over(settings), Jobs(settings)
    return Worker(runner(parts, jobs), jobs, queues, name, lambda: delete.sweep(parts.storage))


def run(settings: Settings, groups: Sequence[str]) -> None:
    """`worker.run`."""
    worker.run(settings, [queue for group in groups for queue in GROUPS[group]], make)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, help="end when this process, our parent, has died")
    parser.add_argument("--queues", default=",".join(GROUPS))
    arguments = parser.parse_args()
    os.umask(0o077)  # as of the command line
    if arguments.parent is not None:
        os.nice(10)
        with suppress(OSError):  # where memory runs out, the API is the last to go
            Path("/proc/self/oom_score_adj").write_text("300")
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != arguments.parent:
            sys.exit(0)
    run(Settings(), arguments.queues.split(","))


if __name__ == "__main__":
    main()
