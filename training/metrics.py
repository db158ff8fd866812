"""Recall at 1, 5 and 10, median and mean rank with ties counted fairly, and how sure they are.

An interval tells of the sampling of queries alone, not of the seed that an adapter was trained with.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (2.5, 97.5)
METRICS = ("R@1", "R@5", "R@10", "MdR", "MnR")


@dataclass(frozen=True, slots=True)
class Recall:
    """Recall in per cent; ranks count from 1."""

    r1: float
    r5: float
    r10: float
    median_rank: float
    mean_rank: float
    queries: int
    gallery: int

    def to_json(self) -> dict[str, Any]:
        return {
            "R@1": round(self.r1, 2),
            "R@5": round(self.r5, 2),
            "R@10": round(self.r10, 2),
            "MdR": self.median_rank,
            "MnR": round(self.mean_rank, 2),
            "queries": self.queries,
            "gallery": self.gallery,
        }


@dataclass(frozen=True, slots=True)
class Gain:
    """By how much the second of two systems is better, with its 95 % interval."""

    mean: float
    low: float
    high: float


def ranks(similarity: NDArray[np.float32], targets: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(number of better candidates, number of equal ones) for each query: similarity (Q, G), target column of each row.

    NaN counts as the lowest score, so that a model that diverged has the recall of chance.
    """
    if np.isnan(similarity).any():
        similarity = np.where(np.isnan(similarity), np.float32(-np.inf), similarity)
    own = similarity[np.arange(len(targets)), np.asarray(targets)][:, None]
    better = (similarity > own).sum(axis=1)
    equal = (similarity == own).sum(axis=1) - 1
    return better.astype(np.int64), equal.astype(np.int64)


def expected_ranks(similarity: NDArray[np.float32], targets: Sequence[int]) -> NDArray[np.float64]:
    """(Q,) ranks from 1; a query tied with e others stands, in expectation, in the middle of them."""
    better, equal = ranks(similarity, targets)
    return better + equal / 2 + 1


def recall(similarity: NDArray[np.float32], targets: Sequence[int]) -> Recall:
    """Metrics of a similarity matrix (Q, G). A query tied with e others stands, in expectation, in the middle of them."""
    better, equal = ranks(similarity, targets)
    expected = better + equal / 2 + 1
    r1, r5, r10 = (float(100 * _hits(better, equal, k).mean()) for k in (1, 5, 10))
    return Recall(r1, r5, r10, float(np.median(expected)), float(expected.mean()), len(targets), similarity.shape[1])


def intervals(
    similarity: NDArray[np.float32],
    targets: Sequence[int],
    groups: Sequence[Hashable] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95 % percentile bootstrap intervals of the metrics of `recall` over its queries, by the names of `Recall.to_json`.

    A cluster bootstrap: what is drawn with replacement is the video (`groups`, one label for each query; default: its
    target) with all of its captions, since the captions of one video succeed and fail together, and drawing them one by
    one would give intervals that are too narrow (Field and Welsh 2007, "Bootstrapping clustered data"). The gallery stays
    whole. With one caption a video this is the plain bootstrap. The same seed gives the same intervals.
    """
    better, equal = ranks(similarity, targets)
    expected = better + equal / 2 + 1
    owner, count = _clusters(targets if groups is None else groups)
    values = [*(100 * _hits(better, equal, k) for k in (1, 5, 10)), expected, np.ones(len(expected))]
    table = np.stack([np.bincount(owner, column, count) for column in values], axis=1)  # (groups, 5): sums in each group
    order = np.argsort(expected)
    ordered, owner_of_ordered = expected[order], owner[order]
    means, medians = [], []
    for weights in _resamples(count, resamples, seed):  # (r, groups): times that each was drawn
        sums = weights @ table
        means.append(sums[:, :4] / sums[:, 4:])
        below = np.cumsum(weights[:, owner_of_ordered], axis=1)  # (r, Q)
        for row in below:
            middle = np.searchsorted(row, [(row[-1] - 1) // 2, row[-1] // 2], side="right")
            medians.append(ordered[middle].mean())
    r1, r5, r10, mean = np.concatenate(means).T
    drawn = dict(zip(METRICS, (r1, r5, r10, np.asarray(medians), mean), strict=True))
    return {name: _bounds(of) for name, of in drawn.items()}


def gain(
    before: NDArray[np.float32],
    after: NDArray[np.float32],
    targets: Sequence[int],
    groups: Sequence[Hashable] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Gain:
    """Paired bootstrap of R@1, in points, of two systems on the same queries: before and after (Q, V), clusters as in
    `intervals`. Raises ValueError where the two did not answer the same queries.
    """
    if before.shape != after.shape:
        raise ValueError(f"the systems were measured on other data: {before.shape} and {after.shape} similarities")
    first, second = (100 * hits_at_1(similarity, targets) for similarity in (before, after))
    return paired_gain(second - first, targets if groups is None else groups, resamples, seed)


def hits_at_1(similarity: NDArray[np.float32], targets: Sequence[int]) -> NDArray[np.float64]:
    """(Q,) probability that each query of similarity (Q, V) finds its target first, when ties fall at random."""
    return _hits(*ranks(similarity, targets), 1)


def log_ranks(similarity: NDArray[np.float32], targets: Sequence[int]) -> NDArray[np.float64]:
    """(Q,) natural logarithm of each query's expected rank: 0 is the first. Smoother than R@1 where queries are few."""
    return np.log(expected_ranks(similarity, targets))


def paired_gain(
    gains: Sequence[float] | NDArray[np.float64], groups: Sequence[Hashable], resamples: int = 1000, seed: int = 0
) -> Gain:
    """The mean of the queries' gains (Q,) with its paired bootstrap interval, clusters as in `intervals`.

    Each resample takes both systems' answers to the same queries, so what makes a query hard for both cancels out. The gain
    is significant (two-sided, 5 %) where `low > 0`.
    """
    difference = np.asarray(gains)
    owner, count = _clusters(groups)
    table = np.stack([np.bincount(owner, difference, count), np.bincount(owner, minlength=count)], axis=1)  # (groups, 2)
    sums = np.concatenate([weights @ table for weights in _resamples(count, resamples, seed)])
    return Gain(round(float(difference.mean()), 2), *_bounds(sums[:, 0] / sums[:, 1]))


def qb_norm(similarity: NDArray[np.float32], bank: NDArray[np.float32], beta: float = 20.0, k: int = 1) -> NDArray[np.float32]:
    """Query-bank normalisation by the dynamic inverted softmax (Bogolin et al. 2022, section 3.3): (Q, V) float32.

    similarity (Q, V) of the queries, bank (B, V) of other queries, such as training captions, with the same gallery. Where
    a query's first item is among the first `k` of any bank query (the activation set: items that may be hubs), its row
    becomes log(exp(β·s) / Σ_b exp(β·s_b)) / β, the sum over the bank. The logarithm orders a row as the quotient does and
    neither overflows nor rounds to ties, whatever β. Other rows stay as they are. The two kinds of row have other scales,
    which is fine as long as only items within a row are compared: ranks are. β = 20 is the paper's, for cosines.
    Raises ValueError for an empty bank or another gallery.
    """
    if bank.ndim != 2 or not len(bank) or bank.shape[1] != similarity.shape[1]:
        raise ValueError(f"a bank for a gallery of {similarity.shape[1]} cannot have the shape {bank.shape}")
    k = min(k, bank.shape[1])
    hubs = np.zeros(bank.shape[1], bool)
    hubs[np.argpartition(-bank, k - 1, axis=1)[:, :k]] = True
    peak = bank.max(axis=0)  # (V,)
    mass = peak + np.log(np.exp(beta * (bank - peak)).sum(axis=0, dtype=np.float64)) / beta  # (V,): log Σ_b exp(β·s_b) / β
    active = hubs[similarity.argmax(axis=1)]  # (Q,)
    return np.where(active[:, None], similarity - mass, similarity).astype(np.float32)


def _hits(better: NDArray[np.int64], equal: NDArray[np.int64], k: int) -> NDArray[np.float64]:
    """(Q,) probability that each query's own item is among the first k when ties fall at random."""
    return np.clip((k - better) / (equal + 1), 0.0, 1.0)


def _clusters(groups: Sequence[Hashable]) -> tuple[NDArray[np.int64], int]:
    """(group number of each query, number of groups)."""
    numbers: dict[Hashable, int] = {}
    owner = np.asarray([numbers.setdefault(group, len(numbers)) for group in groups], np.int64)
    return owner, len(numbers)


def _resamples(count: int, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Chunks (r, count) of how often each of `count` groups is drawn, `resamples` rows in all."""
    rng = np.random.default_rng(seed)
    chunk = max(1, 2**21 // count)
    for done in range(0, resamples, chunk):
        rows = min(chunk, resamples - done)
        drawn = rng.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)


def _bounds(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(values, PERCENTILES)
    return round(float(low), 2), round(float(high), 2)
