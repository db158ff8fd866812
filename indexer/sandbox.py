"""Decoding in another process (`indexer.sandbox_child`), which a hostile file can harm without harming this one.

The child runs as the same user as the service, with its network and its files in reach.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from indexer.decode import DecodedVideo, DecodeError, Decoder, MediaFacts, Sampling
from indexer.pictures import InvalidImage
from indexer.sandbox_child import DETAILS, LOOK_SECONDS, PIXELS, Limits, failed

END_SECONDS = 2.0  # for the child to end what it has started
LOCK_SECONDS = 5.0
DEFAULT, NO_MORE_THAN = Sampling(), Limits()
ENVIRONMENT = {
    "PATH": os.defpath,
    "HOME": "/nonexistent",
    "LANG": "C.UTF-8",
    "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    "OPENBLAS_NUM_THREADS": "1",  # no thread may be alive when the child forks
    "MALLOC_ARENA_MAX": "2",  # an arena reserves 64 MiB of what RLIMIT_AS counts
    "DECORD_EOF_RETRY_MAX": "512",
}

Check = Callable[[], object]

logger = logging.getLogger(__name__)


class Sandbox:
    """Decodes in a child process with limits. Safe to use from several threads: they decode one after the other.

    `decoder`: as of `indexer.decode.decode`. The child imports decord only if this is not `pyav`: decord bundles an FFmpeg of
    2020, which is not safe with files of unknown origin.

    `check`, an argument of the methods, is called every LOOK_SECONDS while they wait; if it raises, the decoding is ended and
    the error is passed on.
    """

    def __init__(self, limits: Limits = NO_MORE_THAN, decoder: Decoder = "pyav") -> None:
        self.limits = limits
        self._decoder = decoder
        self._lock = threading.Lock()
        self._closed = False
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def decode(self, path: Path, out: Path, sampling: Sampling = DEFAULT, check: Check = lambda: None) -> DecodedVideo:
        """As `indexer.decode.decode`, into the empty folder `out`. After an error, what is in `out` is of no use.

        Raises DecodeError with the codes of `decode` and `decode_timeout`, `decode_out_of_memory`, `decode_crashed`,
        `frames_too_large`; OSError for faults that are not the file's (a full disk); RuntimeError where the sandbox is closed.
        """
        job = {"path": str(path.resolve()), "out": str(out.resolve()), "sampling": asdict(sampling)}
        with self._lock:
            answer = self._ask(job | {"decoder": self._decoder}, check)
            if self._decoder == "auto" and answer.get("code") in ("decode_crashed", "decode_out_of_memory"):
                for file in out.iterdir():  # decord is old: PyAV may still read it
                    file.unlink()
                answer = self._ask(job | {"decoder": "pyav"}, check)
        return _checked(answer, out)

    def reopen(
        self, path: Path, out: Path, facts: MediaFacts, sampling: Sampling = DEFAULT, check: Check = lambda: None
    ) -> DecodedVideo:
        """As `indexer.decode.reopen`, in the child; errors as of `decode`."""
        job = {"path": str(path.resolve()), "out": str(out.resolve()), "sampling": asdict(sampling), "facts": asdict(facts)}
        with self._lock:
            return _checked(self._ask(job, check), out)

    def picture(self, data: bytes, out: Path) -> Image.Image:
        """As `indexer.pictures.read_picture`, in the child, by way of files in the folder `out`.

        Raises InvalidImage, and OSError and RuntimeError as `decode`.
        """
        (out / "picture").write_bytes(data)
        job = {"path": str(out / "picture"), "out": str(out), "sampling": asdict(DEFAULT), "picture": True}
        with self._lock:
            answer = self._ask(job, lambda: None)
        if "errno" in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]))
        if "code" in answer:
            told = answer["detail"] if answer["code"] == "invalid_image" else "reading the picture failed, or took too much"
            raise InvalidImage(told)
        try:
            (width, height), pixels = answer["size"], (out / PIXELS).read_bytes()
            if 3 * width * height != len(pixels):
                raise ValueError("not the pixels of this size")
            return Image.frombytes("RGB", (width, height), pixels)
        except (KeyError, TypeError, ValueError, FileNotFoundError) as error:
            raise InvalidImage("reading the picture failed") from error

    def close(self) -> None:
        """Ends the child and any decoding under way, whose caller gets RuntimeError."""
        self._closed = True
        child = self._child
        if child is not None:
            _end(child)
        if self._lock.acquire(timeout=LOCK_SECONDS):  # a caller whose `check` does not return keeps it
            try:
                self._stop()
            finally:
                self._lock.release()

    def _ask(self, job: dict[str, Any], check: Check) -> dict[str, Any]:
        """The child's answer to a job. A child that ends without one was killed from outside: a new one gets the job, once."""
        job["longest"] = _longest_answer(job["sampling"])
        status = 0
        for _ in range(2):
            child = self._running()
            assert child.stdin is not None and child.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(json.dumps(job | {"limits": asdict(self.limits)}).encode() + b"\n")
                child.stdin.flush()
            ready = select.poll()
            ready.register(child.stdout, select.POLLIN)
            deadline = time.monotonic() + self.limits.wall_seconds + 30  # the child has its own, shorter clock
            try:
                while not (in_time := ready.poll(1000 * LOOK_SECONDS)) and time.monotonic() < deadline:
                    check()
            except BaseException:
                self._stop()
                raise
            line = child.stdout.readline() if in_time else b""
            if line.endswith(b"\n"):
                answer: dict[str, Any] = json.loads(line)
                if log := answer.pop("log", ""):
                    logger.warning("decoder: %s: %s", job["path"], log)
                return answer
            status = self._stop()
            if not in_time:
                return failed("decode_timeout")
        if status > 0:
            raise RuntimeError(f"the decoder process does not start (exit status {status})")
        return failed("decode_crashed")

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is not None:
            self._stop()
        if self._closed:
            raise RuntimeError("the sandbox is closed")
        if self._child is None:
            command, pipe = [sys.executable, "-P", "-m", "indexer.sandbox_child", self._decoder], subprocess.PIPE
            self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=ENVIRONMENT, cwd="/", start_new_session=True)
        return self._child

    def _stop(self) -> int:
        """Ends the child, if there is one; its exit status, negative for a signal."""
        child, self._child = self._child, None
        if child is None:
            return 0
        assert child.stdin is not None and child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
        _end(child)
        child.stdout.close()
        return child.wait()


def _end(child: subprocess.Popen[bytes]) -> None:
    """Asks the child to end itself and what it has started; after END_SECONDS it is killed, and its fork with it."""
    child.terminate()
    try:
        child.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()


def _longest_answer(sampling: Mapping[str, Any]) -> int:
    """Bytes; an answer names every file."""
    return (1 << 20) + int(sampling["max_segments"]) * (32 * (int(sampling["frames_per_segment"]) + 1) + 128)


def _checked(answer: dict[str, Any], out: Path) -> DecodedVideo:
    """The video that the child answered, if the files it names are there. Raises as `Sandbox.decode`."""
    if "errno" in answer:
        raise OSError(answer["errno"], os.strerror(answer["errno"]))
    if "code" in answer:
        raise DecodeError(answer["code"], answer["detail"])
    try:
        video = DecodedVideo.from_dict(answer["video"])
        names = [name for segment in video.segments for name in (*segment.frame_files, segment.thumbnail_file)]
        if not all(stat.S_ISREG((out / name).lstat().st_mode) for name in names):
            raise ValueError("not a file")
    except (KeyError, TypeError, ValueError, FileNotFoundError) as error:
        raise DecodeError("decode_crashed", DETAILS["decode_crashed"]) from error
    return video
