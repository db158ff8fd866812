"""OpenMP's helpers, counted as threads of a process of its own."""

import os
import subprocess
import sys

import pytest

STORY = """
import os, threading, time
from concurrent.futures import ThreadPoolExecutor
import torch
from backbone import threads

torch.set_num_threads(2)

def helpers():
    return len(os.listdir("/proc/self/task")) - threading.active_count()

def helpers_after_a_large_sum():
    torch.ones(4_000_000).sum()
    return helpers()

before = helpers()
with ThreadPoolExecutor(1, initializer=threads.alone) as pool:
    print("alone", pool.submit(helpers_after_a_large_sum).result() - before)
print("apart", threads.apart(helpers_after_a_large_sum) - before)
deadline = time.monotonic() + 10
while helpers() > before and time.monotonic() < deadline:  # a thread that was joined has yet to leave the system's list
    time.sleep(0.01)
print("afterwards", helpers() - before)
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_helpers_end_with_their_thread_and_a_thread_alone_has_none() -> None:
    found = subprocess.run([sys.executable, "-c", STORY], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == ["alone 0", "apart 1", "afterwards 0"]
