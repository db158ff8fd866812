import math
import time
from collections.abc import Sequence

import numpy as np
import pytest
from torch import Tensor

from backbone import Backbone, load_backbone, mean_pool, q_score
from training import evaluation
from training.dataset import Pair
from training.evaluation import (
    BATCH_FRAMES,
    Evaluation,
    encode_clips,
    encode_texts,
    evaluate,
)
from training.metrics import gain, intervals, qb_norm, recall


def matrix(rows: list[list[float]]) -> np.ndarray:
    return np.asarray(rows, dtype=np.float32)


def test_ranks_count_from_one() -> None:
    found = recall(matrix([[0.9, 0.1, 0.5], [0.2, 0.1, 0.5], [0.3, 0.2, 0.1]]), [0, 1, 2])
    assert found.median_rank == 3.0 and found.mean_rank == pytest.approx(7 / 3)
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


def test_a_model_of_nothing_but_nan_has_the_recall_of_chance() -> None:
    assert recall(np.full((20, 20), np.nan, np.float32), range(20)).r1 == pytest.approx(5.0)
    assert recall(matrix([[np.nan, 0.1, 0.2]]), [0]).mean_rank == 3


def noisy(queries: int, gallery: int, signal: float, seed: int = 0) -> tuple[np.ndarray, list[int]]:
    """Random similarities in which the right answer is raised by `signal` standard deviations."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, gallery, queries)
    similarity = rng.normal(size=(queries, gallery)).astype(np.float32)
    similarity[np.arange(queries), targets] += signal
    return similarity, targets.tolist()


@pytest.mark.parametrize("signal", [0.0, 2.0, 9.0])
def test_intervals_hold_the_estimate(signal: float) -> None:
    similarity, targets = noisy(200, 50, signal)
    found, bounds = recall(similarity, targets).to_json(), intervals(similarity, targets)
    assert set(bounds) == set(found) - {"queries", "gallery"}
    for name, (low, high) in bounds.items():
        assert low <= found[name] <= high, name


def test_intervals_shrink_with_more_queries() -> None:
    def width(queries: int) -> float:
        low, high = intervals(*noisy(queries, 50, 2.0), range(queries))["R@1"]
        return high - low

    assert width(1600) == pytest.approx(width(100) / 4, rel=0.35)


def test_intervals_agree_with_a_naive_bootstrap_over_videos() -> None:
    similarity, _ = noisy(90, 30, 0.0)
    targets = [i // 3 for i in range(90)]
    similarity[np.arange(90), targets] += 2
    similarity[::7, 4] = similarity[np.arange(90), targets][::7]  # ties
    rng = np.random.default_rng(5)
    drawn = []
    for _ in range(3000):
        rows = np.concatenate([np.arange(3 * video, 3 * video + 3) for video in rng.integers(0, 30, 30)])
        drawn.append(recall(similarity[rows], [targets[row] for row in rows]))
    bounds = intervals(similarity, targets, resamples=3000)
    for name, field in {"R@1": "r1", "R@5": "r5", "R@10": "r10", "MdR": "median_rank", "MnR": "mean_rank"}.items():
        naive = np.percentile([getattr(found, field) for found in drawn], [2.5, 97.5])
        assert bounds[name] == pytest.approx(naive, abs=1.2 if name.startswith("R@") else 0.3), name


def test_repeated_captions_of_a_video_do_not_make_the_result_surer() -> None:
    similarity, targets = noisy(100, 100, 2.5)
    targets = list(range(100))
    similarity[np.arange(100), targets] += 2
    once = intervals(similarity, targets)
    repeated = similarity.repeat(5, axis=0), [target for target in targets for _ in range(5)]
    assert intervals(*repeated) == once
    low, high = intervals(*repeated, groups=range(500))["R@1"]
    assert high - low < 0.6 * (once["R@1"][1] - once["R@1"][0]), "query by query, copies count as evidence"


def test_equal_seeds_give_equal_intervals() -> None:
    similarity, targets = noisy(60, 20, 1.0)
    assert intervals(similarity, targets, seed=3) == intervals(similarity, targets, seed=3)
    assert intervals(similarity, targets, seed=3) != intervals(similarity, targets, seed=4)


def test_twenty_thousand_queries_take_seconds() -> None:
    similarity, targets = noisy(20_000, 50, 2.0)
    started = time.process_time()
    intervals(similarity, targets, range(20_000))
    assert time.process_time() - started < 20


def test_a_clear_gain_excludes_zero_and_no_gain_includes_it() -> None:
    before, targets = noisy(300, 60, 1.5)
    better = before.copy()
    better[np.arange(300), targets] += 1
    clear = gain(before, better, targets)
    assert 0 < clear.low < clear.mean < clear.high
    assert clear.mean == pytest.approx(recall(better, targets).r1 - recall(before, targets).r1, abs=0.01)
    other = noisy(300, 60, 0.0, seed=1)[0]
    other[np.arange(300), targets] += 1.5
    assert gain(before, other, targets).low < 0 < gain(before, other, targets).high
    same = gain(before, before, targets)
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_a_gain_is_surer_than_the_two_intervals_apart() -> None:
    before, targets = noisy(300, 60, 1.5)
    after = before.copy()
    after[np.arange(300), targets] += 0.2
    assert intervals(before, targets)["R@1"][1] > intervals(after, targets)["R@1"][0], "they overlap"
    assert gain(before, after, targets).low > 0


def test_a_gain_needs_the_same_queries() -> None:
    with pytest.raises(ValueError, match="other data"):
        gain(np.zeros((3, 4), np.float32), np.zeros((2, 4), np.float32), [0, 1])


@pytest.mark.parametrize("k", [1, 3, 99])
def test_a_query_bank_agrees_with_a_naive_loop(k: int) -> None:
    rng = np.random.default_rng(0)
    similarity, bank = rng.uniform(-1, 1, (40, 12)).astype(np.float32), rng.uniform(-1, 1, (4, 12)).astype(np.float32)
    found = qb_norm(similarity, bank, 20, k)
    active = {item for row in bank for item in np.argsort(-row)[:k]}
    changed = 0
    for row, result in zip(similarity, found, strict=True):
        if int(np.argmax(row)) in active:
            inverted = [math.exp(20 * s) / sum(math.exp(20 * b) for b in column) for s, column in zip(row, bank.T, strict=True)]
            assert result == pytest.approx(np.log(inverted) / 20, abs=1e-5)
            changed += 1
        else:
            assert (result == row).all()
    assert 0 < changed < 40 or k == 99


def test_a_query_bank_neither_overflows_nor_makes_ties() -> None:
    rng = np.random.default_rng(0)
    similarity, bank = rng.normal(size=(9, 30)).astype(np.float32), rng.normal(size=(50, 30)).astype(np.float32)
    found = qb_norm(100 * similarity, 100 * bank, beta=100, k=30)
    assert np.isfinite(found).all()
    assert all(len(set(row)) == 30 for row in found.tolist())


def test_a_query_bank_takes_hubs_off_the_first_place() -> None:
    similarity, targets = noisy(400, 100, 2.0)
    bank, _ = noisy(500, 100, 2.0, seed=1)
    hubs = np.zeros(100, np.float32)
    hubs[:3] = 4.0
    similarity, bank = np.float32(0.1) * (similarity + hubs), np.float32(0.1) * (bank + hubs)
    plain = Evaluation.of(similarity, targets)
    normalised = plain.with_query_bank(bank)
    assert normalised.text_to_video.r1 > plain.text_to_video.r1 + 10
    assert normalised.video_to_text == plain.video_to_text
    assert (normalised.to_json()["bank_queries"], "bank_queries" in plain.to_json()) == (500, False)


@pytest.mark.parametrize("shape", [(0, 5), (3, 4)])
def test_a_bank_must_fit_the_gallery(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="gallery of 5"):
        qb_norm(np.zeros((2, 5), np.float32), np.zeros(shape, np.float32))


def test_a_video_is_found_by_its_best_caption() -> None:
    found = Evaluation.of(matrix([[0.9, 0.3], [0.1, 0.8], [0.2, 0.4]]), [0, 0, 1])
    assert found.video_similarity.tolist() == matrix([[0.9, 0.2], [0.8, 0.4]]).tolist()
    assert (found.video_to_text.r1, found.video_to_text.queries) == (50, 2)
    assert found.text_to_video.r1 == pytest.approx(200 / 3)


def test_a_clip_without_captions_only_distracts() -> None:
    found = Evaluation.of(matrix([[0.1, 0.9, 0.5], [0.1, 0.2, 0.3]]), [2, 0])
    assert (found.text_to_video.gallery, found.text_to_video.r1) == (3, 0)
    assert found.video_similarity.tolist() == matrix([[0.1, 0.1], [0.3, 0.5]]).tolist()


def test_intervals_of_clips_resample_their_videos() -> None:
    similarity, _ = noisy(80, 80, 1.0)
    clips = list(range(80))
    apart = Evaluation.of(similarity, clips)
    together = Evaluation.of(similarity.repeat(2, axis=0).repeat(2, axis=1), range(160), [i // 2 for i in range(160)])
    for direction in ("text_to_video", "video_to_text"):
        bounds = together.to_json(intervals=True)[direction]["intervals"]["MnR"]
        reference = apart.to_json(intervals=True)[direction]["intervals"]["MnR"]
        assert bounds == pytest.approx([2 * bound - 0.5 for bound in reference], abs=0.02)
    assert "intervals" not in together.to_json()["text_to_video"]


class Recorded:
    """Clips of one colour each; notes how many were asked for at a time."""

    frames = 12

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def pixels(self, rows: Sequence[int], picks: np.ndarray | None = None) -> np.ndarray:
        self.asked.append(list(rows))
        colour = np.asarray(rows, np.uint8)[:, None, None, None, None] * 5
        return np.broadcast_to(colour, (len(rows), 12, 3, 64, 64)).copy()


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("builtin")


def test_a_gallery_is_read_and_scored_batch_by_batch(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "SCORE_TEXTS", 7)
    monkeypatch.setattr(evaluation, "SCORE_FRAMES", 36)
    blocks: list[tuple[int, int]] = []

    def score(texts: Tensor, frames: Tensor, temperature: float) -> Tensor:
        blocks.append((len(texts), len(frames)))
        return q_score(texts, frames, temperature)

    monkeypatch.setattr(evaluation, "q_score", score)
    clips = Recorded()
    backwards = range(30, 20, -1)
    pairs = [Pair(clip, f"caption {i} of a night in {clip}", f"video-{clip // 2}") for clip in backwards for i in (1, 2)]
    found = evaluate(backbone, None, clips, pairs, 5.0)
    assert max(len(rows) for rows in clips.asked) * 12 <= BATCH_FRAMES < 10 * 12
    assert [row for rows in clips.asked for row in rows] == list(range(21, 31))
    assert blocks == [(texts, videos) for texts in (7, 7, 6) for videos in (3, 3, 3, 1)]
    assert found.similarity.shape == (20, 10)
    assert found.targets[:4] == (9, 9, 8, 8)
    assert found.groups[:2] == ("video-15", "video-15")
    frames = encode_clips(backbone, None, Recorded(), range(21, 31))
    texts = encode_texts(backbone, None, [pair.text for pair in pairs])
    assert found.similarity == pytest.approx(q_score(texts, frames, 5.0).numpy(), abs=1e-5)
    mean = evaluate(backbone, None, Recorded(), pairs, 5.0, pooling="mean")
    assert mean.similarity == pytest.approx(mean_pool(texts, frames).numpy(), abs=1e-5)


def test_words_cut_the_captions(backbone: Backbone) -> None:
    pairs = [Pair(0, "a red lorry", "a"), Pair(1, "a red house on a hill", "b")]
    whole, cut = (evaluate(backbone, None, Recorded(), pairs, 5.0, words=words).similarity for words in (None, 4))
    assert cut[0] == pytest.approx(cut[1]), "four tokens: start, two words, end"
    assert whole[0] != pytest.approx(whole[1])


def test_there_is_nothing_to_evaluate_without_captions(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="no caption"):
        evaluate(backbone, None, Recorded(), [], 5.0)
