"""The process that decodes: `python -m indexer.sandbox_child` imports the decoders once and forks for each job.

One line of JSON on standard input is a job, one line on standard output its answer. An import takes a third of a second, a fork
a millisecond. The fork limits itself, decodes and answers; this process watches the clock, what is written and how the fork
ended. It has no threads.

After each job it ends every process that the job started, also those in sessions of their own: it is the subreaper, so it
becomes the parent of every process below it that loses its own. The fork may start no processes (RLIMIT_NPROC), but root is
exempt from that limit.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from av.error import FFmpegError
from PIL import Image

from indexer.decode import DecodeError, Decoder, MediaFacts, Sampling, decode, reopen
from indexer.pictures import InvalidImage, read_picture

DETAILS = {
    "decode_timeout": "Decoding the video took too long.",
    "decode_out_of_memory": "Decoding the video takes more memory than is allowed.",
    "decode_crashed": "The decoder broke down over this file.",
    "frames_too_large": "The frames of the video take more room than is allowed.",
}
LOOK_SECONDS = 0.25  # between two looks at what has been written
KEPT_STDERR = 4096  # bytes
PIXELS = "pixels"  # the file of a picture's RGB bytes
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38  # linux/prctl.h


@dataclass(frozen=True, slots=True)
class Limits:
    """What one decoding may use. `file_bytes` bounds each written file, `output_bytes` all of them together."""

    memory_bytes: int = 2 << 30
    cpu_seconds: int = 300
    wall_seconds: float = 300.0
    file_bytes: int = 64 << 20
    output_bytes: int = 512 << 20


def failed(code: str, log: str = "") -> dict[str, Any]:
    return {"code": code, "detail": DETAILS[code], "log": log}


def import_decoders(decoder: Decoder) -> None:
    """Imports the decoders, and what av, numpy and PIL import at their first use only: an eighth of a short video's time."""
    import av.subtitles.stream  # noqa: F401
    import numpy.ma  # noqa: F401

    if decoder != "pyav":
        import decord  # noqa: F401

    import PIL.WebPImagePlugin  # noqa: F401

    Image.preinit()


def serve(decoder: Decoder) -> None:
    """Answers jobs until SIGTERM, or until standard input ends, which it does when the service ends."""
    os.umask(0o077)
    import_decoders(decoder)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    server = os.getpid()
    signal.signal(signal.SIGTERM, lambda *_: _leave() if os.getpid() == server else os._exit(1))
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
    """Runs a job in a fork under its limits and returns the answer, or how the fork ended without one. No process is left."""
    out, limits = Path(job["out"]), Limits(**job["limits"])
    allowed = limits.output_bytes + _written(out)
    answers, answer_end = os.pipe()
    errors, error_end = os.pipe()
    server = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            if os.getppid() == server:
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
        return failed("frames_too_large")
    if heard[answers].endswith(b"\n"):
        with contextlib.suppress(ValueError):
            answer = json.loads(heard[answers])
            if isinstance(answer, dict):
                return answer
    log = f"status {status}; {heard[errors].decode(errors='replace')}"
    spent = usage.ru_utime + usage.ru_stime >= limits.cpu_seconds
    if late or spent or os.waitstatus_to_exitcode(status) == -signal.SIGXCPU:
        return failed("decode_timeout", log)
    return failed("decode_out_of_memory" if b"bad_alloc" in heard[errors] else "decode_crashed", log)


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
    """Kills every process below this one, those that become its children meanwhile too, until none is left.

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
    """What the fork does: sets its limits, decodes, answers."""
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
        answer: dict[str, Any]
        if "picture" in job:
            picture = read_picture(path.read_bytes())
            (out / PIXELS).write_bytes(picture.tobytes())
            answer = {"size": picture.size}
        elif "facts" in job:
            answer = {"video": reopen(path, out, MediaFacts(**job["facts"]), sampling).to_dict()}
        else:
            answer = {"video": decode(path, out, sampling, decoder=decoder).to_dict()}
    except InvalidImage as error:
        answer = {"code": "invalid_image", "detail": str(error)}
    except DecodeError as error:
        answer = {"code": error.code, "detail": error.detail}
    except MemoryError:
        answer = failed("decode_out_of_memory")
    except Exception as error:
        answer = failed("decode_crashed", traceback.format_exc()[-KEPT_STDERR:])
        if isinstance(error, OSError) and not isinstance(error, FFmpegError) and error.errno not in (None, errno.EFBIG):
            answer = {"errno": error.errno}
    with os.fdopen(3, "wb") as file:
        file.write(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    serve(sys.argv[1])  # type: ignore[arg-type]
