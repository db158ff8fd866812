"""OpenMP's threads: each thread that computes has helpers of its own, which wait busily for its next loop.

They do so for `GOMP_SPINCOUNT` rounds (set in `service`) while the process has no more of them in all than there are cores, and
next to not at all beyond that: a text's forward is 100 short loops, and waking a helper for each makes it twice as long. So the
forward's thread shall be the only one that has helpers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
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


class Parts:
    """Runs work on rows in `count` parts, each on a thread without helpers; a single part on the calling thread.

    A forward of many frames is as fast so as with helpers, and faster where other processes take cores away: helpers wait for
    the slowest of them in each of hundreds of loops, parts do once.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool = ThreadPoolExecutor(count, "part", initializer=alone)  # starts its threads when they are needed

    def run(self, work: Callable[[slice], Result], rows: int) -> Sequence[Result]:
        """What `work` gives for each part of `rows` rows, in their order; no part is empty. Raises what `work` raises."""
        bounds = [rows * part // self._count for part in range(self._count + 1)]
        parts = [slice(first, end) for first, end in pairwise(bounds) if first < end]
        return [work(part) for part in parts] if self._count == 1 else list(self._pool.map(work, parts))
