"""A worker: takes jobs out of its queues, gives signs of life, and looks after what others have left."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import structlog
from dbos import DBOS, DBOSConfig
from dbos._serialization import DBOSPortableJSON

from adapters_store import durable
from service.jobs import task_rows
from service.jobs.queue import DEAD_SECONDS, QUEUES, VERSION, Jobs, rescue, sweep
from service.jobs.run import Runner
from service.logs import configure
from service.settings import Settings
from service.storage import facts
from service.storage.tables import now

LOCK_SECONDS = 30
HEARTBEAT_SECONDS = 5.0
SWEEP_SECONDS = 60.0
TIDY_SECONDS = 3600.0
DRAIN_SECONDS = 5.0  # for what runs to stop at its next report
END_SECONDS = 8.0  # then the process ends in any case

log = structlog.get_logger()


class Worker:
    """Takes jobs from its queues until `drain` is called. `name` must be its alone, and stable: under it, the jobs
    that a crash left are taken up again at once. `tidy`: what is to be done every hour."""

    def __init__(self, runner: Runner, jobs: Jobs, queues: Sequence[str], name: str, tidy: Callable[[], object]) -> None:
        self.runner, self.jobs = runner, jobs
        self.storage = runner.storage
        self._queues, self._name, self._tidy = queues, name, tidy
        self._steady_since = time.monotonic()  # since when no sign of life has failed or come late

    def launch(self) -> None:
        """Starts DBOS, which runs the jobs on threads of its own."""
        self._beat()
        self.jobs.give_up(self._name)
        config: DBOSConfig = {
            "name": "polyclip",
            "system_database_url": self.storage.settings.jobs_database,
            "application_version": VERSION,
            "executor_id": self._name,
            "serializer": DBOSPortableJSON,
            "console_log_level": "WARNING",
            "log_level": "WARNING",
        }
        DBOS(config=config)

        @DBOS.step(name="run")
        def run(tenant: str, task_id: str, tries: int) -> dict[str, Any] | None:
            return self.runner.run(tenant, task_id, tries)

        @DBOS.workflow(name="run_task", max_recovery_attempts=None)
        def run_task(tenant: str, task_id: str, tries: int) -> None:
            if (again := run(tenant, task_id, tries)) is not None:
                number = int(str(DBOS.workflow_id).partition(":")[2] or 0) + 1
                with self.storage.database.read() as connection:
                    task = task_rows.task(connection, tenant, task_id)
                self.jobs.enqueue(task, number, again["tries"], delay=again["seconds"])

        @DBOS.workflow(name="fill_chunks", max_recovery_attempts=None)
        def fill_chunks(tenant: str, task_id: str, generation: str, chunks: list[list[str]]) -> dict[str, Any] | None:
            return self.runner.fill(tenant, task_id, generation, chunks)

        DBOS.listen_queues(self._queues)
        DBOS.launch()
        for name in self._queues:
            queue = QUEUES[name]
            DBOS.register_queue(
                name,
                worker_concurrency=queue.at_once,
                partition_worker_concurrency=queue.of_a_tenant,
                polling_interval_sec=queue.seconds,
            )
        log.info("worker_started", worker=self._name, queues=list(self._queues), pid=os.getpid())

    def watch(self, stop: threading.Event) -> None:
        """Signs of life, and sweeps on a thread of their own, until `stop` is set."""
        threading.Thread(target=self._look_after, name="sweeps", daemon=True).start()
        last = time.monotonic()
        while not stop.wait(HEARTBEAT_SECONDS):
            self._guarded("heartbeat_failed", self._beat)
            if time.monotonic() - last > 4 * HEARTBEAT_SECONDS:
                self._steady_since = time.monotonic()
            last = time.monotonic()

    def drain(self) -> None:
        """What runs stops at its next report; after `DRAIN_SECONDS` what is left is put back as it stands."""
        log.info("worker_stopping", worker=self._name, running=len(self.runner.running))
        self.runner.stop()
        deadline = time.monotonic() + DRAIN_SECONDS
        while not self.runner.at_rest() and time.monotonic() < deadline:
            time.sleep(0.05)
        for child in self.runner.children.copy():
            child.kill()
        for task in list(self.runner.running.values()):
            self._guarded("not_given_back", partial(self.runner.give_back, task))
        self._guarded("not_given_back", lambda: self.jobs.give_up(self._name))
        self._guarded("not_given_back", self._leave)

    def _look_after(self) -> None:
        tidied: float | None = None
        while not self.runner.stopping.is_set():
            self._guarded("sweep_failed", lambda: sweep(self.storage, self.jobs))
            if time.monotonic() - self._steady_since > DEAD_SECONDS:
                self._guarded("sweep_failed", lambda: rescue(self.storage, self.jobs))
            if tidied is None or time.monotonic() - tidied > TIDY_SECONDS:
                tidied = time.monotonic()
                self._guarded("cleanup_failed", self._tidy)
                self._guarded("cleanup_failed", self._forget)
            self.runner.stopping.wait(SWEEP_SECONDS)

    def _forget(self) -> None:
        with self.storage.database.write() as connection:
            task_rows.forget_tasks(connection, now(-86400 * self.storage.settings.keep_task_days))
        self.jobs.forget()

    def _beat(self) -> None:
        with self.storage.database.write() as connection:
            facts.worker_seen(connection, self._name)

    def _leave(self) -> None:
        with self.storage.database.write() as connection:
            facts.worker_gone(connection, self._name)

    def _guarded(self, event: str, act: Callable[[], object]) -> None:
        """A locked or vanished database, or a fault of ours, must not end the worker's loop."""
        try:
            act()
        except Exception as error:
            self._steady_since = time.monotonic()
            log.warning(event, error=f"{type(error).__name__}: {error}", exc_info=True)


def run(settings: Settings, queues: Sequence[str], make: Callable[[Settings, Sequence[str], str], Worker]) -> None:
    """Works until SIGTERM, which drains; a second one ends it at once. `make` is given the queues and the worker's name.

    Of one name only one worker may run, on SQLite only one at all: another one waits for the first to end, then gives up.
    """
    configure()
    durable.make_folder(settings.data)
    single = settings.jobs_database.startswith("sqlite")
    name = "worker" if single else f"{socket.gethostname()}:{settings.data.absolute()}:{settings.worker_id}"
    lock_file = settings.data / ("worker.lock" if single else f"worker-{settings.worker_id}.lock")
    stop = threading.Event()

    def on_signal(number: int, frame: Any) -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    with lock_file.open("w") as lock:
        try:
            durable.lock(lock, LOCK_SECONDS)
        except TimeoutError:
            hint = "SQLite allows one (PostgreSQL allows many)" if single else "give each its own POLYCLIP_WORKER_ID"
            sys.exit(f"another worker runs on this data folder: {hint}")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, on_signal)
        worker = make(settings, queues, name)
        worker.launch()
        worker.watch(stop)
        last = threading.Timer(END_SECONDS, os._exit, (0,))
        last.daemon = True
        last.start()
        worker.drain()
        os._exit(0)  # jobs that have not stopped end where they are: what they have done is in the rows
