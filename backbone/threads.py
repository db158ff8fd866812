"""OpenMP's threads: each thread that computes has helpers of its own, which wait busily for its next loop.

They do so for `GOMP_SPINCOUNT` rounds (set in `service`) while the process has no more of them in all than there are cores, and
next to not at all beyond that: a text's forward is 100 short loops, and waking a helper for each makes it twice as long. So the
forward's thread shall be the only one that has helpers.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

Result = TypeVar("Result")


def alone() -> None:
    """From here on the calling thread computes without helpers, whether torch, FAISS or BLAS does it."""
    torch.get_num_threads()  # sets the thread up as torch wants it, which would undo the rest
    threadpool_limits(1)


def apart(work: Callable[[], Result]) -> Result:
    """Runs `work` on a thread of its own, whose helpers end with it."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()
