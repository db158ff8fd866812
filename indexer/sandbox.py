"""The decoder's cage: hostile bytes are decoded in a child process that can lose nothing but itself.

`Sandbox` (the parent's side) keeps one zygote, `python -m indexer.sandbox`: a clean process with the decoders imported
and no threads. It forks once per job, because an import costs a third of a second and a fork costs a millisecond. The
fork limits itself, decodes and answers; the zygote watches the clock, what is written and how the fork died. One line of
JSON is a job, one line of JSON is an answer.

After each job the zygote ends every process that has come of it, also those in sessions of their own: it is the subreaper,
so the kernel hands it whoever has lost his parent. The fork may not start processes at all (RLIMIT_NPROC), but root is
exempt from that limit. The fork runs as the same user as the service, with its network and its files in reach.
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
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from av.error import FFmpegError
from PIL import Image

from indexer.decode import DecodedVideo, DecodeError, Decoder, MediaFacts, Sampling, decode, reopen

DETAILS = {
    "decode_timeout": "Decoding the video took too long.",
    "decode_out_of_memory": "Decoding the video takes more memory than is allowed.",
    "decode_crashed": "The decoder broke down over this file.",
    "frames_too_large": "The frames of the video take more room than is allowed.",
}
LOOK_SECONDS = 0.25  # between two looks at whether the caller still wants the answer, and at what has been written
END_SECONDS = 2.0  # for a zygote to end what it has started
LOCK_SECONDS = 5.0
KEPT_STDERR = 4096  # bytes
DEFAULT = Sampling()
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38  # linux/prctl.h
ENVIRONMENT = {
    "PATH": os.defpath,
    "HOME": "/nonexistent",
    "LANG": "C.UTF-8",
    "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    "OPENBLAS_NUM_THREADS": "1",  # no thread may be alive when the zygote forks
    "MALLOC_ARENA_MAX": "2",  # an arena reserves 64 MiB of what RLIMIT_AS counts
    "DECORD_EOF_RETRY_MAX": "512",
}

Check = Callable[[], object]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one decoding may use. `file_bytes` bounds each written file, `output_bytes` all of them together."""

    memory_bytes: int = 2 << 30
    cpu_seconds: int = 300
    wall_seconds: float = 300.0
    file_bytes: int = 64 << 20
    output_bytes: int = 512 << 20


class Sandbox:
    """Decodes in a caged child process. Safe to share among threads: one decoding at a time, the others wait.

    `decoder`: as of `indexer.decode.decode`. Unless it names decord, the child does not even import that: it bundles an
    FFmpeg of 2020, which is not for the files of strangers.

    `check` of the methods is called again and again while they wait; what it raises ends the decoding and comes through.
    """

    def __init__(self, limits: Limits = Limits(), decoder: Decoder = "pyav") -> None:
        self.limits = limits
        self._decoder = decoder
        self._lock = threading.Lock()
        self._closed = False
        self._zygote: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def decode(self, path: Path, out: Path, sampling: Sampling = DEFAULT, check: Check = lambda: None) -> DecodedVideo:
        """As `indexer.decode.decode`, into the empty folder `out`. What is left there after an error is waste.

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

    def close(self) -> None:
        """End the zygote and, with it, a decoding under way (whose caller gets the RuntimeError)."""
        self._closed = True
        zygote = self._zygote
        if zygote is not None:
            _end(zygote)
        if self._lock.acquire(timeout=LOCK_SECONDS):  # a caller whose `check` does not return keeps it
            try:
                self._stop()
            finally:
                self._lock.release()

    def _ask(self, job: dict[str, Any], check: Check) -> dict[str, Any]:
        """One job, one answer. A zygote that dies over it was killed from outside: a new one gets the job once more."""
        job["longest"] = _longest_answer(job["sampling"])
        status = 0
        for _ in range(2):
            zygote = self._running()
            assert zygote.stdin is not None and zygote.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                zygote.stdin.write(json.dumps(job | {"limits": asdict(self.limits)}).encode() + b"\n")
                zygote.stdin.flush()
            ready = select.poll()
            ready.register(zygote.stdout, select.POLLIN)
            deadline = time.monotonic() + self.limits.wall_seconds + 30  # the zygote has its own, shorter clock
            try:
                while not (in_time := ready.poll(1000 * LOOK_SECONDS)) and time.monotonic() < deadline:
                    check()
            except BaseException:
                self._stop()
                raise
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
            command, pipe = [sys.executable, "-P", "-m", "indexer.sandbox", self._decoder], subprocess.PIPE
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
        _end(zygote)
        zygote.stdout.close()
        return zygote.wait()


def _end(zygote: subprocess.Popen[bytes]) -> None:
    """Lets it end what it has started; one that does not answer is killed, and its fork with it."""
    zygote.terminate()
    try:
        zygote.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        zygote.kill()


def _longest_answer(sampling: Mapping[str, Any]) -> int:
    """Bytes; an answer names every file."""
    return (1 << 20) + int(sampling["max_segments"]) * (32 * (int(sampling["frames_per_segment"]) + 1) + 128)


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


def import_decoders(decoder: Decoder) -> None:
    """Once for every fork: also what av, numpy and PIL import only when first used, an eighth of a short video's time."""
    import av.subtitles.stream  # noqa: F401
    import numpy.ma  # noqa: F401

    if decoder != "pyav":
        import decord  # noqa: F401

    Image.preinit()


def serve(decoder: Decoder) -> None:
    """Answer jobs until standard input ends, which it does when the parent dies, or until SIGTERM."""
    os.umask(0o077)
    import_decoders(decoder)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    zygote = os.getpid()
    signal.signal(signal.SIGTERM, lambda *_: _leave() if os.getpid() == zygote else os._exit(1))
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
    """Fork, wait for the answer under the limits, and say how the fork died where it gave none. No process is left of it."""
    out, limits = Path(job["out"]), Limits(**job["limits"])
    allowed = limits.output_bytes + _written(out)
    answers, answer_end = os.pipe()
    errors, error_end = os.pipe()
    zygote = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            if os.getppid() == zygote:
                _work(job, answer_end, error_end)
        finally:
            os._exit(1)
    os.close(answer_end)
    os.close(error_end)
    heard = {answers: bytearray(), errors: bytearray()}
    ready = select.poll()
    for end in (0, answers, errors):
        ready.register(end, select.POLLIN)
    open_ends = {answers, errors}
    deadline, look, large = time.monotonic() + limits.wall_seconds, 0.0, False
    while answers in open_ends and not heard[answers].endswith(b"\n") and len(heard[answers]) < job["longest"] and not large:
        if (now := time.monotonic()) >= deadline:
            break
        if now >= look:
            large = _written(out) > allowed
            look = time.monotonic() + max(LOOK_SECONDS, 20 * (time.monotonic() - now))  # many files take long to count
        for end, _ in ready.poll(1000 * max(0.0, min(deadline, look) - time.monotonic())):
            if end == 0:  # the parent sends nothing while it waits: it has died
                _leave()
            heard[end] += (more := os.read(end, 1 << 16))
            if end == errors:
                del heard[end][:-KEPT_STDERR]
            if not more:
                ready.unregister(end)
                open_ends.discard(end)
    late = time.monotonic() >= deadline
    status, usage = _end_descendants()[child]
    os.set_blocking(errors, False)
    with contextlib.suppress(BlockingIOError):
        heard[errors] += os.read(errors, 1 << 16)
    os.close(answers)
    os.close(errors)
    if large or _written(out) > allowed:
        return _failed("frames_too_large")
    if heard[answers].endswith(b"\n"):
        with contextlib.suppress(ValueError):
            answer = json.loads(heard[answers])
            if isinstance(answer, dict):
                return answer
    log = f"status {status}; {heard[errors].decode(errors='replace')}"
    spent = usage.ru_utime + usage.ru_stime >= limits.cpu_seconds
    if late or spent or os.waitstatus_to_exitcode(status) == -signal.SIGXCPU:
        return _failed("decode_timeout", log)
    return _failed("decode_out_of_memory" if b"bad_alloc" in heard[errors] else "decode_crashed", log)


def _written(folder: Path) -> int:
    """Bytes of the files in a folder and in those below it."""
    total, folders = 0, [str(folder)]
    while folders:
        with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                with contextlib.suppress(FileNotFoundError):
                    total += entry.stat(follow_symlinks=False).st_size
    return total


def _end_descendants() -> dict[int, tuple[int, resource.struct_rusage]]:
    """Kills all that has come of this process, and what is handed to it as that dies, until nothing is left.

    Returns status and usage by process id.
    """
    ended = {}
    while True:
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        try:
            pid, status, usage = os.wait4(-1, 0)
            while pid:
                ended[pid] = status, usage
                pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return ended


def _leave() -> NoReturn:
    _end_descendants()
    os._exit(1)


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
        limits, decoder = Limits(**job["limits"]), job.get("decoder", "pyav")
        for kind, soft, hard in (
            (resource.RLIMIT_AS, limits.memory_bytes, limits.memory_bytes),
            (resource.RLIMIT_CPU, limits.cpu_seconds, limits.cpu_seconds + 1),
            (resource.RLIMIT_FSIZE, limits.file_bytes, limits.file_bytes),
            (resource.RLIMIT_CORE, 0, 0),
            (resource.RLIMIT_NOFILE, 64, 64),
        ):
            resource.setrlimit(kind, (soft, hard))
        if decoder == "pyav":  # decord starts threads, which count
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        path, out, sampling = Path(job["path"]), Path(job["out"]), Sampling(**job["sampling"])
        if "facts" in job:
            video = reopen(path, out, MediaFacts(**job["facts"]), sampling)
        else:
            video = decode(path, out, sampling, decoder=decoder)
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
    serve(sys.argv[1])  # type: ignore[arg-type]
