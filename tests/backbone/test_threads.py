"""OpenMP's helpers, counted as threads of the process."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from backbone import threads


def helpers() -> int:
    return len(os.listdir("/proc/self/task")) - threading.active_count()


def helpers_after_a_large_sum() -> int:
    torch.ones(4_000_000).sum()
    return helpers()


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_helpers_end_with_their_thread_and_a_thread_alone_has_none() -> None:
    before = helpers()
    with ThreadPoolExecutor(1, initializer=threads.alone) as pool:
        assert pool.submit(helpers_after_a_large_sum).result() == before
    assert threads.apart(helpers_after_a_large_sum) > before, "or this test could not fail"
    assert helpers() == before
