"""OpenMP's helpers, counted as threads of a process of its own."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from backbone.threads import Parts

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


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 24])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_cover_all_rows_in_their_order(count: int, rows: int) -> None:
    values = list(range(rows))
    found = Parts(count).run(lambda part: values[part], rows)
    assert [value for part in found for value in part] == values
    assert all(found) and len(found) == min(count, rows)
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_parts_are_computed_without_helpers_and_one_part_where_it_is_asked_for() -> None:
    assert Parts(2).run(lambda part: torch.get_num_threads(), 2) == [1, 1]
    here = threading.get_ident()
    assert Parts(1).run(lambda part: threading.get_ident(), 2) == [here]
    assert here not in Parts(2).run(lambda part: threading.get_ident(), 2)


def test_a_part_that_fails_fails_the_rows_and_the_next_ones_are_computed() -> None:
    def halves(part: slice) -> int:
        if part.start:
            raise ValueError("the second half")
        return int(part.stop)

    parts = Parts(2)
    with pytest.raises(ValueError, match="the second half"):
        parts.run(halves, 4)
    assert parts.run(lambda part: part.stop, 4) == [2, 4]
