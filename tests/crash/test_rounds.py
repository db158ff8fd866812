"""A short run of `make crash`: a kill at each of the points that matter most, and of each kind of process."""

import subprocess
import sys
from pathlib import Path

import pytest

KINDS = (
    "after the file, before the row",
    "after the row, before the enqueue",
    "mid-snapshot",
    "mid-chunk",
    "just before the switch",
    "just after the switch",
    "worker in mid-training",
    "trainer",
    "decoder",
)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_what_was_promised_survives_kill_9(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).parent), "--rounds", str(len(KINDS)), "--data", str(tmp_path / "crash")]
    run = subprocess.run([*command, *(f"--only={kind}" for kind in KINDS)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
