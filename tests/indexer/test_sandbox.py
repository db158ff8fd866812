"""The cage holds: each way in which a decoding can go wrong, made to go wrong for real."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from videos import time_shown, write_video

from indexer.decode import DecodeError, Decoder, Sampling
from indexer.pictures import InvalidImage, read_picture
from indexer.sandbox import ENVIRONMENT, Sandbox
from indexer.sandbox_child import Limits

SLOW = Sampling(frames_per_segment=250, short_side=720)  # of the video `large`: some seconds of work


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("videos") / "small.mp4")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (720, 1280, 3), dtype=np.uint8)  # a lot of work for its size

    def picture(seconds: float, size: tuple[int, int]) -> np.ndarray:
        return np.roll(noise, round(400 * seconds), axis=1)

    return write_video(tmp_path_factory.mktemp("videos") / "large.mp4", seconds=10, size=(1280, 720), picture=picture)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def zygote_of(sandbox: Sandbox) -> int:
    wait_for(lambda: sandbox._child)
    assert sandbox._child is not None
    return sandbox._child.pid


def fork_of(sandbox: Sandbox) -> int:
    zygote = zygote_of(sandbox)
    wait_for(lambda: children(zygote))
    return children(zygote)[0]


class Call(threading.Thread):
    """A decoding in a thread of its own, with its outcome."""

    def __init__(
        self, sandbox: Sandbox, path: Path, out: Path, sampling: Sampling = SLOW, check: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__()
        self.call: Callable[[], object] = lambda: sandbox.decode(path, out, sampling, check)
        self.outcome: object = None
        self.start()

    def run(self) -> None:
        try:
            self.outcome = self.call()
        except Exception as error:
            self.outcome = error

    def result(self) -> object:
        self.join(60)
        assert not self.is_alive()
        return self.outcome


def code_of(error: object) -> str:
    assert isinstance(error, DecodeError), error
    return error.code


def decode_fails(sandbox: Sandbox, path: Path, out: Path, sampling: Sampling = SLOW) -> str:
    with pytest.raises(DecodeError) as caught:
        sandbox.decode(path, out, sampling)
    return caught.value.code


def test_a_video_comes_through_the_cage_with_its_frames(sandbox: Sandbox, small: Path, out: Path) -> None:
    video = sandbox.decode(small, out)
    assert video.facts.decoder == "pyav" and len(video.segments[0].frame_files) == 12
    assert abs(time_shown(out / video.segments[0].frame_files[6]) - 13 / 12) < 0.2


def test_the_faults_of_a_file_come_through_with_their_codes(sandbox: Sandbox, small: Path, out: Path) -> None:
    text = out.parent / "text.mp4"
    text.write_text("no video")
    assert decode_fails(sandbox, text, out) == "unsupported_media"
    assert decode_fails(sandbox, small, out, Sampling(max_seconds=1)) == "video_too_long"


def test_a_fault_of_ours_is_not_blamed_on_the_file(sandbox: Sandbox, small: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sandbox.decode(small, tmp_path / "no such folder")


def test_a_fork_has_nothing_left_to_import(small: Path, out: Path) -> None:
    story = """
import sys
from pathlib import Path
from indexer.decode import decode
from indexer.sandbox_child import import_decoders
import_decoders("pyav")
assert len(list(Path("/proc/self/task").iterdir())) == 1
before = set(sys.modules)
decode(Path(sys.argv[1]), Path(sys.argv[2]))
print(*(set(sys.modules) - before))
"""
    command = [sys.executable, "-c", story, str(small), str(out)]
    told = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert told.stdout.split() == []


def test_one_zygote_without_threads_serves_all_calls(sandbox: Sandbox, small: Path, tmp_path: Path) -> None:
    pids = set()
    for name in "ab":
        (tmp_path / name).mkdir()
        sandbox.decode(small, tmp_path / name)
        pids.add(zygote_of(sandbox))
    [pid] = pids
    assert len(os.listdir(f"/proc/{pid}/task")) == 1
    assert {int(fd) for fd in os.listdir(f"/proc/{pid}/fd")} == {0, 1, 2}


def test_a_decoding_that_hangs_is_ended_by_the_clock_and_the_next_one_works(large: Path, small: Path, out: Path) -> None:
    with Sandbox(Limits(wall_seconds=0.5)) as sandbox:
        start = time.monotonic()
        assert decode_fails(sandbox, large, out) == "decode_timeout"
        assert time.monotonic() - start < 10
        zygote = zygote_of(sandbox)
        assert children(zygote) == []
        (out.parent / "next").mkdir()
        sandbox.decode(small, out.parent / "next")
        assert zygote_of(sandbox) == zygote


def test_a_decoding_that_spends_too_much_cpu_time_is_a_timeout(large: Path, out: Path) -> None:
    with Sandbox(Limits(cpu_seconds=1)) as sandbox:
        assert decode_fails(sandbox, large, out) == "decode_timeout"


def test_a_decoding_that_needs_too_much_memory_says_so(tmp_path: Path, out: Path) -> None:
    path = write_video(tmp_path / "8k.mp4", size=(7680, 4320), times=[0])
    with Sandbox(Limits(memory_bytes=400 << 20)) as sandbox:
        assert decode_fails(sandbox, path, out, Sampling()) == "decode_out_of_memory"


def test_a_file_larger_than_allowed_is_not_written(small: Path, out: Path) -> None:
    with Sandbox(Limits(file_bytes=100)) as sandbox:
        assert decode_fails(sandbox, small, out, Sampling()) == "decode_crashed"
    assert all(file.stat().st_size <= 100 for file in out.iterdir())


def test_a_crash_under_decord_is_tried_again_with_pyav(large: Path, out: Path) -> None:
    with Sandbox(decoder="auto") as sandbox:
        call = Call(sandbox, large, out, Sampling(frames_per_segment=60, short_side=720))
        os.kill(fork_of(sandbox), signal.SIGSEGV)
        video = call.result()
    assert video.facts.decoder == "pyav", video  # type: ignore[attr-defined]
    assert len(list(out.iterdir())) == 61


def test_a_decoder_that_crashes_each_time_is_an_error_and_the_zygote_lives_on(
    sandbox: Sandbox, large: Path, small: Path, out: Path, tmp_path: Path
) -> None:
    call = Call(sandbox, large, out)
    os.kill(fork_of(sandbox), signal.SIGABRT)
    assert code_of(call.result()) == "decode_crashed"
    zygote = zygote_of(sandbox)
    (tmp_path / "next").mkdir()
    sandbox.decode(small, tmp_path / "next")
    assert zygote_of(sandbox) == zygote


def test_a_zygote_killed_between_two_calls_is_replaced(sandbox: Sandbox, small: Path, out: Path, tmp_path: Path) -> None:
    sandbox.decode(small, out)
    os.kill(zygote := zygote_of(sandbox), signal.SIGKILL)
    (tmp_path / "next").mkdir()
    assert sandbox.decode(small, tmp_path / "next").facts.frames == 50
    assert zygote_of(sandbox) != zygote


def test_a_zygote_killed_during_a_call_takes_its_fork_along_and_the_call_still_succeeds(
    sandbox: Sandbox, large: Path, out: Path
) -> None:
    call = Call(sandbox, large, out, Sampling(frames_per_segment=60, short_side=720))
    fork = fork_of(sandbox)
    os.kill(zygote_of(sandbox), signal.SIGKILL)
    wait_for(lambda: not alive(fork))
    video = call.result()
    assert len(video.segments[0].frame_files) == 60, video  # type: ignore[attr-defined]


def test_two_threads_share_a_sandbox_and_meet_only_their_own_folders(sandbox: Sandbox, small: Path, tmp_path: Path) -> None:
    other = write_video(tmp_path / "other.mp4", size=(64, 48), seconds=1)
    folders = [tmp_path / str(n) for n in range(8)]
    for folder in folders:
        folder.mkdir()
    bystander = tmp_path / "000-00.jpg"
    bystander.write_text("not touched")
    calls = [Call(sandbox, (small, other)[n % 2], folder, Sampling()) for n, folder in enumerate(folders)]
    for n, call in enumerate(calls):
        assert call.result().facts.width == (160, 64)[n % 2]  # type: ignore[attr-defined]
        assert len(list(folders[n].iterdir())) == 13
    assert bystander.read_text() == "not touched"


def test_the_decoder_inherits_no_secret_no_open_file_and_has_its_limits(
    sandbox: Sandbox, large: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYCLIP_SECRET", "hush")
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        call = Call(sandbox, large, out)
        fork = fork_of(sandbox)
        wait_for(lambda: any(out.iterdir()))
        environment = Path(f"/proc/{fork}/environ").read_bytes()
        files = [os.readlink(f"/proc/{fork}/fd/{fd}") for fd in os.listdir(f"/proc/{fork}/fd")]
        limits = Path(f"/proc/{fork}/limits").read_text().splitlines()
        os.kill(zygote_of(sandbox), signal.SIGSTOP)  # nothing is restarted while the sandbox is closed
        sandbox.close()
        assert isinstance(call.result(), RuntimeError)
    assert b"hush" not in environment and b"HOME=/nonexistent" in environment
    assert str(tmp_path / "open") not in files and os.devnull in files
    found = {line[:26].strip(): line[26:].split()[0] for line in limits}
    assert found["Max address space"] == str(2 << 30) and found["Max core file size"] == "0"
    assert found["Max cpu time"] == "300" and found["Max file size"] == str(64 << 20)
    assert found["Max processes"] == "0"


def test_closing_ends_a_decoding_under_way(large: Path, out: Path) -> None:
    sandbox = Sandbox()
    call = Call(sandbox, large, out)
    fork, zygote = fork_of(sandbox), zygote_of(sandbox)
    sandbox.close()
    assert isinstance(call.result(), RuntimeError)
    wait_for(lambda: not alive(fork) and not alive(zygote))
    with pytest.raises(RuntimeError, match="closed"):
        sandbox.decode(large, out)


def test_nothing_outlives_a_parent_that_is_killed(large: Path, out: Path) -> None:
    program = "import sys; from pathlib import Path; from indexer.sandbox import *; from indexer.decode import *\n"
    program += f"Sandbox().decode(Path({str(large)!r}), Path({str(out)!r}), Sampling(frames_per_segment=250, short_side=720))"
    parent = subprocess.Popen([sys.executable, "-c", program])
    wait_for(lambda: children(parent.pid))
    zygote = children(parent.pid)[0]
    wait_for(lambda: children(zygote))
    fork = children(zygote)[0]
    parent.kill()
    parent.wait()
    wait_for(lambda: not alive(fork) and not alive(zygote))


@pytest.mark.parametrize(("decoder", "there"), [("pyav", False), ("auto", True)])
def test_decord_is_loaded_only_where_it_is_asked_for(decoder: Decoder, there: bool, small: Path, out: Path) -> None:
    with Sandbox(decoder=decoder) as sandbox:
        video = sandbox.decode(small, out)
        maps = Path(f"/proc/{zygote_of(sandbox)}/maps").read_text()
    assert ("decord" in maps) == there == (video.facts.decoder == "decord")


def test_frames_beyond_the_bound_of_all_together_are_an_error_of_their_own(large: Path, out: Path) -> None:
    with Sandbox(Limits(output_bytes=1 << 20)) as sandbox:
        assert decode_fails(sandbox, large, out) == "frames_too_large"
    assert sum(file.stat().st_size for file in out.iterdir()) < 64 << 20, "it is ended while it writes"


def test_a_call_that_is_no_longer_wanted_ends_its_decoding_at_once(
    sandbox: Sandbox, large: Path, small: Path, out: Path, tmp_path: Path
) -> None:
    asked = 0

    def check() -> None:
        nonlocal asked
        asked += 1
        if asked == 2:
            forks.append(fork_of(sandbox))
            raise KeyError("unwanted")

    forks: list[int] = []
    with pytest.raises(KeyError, match="unwanted"):
        sandbox.decode(large, out, SLOW, check)
    assert not alive(forks[0])
    (tmp_path / "next").mkdir()
    assert sandbox.decode(small, tmp_path / "next").facts.frames == 50


EVIL = """
import os, sys, time
import indexer.sandbox_child as sandbox
from indexer.decode import DecodedSegment, DecodedVideo, MediaFacts

def decode(path, out, sampling, decoder):
    if "wordy" in str(path):
        (out / "000-00.jpg").write_bytes(b"")
        segment = DecodedSegment(0.0, 1.0, ("000-00.jpg",) * sampling.frames_per_segment, "000-00.jpg")
        return DecodedVideo(MediaFacts(1.0, 1, 1, 1.0, "", 1, "", "pyav"), (segment,) * sampling.max_segments)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            (out / "part").write_text(str(os.getpid()))
            (out / "part").rename(out / "daemon")
            time.sleep(600)
        os._exit(0)
    while not (out / "daemon").exists():
        time.sleep(0.01)
    if "lingers" in str(path):
        time.sleep(600)
    raise sandbox.DecodeError("no_frames", "evil")

sandbox.decode = decode
sandbox.serve("pyav")
"""


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """A sandbox over whose decoder somebody has got power: it leaves a process in a session of its own."""
    (tmp_path / "evil.py").write_text(EVIL)
    popen = subprocess.Popen
    monkeypatch.setattr(
        "indexer.sandbox.subprocess.Popen",
        lambda command, **options: popen([command[0], "-P", str(tmp_path / "evil.py")], **options),
    )
    with Sandbox() as sandbox:
        yield sandbox


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is exempt from RLIMIT_NPROC, which lets nobody else start a process")
@pytest.mark.parametrize("way", ["answers", "is closed", "is left"])
def test_no_process_is_left_of_a_decoding_not_even_in_a_session_of_its_own(
    evil: Sandbox, way: str, small: Path, out: Path
) -> None:
    def check() -> None:
        if way == "is left" and (out / "daemon").exists():
            raise KeyError

    path = out.parent / ("small.mp4" if way == "answers" else "lingers.mp4")
    path.write_bytes(small.read_bytes())
    call = Call(evil, path, out, Sampling(), check)
    wait_for((out / "daemon").exists)
    if way == "is closed":
        evil.close()
    assert isinstance(call.result(), Exception)
    assert not alive(int((out / "daemon").read_text()))


def test_an_answer_about_many_segments_is_not_taken_for_a_crash(evil: Sandbox, small: Path, out: Path) -> None:
    path = out.parent / "wordy.mp4"
    path.write_bytes(small.read_bytes())
    assert len(evil.decode(path, out, Sampling(max_segments=20_000)).segments) == 20_000


@pytest.mark.skipif(os.geteuid() == 0, reason="root is exempt from RLIMIT_NPROC")
def test_a_decoding_cannot_start_a_process(evil: Sandbox, small: Path, out: Path) -> None:
    with pytest.raises(OSError):
        evil.decode(small, out)


def test_a_picture_is_read_in_the_child_under_its_limits(tmp_path: Path) -> None:
    """The same picture as without a child; what is none is told; a child that dies, or has too little, harms nobody."""
    left = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    left.save(memory := BytesIO(), "PNG", exif=exif)
    with Sandbox() as sandbox:
        found = sandbox.picture(memory.getvalue(), tmp_path)
        assert found.size == (30, 50) and found.tobytes() == read_picture(memory.getvalue()).tobytes()
        with pytest.raises(InvalidImage, match="no picture in a format"):
            sandbox.picture(b"hello", tmp_path)
        assert sandbox._child is not None
        os.kill(sandbox._child.pid, signal.SIGKILL)
        assert sandbox.picture(memory.getvalue(), tmp_path).tobytes() == found.tobytes()
    Image.new("RGB", (4000, 4000)).save(large := BytesIO(), "PNG")
    with Sandbox(Limits(file_bytes=1 << 20)) as sandbox, pytest.raises(InvalidImage, match="failed"):
        sandbox.picture(large.getvalue(), tmp_path)
