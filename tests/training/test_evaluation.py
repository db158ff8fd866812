import numpy as np
import pytest

from training.evaluation import recall


def matrix(rows: list[list[float]]) -> np.ndarray:
    return np.asarray(rows, dtype=np.float32)


def test_ranks_count_from_one() -> None:
    found = recall(matrix([[0.9, 0.1, 0.5], [0.2, 0.1, 0.5], [0.3, 0.2, 0.1]]), [0, 1, 2])
    assert (found.median_rank, found.mean_rank) == (3.0, pytest.approx(7 / 3))
    assert found.r1 == pytest.approx(100 / 3)
    assert found.r5 == 100


def test_a_constant_model_has_the_recall_of_chance_not_a_perfect_one() -> None:
    found = recall(np.zeros((20, 20), np.float32), range(20))
    assert found.r1 == pytest.approx(5.0)
    assert found.r5 == pytest.approx(25.0)
    assert found.mean_rank == pytest.approx(10.5)


def test_ties_are_broken_in_expectation() -> None:
    found = recall(matrix([[0.5, 0.5, 0.9]]), [0])
    assert found.r1 == 0
    assert found.mean_rank == 2.5
    assert recall(matrix([[0.5, 0.5, 0.1]]), [0]).r1 == 50


def test_agrees_with_a_naive_count() -> None:
    rng = np.random.default_rng(0)
    similarity = rng.normal(size=(50, 40)).astype(np.float32)
    targets = rng.integers(0, 40, 50)
    naive = [1 + sum(s > row[t] for s in row) for row, t in zip(similarity, targets, strict=True)]
    found = recall(similarity, targets.tolist())
    assert found.r10 == pytest.approx(100 * np.mean([r <= 10 for r in naive]))
    assert found.median_rank == np.median(naive)
    assert found.mean_rank == pytest.approx(np.mean(naive))
