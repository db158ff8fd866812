"""Text-to-video similarity over frame vectors: text-conditioned frame weights (`q_score`) and mean pooling."""

from __future__ import annotations

import torch
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


def mean_pool(texts: Tensor, frames: Tensor) -> Tensor:
    """Cosine of each text with each video's mean frame: texts (T, D), frames (V, F, D) → (T, V)."""
    videos = torch.nn.functional.normalize(frames.mean(dim=1), dim=-1)
    return torch.nn.functional.normalize(texts, dim=-1) @ videos.T
