"""Text-to-video similarity over frame vectors: text-conditioned frame weights (`q_score`) and mean pooling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TEMPERATURE = 5.0


def q_score(texts: Tensor, frames: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Cosine of each text with each video's text-conditioned mean: texts (T, D), frames (V, F, D) → (T, V).

    Semantics (Jiang et al. 2022, released code): w = softmax over f of ⟨t, v_f⟩ / temperature; cosine(t, Σ_f w_f · v_f).
    All vectors unnormalised. The norm of the weighted sum comes from each video's Gram matrix, so nothing of size
    T · V · D is made.
    """
    dots = torch.einsum("td,vfd->tvf", texts, frames)
    weights = torch.softmax(dots / temperature, dim=-1)  # (T, V, F)
    gram = frames @ frames.transpose(1, 2)  # (V, F, F)
    squared = torch.einsum("tvf,vfg,tvg->tv", weights, gram, weights)
    norms = texts.norm(dim=-1, keepdim=True) * squared.clamp_min(1e-12).sqrt()  # (T, V)
    scores: Tensor = (weights * dots).sum(-1) / norms.clamp_min(1e-12)
    return scores


def rescore(query: NDArray[np.float32], frames: Sequence[bytes], temperature: float = TEMPERATURE) -> NDArray[np.float32]:
    """`rescore_all` of one text (D,): (len(frames),)."""
    scores: NDArray[np.float32] = rescore_all(query[None], frames, temperature)[0]
    return scores


def rescore_all(queries: NDArray[np.float32], frames: Sequence[bytes], temperature: float = TEMPERATURE) -> NDArray[np.float32]:
    """`q_score` of each text (T, D) with each segment's stored frame vectors: (T, len(frames)).

    The frames of a segment are (F, D) float16; F may differ from segment to segment. They are converted once for all texts.
    """
    scores, texts = torch.empty(len(queries), len(frames)), torch.tensor(queries)
    by_length: dict[int, list[int]] = {}
    for i, raw in enumerate(frames):
        by_length.setdefault(len(raw), []).append(i)
    with torch.inference_mode():
        for rows in by_length.values():
            stored = torch.frombuffer(bytearray().join([frames[i] for i in rows]), dtype=torch.float16)
            vectors = stored.view(len(rows), -1, texts.shape[1]).float()  # (n, F, D); numpy takes 15 times as long for this
            for of, text in zip(scores, texts, strict=True):
                weights = torch.softmax(vectors @ text / temperature, dim=1)  # (n, F)
                pooled = torch.bmm(weights[:, None], vectors)[:, 0]  # (n, D)
                of[rows] = pooled @ text / (pooled.norm(dim=1) * text.norm()).clamp_min(1e-12)
    return scores.numpy()


def mean_pool(texts: Tensor, frames: Tensor) -> Tensor:
    """Cosine of each text with each video's mean frame: texts (T, D), frames (V, F, D) → (T, V)."""
    videos = torch.nn.functional.normalize(frames.mean(dim=1), dim=-1)
    return torch.nn.functional.normalize(texts, dim=-1) @ videos.T
