"""A worker process: `python -m service.worker`, or `polyclip worker`."""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import os
import signal
import socket
import sys
import time

from service.jobs import QUEUES, work
from service.logs import configure
from service.settings import Settings

PR_SET_PDEATHSIG = 1
LOCK_SECONDS = 30


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, help="end when this process, our parent, has died")
    parser.add_argument("--queues", default=",".join(sorted(set(QUEUES.values()))))
    arguments = parser.parse_args()
    if arguments.parent is not None:
        os.nice(10)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != arguments.parent:
            sys.exit(0)
    run(Settings(), arguments.queues.split(","))


def run(settings: Settings, queues: list[str]) -> None:
    """Works until SIGTERM. On SQLite only one worker may: a second one waits for the first to end, then gives up."""
    configure()
    if not settings.jobs_database.startswith("sqlite"):
        work(settings, queues, name=f"{socket.gethostname()}-{os.environ.get('POLYCLIP_WORKER_ID', '0')}")
        return
    settings.data.mkdir(parents=True, exist_ok=True)
    with (settings.data / "worker.lock").open("w") as lock:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    sys.exit("another worker runs on this data folder: SQLite allows one (PostgreSQL allows many)")
                time.sleep(0.2)
        work(settings, queues)


if __name__ == "__main__":
    main()
