"""The decoder's cage: hostile bytes are decoded in a child process that can lose nothing but itself.

`Sandbox` (the parent's side) keeps one zygote, `python -m indexer.sandbox`: a clean process with the decoders imported
and no threads. It forks once per job, because an import costs a third of a second and a fork costs a millisecond. The
fork limits itself, decodes and answers; the zygote watches the clock and how the fork died. One line of JSON is a job,
one line of JSON is an answer.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import logging
import os
import resource
import select
import signal
import stat
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from av.error import FFmpegError
from PIL import Image

from indexer.decode import DecodedVideo, DecodeError, MediaFacts, Sampling, decode, reopen

DETAILS = {
    "decode_timeout": "Decoding the video took too long.",
    "decode_out_of_memory": "Decoding the video takes more memory than is allowed.",
    "decode_crashed": "The decoder broke down over this file.",
}
LONGEST_ANSWER = 4 << 20  # bytes
KEPT_STDERR = 4096  # bytes
DEFAULT = Sampling()
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38  # linux/prctl.h
ENVIRONMENT = {
    "PATH": os.defpath,
    "HOME": "/nonexistent",
    "LANG": "C.UTF-8",
    "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    "OPENBLAS_NUM_THREADS": "1",  # no thread may be alive when the zygote forks
    "MALLOC_ARENA_MAX": "2",  # an arena reserves 64 MiB of what RLIMIT_AS counts
    "DECORD_EOF_RETRY_MAX": "512",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one decoding may use. `output_bytes` bounds each written file."""

    memory_bytes: int = 2 << 30
    cpu_seconds: int = 300
    wall_seconds: float = 300.0
    output_bytes: int = 64 << 20


class Sandbox:
    """Decodes in a caged child process. Safe to share among threads: one decoding at a time, the others wait."""

    def __init__(self, limits: Limits = Limits()) -> None:
        self.limits = limits
        self._lock = threading.Lock()
        self._closed = False
        self._zygote: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def decode(self, path: Path, out: Path, sampling: Sampling = DEFAULT) -> DecodedVideo:
        """As `indexer.decode.decode`, into the empty folder `out`. What is left there after an error is waste.

        Raises DecodeError with the codes of `decode` and `decode_timeout`, `decode_out_of_memory`, `decode_crashed`;
        OSError for faults that are not the file's (a full disk); RuntimeError where the sandbox is closed.
        """
        job = {"path": str(path.resolve()), "out": str(out.resolve()), "sampling": asdict(sampling)}
        with self._lock:
            answer = self._ask(job | {"decord": True})
            if answer.get("code") in ("decode_crashed", "decode_out_of_memory"):  # decord is old: PyAV may still read it
                for file in out.iterdir():
                    file.unlink()
                answer = self._ask(job | {"decord": False})
        return _checked(answer, out)

    def reopen(self, path: Path, out: Path, facts: MediaFacts, sampling: Sampling = DEFAULT) -> DecodedVideo:
        """As `indexer.decode.reopen`, in the child; errors as of `decode`."""
        job = {"path": str(path.resolve()), "out": str(out.resolve()), "sampling": asdict(sampling), "facts": asdict(facts)}
        with self._lock:
            return _checked(self._ask(job), out)

    def close(self) -> None:
        """End the zygote and, with it, a decoding under way (whose caller gets the RuntimeError)."""
        self._closed = True
        zygote = self._zygote
        if zygote is not None:
            zygote.kill()
        with self._lock:
            self._stop()

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """One job, one answer. A zygote that dies over it was killed from outside: a new one gets the job once more."""
        status = 0
        for _ in range(2):
            zygote = self._running()
            assert zygote.stdin is not None and zygote.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                zygote.stdin.write(json.dumps(job | {"limits": asdict(self.limits)}).encode() + b"\n")
                zygote.stdin.flush()
            ready = select.poll()
            ready.register(zygote.stdout, select.POLLIN)
            in_time = ready.poll((self.limits.wall_seconds + 30) * 1000)  # the zygote has its own, shorter clock
            line = zygote.stdout.readline() if in_time else b""
            if line.endswith(b"\n"):
                answer: dict[str, Any] = json.loads(line)
                if log := answer.pop("log", ""):
                    logger.warning("decoder: %s: %s", job["path"], log)
                return answer
            status = self._stop()
            if not in_time:
                return _failed("decode_timeout")
        if status > 0:
            raise RuntimeError(f"the decoder process does not start (exit status {status})")
        return _failed("decode_crashed")

    def _running(self) -> subprocess.Popen[bytes]:
        if self._zygote is not None and self._zygote.poll() is not None:
            self._stop()
        if self._closed:
            raise RuntimeError("the sandbox is closed")
        if self._zygote is None:
            command, pipe = [sys.executable, "-P", "-m", "indexer.sandbox"], subprocess.PIPE
            self._zygote = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=ENVIRONMENT, cwd="/", start_new_session=True)
        return self._zygote

    def _stop(self) -> int:
        """The exit status of the zygote that was, negative for a signal."""
        zygote, self._zygote = self._zygote, None
        if zygote is None:
            return 0
        assert zygote.stdin is not None and zygote.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            zygote.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # without a job it ends by itself
            zygote.wait(0.2)
        zygote.kill()
        zygote.stdout.close()
        return zygote.wait()


def _checked(answer: dict[str, Any], out: Path) -> DecodedVideo:
    """What the child says it has written, if it has. Raises as `Sandbox.decode`."""
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


def _failed(code: str, log: str = "") -> dict[str, Any]:
    return {"code": code, "detail": DETAILS[code], "log": log}


# --- the zygote and its forks


def import_decoders() -> None:
    """Once for every fork: also what av, numpy and PIL import only when first used, an eighth of a short video's time."""
    import av.subtitles.stream  # noqa: F401
    import decord  # noqa: F401
    import numpy.ma  # noqa: F401

    Image.preinit()


def serve() -> None:
    """Answer jobs until standard input ends, which it does when the parent dies."""
    import_decoders()
    libc = ctypes.CDLL(None, use_errno=True)
    buffered = b""
    while True:
        while b"\n" not in buffered:
            more = os.read(0, 1 << 16)
            if not more:
                return
            buffered += more
        line, _, buffered = buffered.partition(b"\n")
        answer = _run(json.loads(line), libc)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _run(job: dict[str, Any], libc: ctypes.CDLL) -> dict[str, Any]:
    """Fork, wait for the answer under the wall limit, and say how the fork died where it gave none."""
    answers, answer_end = os.pipe()
    errors, error_end = os.pipe()
    zygote = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            if os.getppid() == zygote:
                _work(job, answer_end, error_end)
        finally:
            os._exit(1)
    with contextlib.suppress(OSError):  # the child does the same: whoever is first
        os.setpgid(child, child)
    os.close(answer_end)
    os.close(error_end)
    heard = {answers: b"", errors: b""}
    ready = select.poll()
    for end in (0, answers, errors):
        ready.register(end, select.POLLIN)
    open_ends = {answers, errors}
    deadline = time.monotonic() + job["limits"]["wall_seconds"]
    while open_ends and len(heard[answers]) < LONGEST_ANSWER and (left := deadline - time.monotonic()) > 0:
        for end, _ in ready.poll(left * 1000):
            if end == 0:  # the parent sends nothing while it waits: it has died
                os.killpg(child, signal.SIGKILL)
                os._exit(1)
            heard[end] += (more := os.read(end, 1 << 16))
            if end == errors:
                heard[end] = heard[end][-KEPT_STDERR:]
            if not more:
                ready.unregister(end)
                open_ends.discard(end)
    late = time.monotonic() >= deadline
    os.killpg(child, signal.SIGKILL)  # also whatever it has started
    _, status, usage = os.wait4(child, 0)
    os.close(answers)
    os.close(errors)
    if heard[answers].endswith(b"\n"):
        with contextlib.suppress(ValueError):
            answer = json.loads(heard[answers])
            if isinstance(answer, dict):
                return answer
    log = f"status {status}; {heard[errors].decode(errors='replace')}"
    spent = usage.ru_utime + usage.ru_stime >= job["limits"]["cpu_seconds"]
    if late or spent or os.waitstatus_to_exitcode(status) == -signal.SIGXCPU:
        return _failed("decode_timeout", log)
    return _failed("decode_out_of_memory" if b"bad_alloc" in heard[errors] else "decode_crashed", log)


def _work(job: dict[str, Any], answer_end: int, error_end: int) -> None:
    """The fork's whole life: limits, decoding, one answer."""
    os.setpgid(0, 0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(error_end, 1)
    os.dup2(error_end, 2)
    os.dup2(answer_end, 3)
    os.closerange(4, 256)
    try:
        limits = Limits(**job["limits"])
        for kind, soft, hard in (
            (resource.RLIMIT_AS, limits.memory_bytes, limits.memory_bytes),
            (resource.RLIMIT_CPU, limits.cpu_seconds, limits.cpu_seconds + 1),
            (resource.RLIMIT_FSIZE, limits.output_bytes, limits.output_bytes),
            (resource.RLIMIT_CORE, 0, 0),
            (resource.RLIMIT_NOFILE, 64, 64),
        ):
            resource.setrlimit(kind, (soft, hard))
        path, out, sampling = Path(job["path"]), Path(job["out"]), Sampling(**job["sampling"])
        if "facts" in job:
            video = reopen(path, out, MediaFacts(**job["facts"]), sampling)
        else:
            video = decode(path, out, sampling, decord=job["decord"])
        answer: dict[str, Any] = {"video": video.to_dict()}
    except DecodeError as error:
        answer = {"code": error.code, "detail": error.detail}
    except MemoryError:
        answer = _failed("decode_out_of_memory")
    except Exception as error:
        answer = _failed("decode_crashed", traceback.format_exc()[-KEPT_STDERR:])
        if isinstance(error, OSError) and not isinstance(error, FFmpegError) and error.errno not in (None, errno.EFBIG):
            answer = {"errno": error.errno}
    with os.fdopen(3, "wb") as file:
        file.write(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    serve()
