"""The decoder processes of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from indexer.decode import DecodedVideo, Decoder, MediaFacts, Sampling
from indexer.sandbox import Check, Sandbox
from indexer.sandbox_child import Limits
from service.settings import Settings


class Decoders:
    """As many decoder processes as the settings say, each lent to one caller at a time; a process starts at its first use."""

    def __init__(self, settings: Settings, decoder: Decoder = "pyav") -> None:
        """`decoder`: other than PyAV only where the operator's own files are decoded, and nobody else's."""
        wall = settings.decode_seconds
        limits = Limits(settings.decode_bytes, max(1, int(wall)), wall, output_bytes=settings.decode_output_bytes)
        self._all = [Sandbox(limits, decoder) for _ in range(settings.decoders)]
        self._free = list(self._all)
        self._returned = threading.Condition()

    def decode(self, path: Path, out: Path, sampling: Sampling, check: Check = lambda: None) -> DecodedVideo:
        """`Sandbox.decode` on the next free process."""
        return self._lent(check, lambda sandbox: sandbox.decode(path, out, sampling, check))

    def reopen(self, path: Path, out: Path, facts: MediaFacts, sampling: Sampling, check: Check = lambda: None) -> DecodedVideo:
        """`Sandbox.reopen` on the next free process."""
        return self._lent(check, lambda sandbox: sandbox.reopen(path, out, facts, sampling, check))

    def _lent(self, check: Check, work: Callable[[Sandbox], DecodedVideo]) -> DecodedVideo:
        with self._returned:
            while not self._free:
                self._returned.wait(1.0)
                check()
            sandbox = self._free.pop()
        try:
            return work(sandbox)
        finally:
            with self._returned:
                self._free.append(sandbox)
                self._returned.notify()

    def close(self) -> None:
        for sandbox in self._all:
            sandbox.close()
