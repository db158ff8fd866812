"""Retrieval metrics: recall at 1, 5 and 10, median and mean rank, with ties counted fairly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backbone import Adapter, Backbone, q_score
from training.dataset import Pair

BATCH_FRAMES = 96
BATCH_TEXTS = 64


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


def ranks(similarity: NDArray[np.float32], targets: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(number of better candidates, number of equal ones) for each query: similarity (Q, G), target column of each row."""
    own = similarity[np.arange(len(targets)), np.asarray(targets)][:, None]
    better = (similarity > own).sum(axis=1)
    equal = (similarity == own).sum(axis=1) - 1
    return better.astype(np.int64), equal.astype(np.int64)


def recall(similarity: NDArray[np.float32], targets: Sequence[int]) -> Recall:
    """Metrics of a similarity matrix (Q, G). A query tied with e others stands, in expectation, in the middle of them."""
    better, equal = ranks(similarity, targets)
    expected = better + equal / 2 + 1

    def at(k: int) -> float:
        return float(100 * np.clip((k - better) / (equal + 1), 0.0, 1.0).mean())

    return Recall(
        at(1), at(5), at(10), float(np.median(expected)), float(expected.mean()), len(targets), similarity.shape[1]
    )


def evaluate(
    backbone: Backbone,
    adapter: Adapter | None,
    pixels: NDArray[np.uint8],
    pairs: Sequence[Pair],
    temperature: float,
) -> tuple[Recall, Recall]:
    """(text→video, video→text) of `pairs` among their own clips: every caption is a query, a clip's best caption counts.

    pixels (clips, F, 3, size, size) uint8.
    """
    clips = sorted({pair.clip for pair in pairs})
    column = {clip: i for i, clip in enumerate(clips)}
    targets = [column[pair.clip] for pair in pairs]
    with torch.inference_mode():
        frames = encode_clips(backbone, adapter, pixels, clips)  # (V, F, D)
        texts = encode_texts(backbone, adapter, [pair.text for pair in pairs])  # (T, D)
        similarity = torch.cat([q_score(part, frames, temperature) for part in texts.split(256)]).cpu().numpy()
    owners = np.asarray(targets)
    best = np.stack([similarity[owners == i].max(axis=0) for i in range(len(clips))], axis=1)  # (V, V): column = caption's clip
    return recall(similarity, targets), recall(best, range(len(clips)))


def encode_clips(
    backbone: Backbone, adapter: Adapter | None, pixels: NDArray[np.uint8], clips: Sequence[int]
) -> Tensor:
    """Frame vectors of clips: (len(clips), F, D)."""
    step = max(1, BATCH_FRAMES // pixels.shape[1])
    parts = []
    for i in range(0, len(clips), step):
        chunk = torch.from_numpy(pixels[list(clips[i : i + step])])  # (V, F, 3, S, S)
        parts.append(backbone.encode_frames(chunk.flatten(0, 1), adapter).unflatten(0, chunk.shape[:2]))
    return torch.cat(parts)


def encode_texts(backbone: Backbone, adapter: Adapter | None, texts: Sequence[str]) -> Tensor:
    """Text vectors: (len(texts), D)."""
    parts = [texts[i : i + BATCH_TEXTS] for i in range(0, len(texts), BATCH_TEXTS)]
    return torch.cat([backbone.encode_text(backbone.tokenize(part).ids, adapter) for part in parts])
