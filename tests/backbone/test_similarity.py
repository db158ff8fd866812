import math

import numpy as np
import pytest
import torch

from backbone import mean_pool, q_score, rescore, rescore_all


def test_q_score_is_the_released_code_s_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(4, 16, generator=generator)
    frames = 2 * torch.randn(3, 5, 16, generator=generator)
    scores = q_score(texts, frames)
    for t in range(4):
        for v in range(3):
            dots = [float(texts[t] @ frames[v, f]) / 5 for f in range(5)]
            total = sum(math.exp(d) for d in dots)
            video = sum((math.exp(d) / total * frames[v, f] for f, d in enumerate(dots)), torch.zeros(16))
            torch.testing.assert_close(scores[t, v], torch.cosine_similarity(texts[t], video, dim=0), atol=1e-5, rtol=1e-5)


def test_equal_frames_make_q_score_the_mean_pool() -> None:
    generator = torch.Generator().manual_seed(1)
    texts, frame = torch.randn(2, 8, generator=generator), torch.randn(3, 1, 8, generator=generator)
    frames = frame.expand(3, 4, 8)
    torch.testing.assert_close(q_score(texts, frames), mean_pool(texts, frames), atol=1e-5, rtol=1e-5)


def test_q_score_has_finite_gradients_at_zero() -> None:
    texts = torch.zeros(1, 8, requires_grad=True)
    frames = torch.zeros(1, 2, 8, requires_grad=True)
    q_score(texts, frames).sum().backward()
    assert texts.grad is not None and torch.isfinite(texts.grad).all()
    assert frames.grad is not None and torch.isfinite(frames.grad).all()


def test_rescoring_is_q_score_over_stored_frames() -> None:
    rng = np.random.default_rng(0)
    query = rng.normal(size=16).astype(np.float32)
    frames = [3 * rng.normal(size=(count, 16)).astype(np.float16) for count in (12, 12, 1, 5)]
    expected = [float(q_score(torch.from_numpy(query)[None], torch.from_numpy(f.astype(np.float32))[None])) for f in frames]
    np.testing.assert_allclose(rescore(query, [f.tobytes() for f in frames]), expected, atol=1e-5)
    assert rescore(query, []).shape == (0,)


def test_the_stored_frames_are_converted_once_for_all_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    texts = rng.normal(size=(7, 16)).astype(np.float32)
    frames = [rng.normal(size=(4, 16)).astype(np.float16).tobytes() for _ in range(5)]
    one_by_one = np.stack([rescore(text, frames) for text in texts])
    conversions, really = [], torch.frombuffer
    monkeypatch.setattr(torch, "frombuffer", lambda *a, **k: conversions.append(1) or really(*a, **k))  # type: ignore[func-returns-value]
    np.testing.assert_array_equal(rescore_all(texts, frames), one_by_one)
    assert len(conversions) == 1
