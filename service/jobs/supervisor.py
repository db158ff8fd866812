"""The embedded worker: a child process beside the API, at low priority, started again when it dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping

import structlog

from service.settings import Settings

log = structlog.get_logger()
BACKOFF = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  # seconds, from death to death
STEADY_SECONDS = 60.0  # after so long a life it begins anew
STOP_SECONDS = 9.0


class Supervisor:
    """Keeps one worker alive. The child ends when this process does, even by kill -9."""

    def __init__(self, settings: Settings, module: str) -> None:
        """`module`: what Python runs as the worker."""
        self._module = module
        self._environment = {**without_root_key(os.environ), **environment(settings)}
        self._child: subprocess.Popen[bytes] | None = None
        self._asked: float | None = None
        self._stopping = threading.Event()
        self._birth = threading.RLock()  # held while a child is made, so that none is overlooked
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ask_to_stop(self) -> None:
        """SIGTERM, not waited for."""
        self._stopping.set()
        self._asked = self._asked or time.monotonic()
        with self._birth:
            if self._child is not None and self._child.poll() is None:
                self._child.terminate()

    def stop(self) -> None:
        """SIGTERM, if there was none yet, and nine seconds after it SIGKILL."""
        if self._asked is None:
            self.ask_to_stop()
        if self._child is not None and self._asked is not None:
            try:
                self._child.wait(timeout=max(0.1, self._asked + STOP_SECONDS - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._child.kill()
        if self._thread.is_alive():
            self._thread.join(timeout=1)

    def _watch(self) -> None:
        deaths = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            status = self._life()
            if self._stopping.is_set():
                return
            if time.monotonic() - started > STEADY_SECONDS:
                deaths = 0
            wait = BACKOFF[min(deaths, len(BACKOFF) - 1)]
            deaths += 1
            log.warning("worker_died", status=status, restart_in_seconds=wait)
            self._stopping.wait(wait)

    def _life(self) -> int | str:
        """Of one child: how it ended, or why it could not begin."""
        command = [sys.executable, "-m", self._module, "--parent", str(os.getpid())]
        with self._birth:
            if self._stopping.is_set():
                return "not begun"
            try:
                self._child = subprocess.Popen(  # in a group of its own: Ctrl-C is for the API, which tells the worker
                    command, env=self._environment, stdin=subprocess.DEVNULL, process_group=0
                )
            except OSError as error:  # no memory for another process, say
                return str(error)
        return self._child.wait()


def without_root_key(variables: Mapping[str, str]) -> dict[str, str]:
    """For a child that has no use of the operator's key: what runs as the same user can read its environment."""
    return {name: value for name, value in variables.items() if name.upper() != "POLYCLIP_ROOT_KEY"}


def environment(settings: Settings) -> dict[str, str]:
    """The settings as environment variables, for a child process that shall have the same ones, but for the root key."""
    values = settings.model_dump(mode="json", exclude_none=True, exclude={"root_key"})
    as_text = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return {f"POLYCLIP_{name.upper()}": value for name, value in as_text.items()}
