"""Captions asked of their own clips: everything encoded, scored batch by batch, and measured by `training.metrics`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backbone import Adapter, Backbone, mean_pool, q_score
from training.dataset import Clips, Pair
from training.metrics import Recall, intervals, qb_norm, recall
from training.recipe import Pooling

BATCH_FRAMES = 96
BATCH_TEXTS = 64
SCORE_TEXTS, SCORE_FRAMES = 1024, 16_384  # of one call of q_score, which takes some multiples of their product in floats


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Both directions of retrieval among one gallery, with the scores that they come from.

    `similarity` (Q, V) float32: captions by gallery; `targets` the column of each caption; `groups` the video of each
    caption, what the bootstrap resamples. `video_similarity` (W, W) float32: the W clips that have captions, as queries, by
    the best caption of each. `bank` (B, V): the scores of other texts. `bank_queries`: 0, or the size of the bank that
    normalised `similarity`.
    """

    text_to_video: Recall
    video_to_text: Recall
    similarity: NDArray[np.float32]
    targets: tuple[int, ...]
    groups: tuple[Hashable, ...]
    video_similarity: NDArray[np.float32]
    bank: NDArray[np.float32] | None = None
    bank_queries: int = 0

    @classmethod
    def of(
        cls, similarity: NDArray[np.float32], targets: Sequence[int], groups: Sequence[Hashable] | None = None
    ) -> Evaluation:
        """From a matrix (Q, V) and the target column of each row. Video → text: a clip's best caption counts, clips without
        a caption are only distractors of the other direction. Raises ValueError without a query.
        """
        if not len(targets):
            raise ValueError("there is no caption to evaluate with")
        owners = np.asarray(targets)
        order = np.argsort(owners, kind="stable")
        owned, starts = np.unique(owners[order], return_index=True)
        best = np.maximum.reduceat(similarity[order], starts, axis=0)[:, owned].T  # (W, W): column = caption's clip
        return cls(
            recall(similarity, targets),
            recall(best, range(len(owned))),
            similarity,
            tuple(owners.tolist()),
            tuple(targets if groups is None else groups),
            np.ascontiguousarray(best),
        )

    def with_query_bank(self, bank: NDArray[np.float32] | None = None, beta: float = 20.0, k: int = 1) -> Evaluation:
        """The same captions with their scores normalised by a bank of other captions: bank (B, V) or its own, see `qb_norm`.

        Video → text stays as it is: its hubs are captions, of which a bank of captions knows nothing.
        """
        bank = self.bank if bank is None else bank
        if bank is None:
            raise ValueError("there is no query bank")
        similarity = qb_norm(self.similarity, bank, beta, k)
        return replace(self, similarity=similarity, text_to_video=recall(similarity, self.targets), bank_queries=len(bank))

    @property
    def video_groups(self) -> tuple[Hashable, ...]:
        """(W,) the video of each row of `video_similarity`."""
        videos = dict(zip(self.targets, self.groups, strict=True))
        return tuple(videos[target] for target in sorted(videos))

    def intervals(self) -> tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]]]:
        """95 % intervals of text → video and of video → text, resampled by video."""
        videos = self.video_groups
        return (
            intervals(self.similarity, self.targets, self.groups),
            intervals(self.video_similarity, range(len(videos)), videos),
        )

    def to_json(self, intervals: bool = False) -> dict[str, Any]:
        """Metrics of both directions, each with `intervals: {metric: [low, high]}` where asked for."""
        directions = {"text_to_video": self.text_to_video.to_json(), "video_to_text": self.video_to_text.to_json()}
        if intervals:
            for direction, found in zip(directions.values(), self.intervals(), strict=True):
                direction["intervals"] = {name: list(bounds) for name, bounds in found.items()}
        return directions | ({"bank_queries": self.bank_queries} if self.bank_queries else {})


def evaluate(
    backbone: Backbone,
    adapter: Adapter | None,
    clips: Clips,
    pairs: Sequence[Pair],
    temperature: float,
    *,
    words: int | None = None,
    pooling: Pooling = "q_score",
    bank: Sequence[str] = (),
) -> Evaluation:
    """Retrieval of `pairs` among their own clips, whose rows in ascending order are the gallery's columns.

    Every caption is a query; a clip's best caption counts. Intervals resample by `Pair.video`. `words`: tokens that a text is
    cut to, start and end included. `bank`: other texts, scored with the same gallery. Pixels are read batch by batch. Raises
    ValueError without pairs.
    """
    if not pairs:
        raise ValueError("there is no caption to evaluate with")
    gallery = sorted({pair.clip for pair in pairs})
    column = {clip: i for i, clip in enumerate(gallery)}
    with torch.inference_mode():
        frames = encode_clips(backbone, adapter, clips, gallery)  # (V, F, D)
        queries, others = (
            _similarities(encode_texts(backbone, adapter, texts, words), frames, temperature, pooling) if texts else None
            for texts in ([pair.text for pair in pairs], list(bank))
        )
    assert queries is not None
    found = Evaluation.of(queries, [column[pair.clip] for pair in pairs], [pair.video for pair in pairs])
    return replace(found, bank=others)


def _similarities(texts: Tensor, frames: Tensor, temperature: float, pooling: Pooling) -> NDArray[np.float32]:
    """texts (Q, D), frames (V, F, D) → (Q, V), block by block: q_score takes rows · columns · F floats."""
    similarity = np.empty((len(texts), len(frames)), np.float32)
    rows, columns = SCORE_TEXTS, max(1, SCORE_FRAMES // frames.shape[1])
    for i in range(0, len(texts), rows):
        for j in range(0, len(frames), columns):
            text, video = texts[i : i + rows], frames[j : j + columns]
            scores = mean_pool(text, video) if pooling == "mean" else q_score(text, video, temperature)
            similarity[i : i + rows, j : j + columns] = scores.cpu().numpy()
    return similarity


def encode_clips(
    backbone: Backbone, adapter: Adapter | None, clips: Clips, rows: Sequence[int], picks: NDArray[np.int64] | None = None
) -> Tensor:
    """Frame vectors of clips, of all F frames or of those in `picks` (len(rows), F): (len(rows), F, D). No more than about
    BATCH_FRAMES frames of pixels are held at a time.
    """
    step = max(1, BATCH_FRAMES // (clips.frames if picks is None else picks.shape[1]))
    parts = []
    for i in range(0, len(rows), step):
        some = None if picks is None else picks[i : i + step]
        chunk = torch.from_numpy(clips.pixels(rows[i : i + step], some))  # (V, F, 3, S, S)
        parts.append(backbone.encode_frames(chunk.flatten(0, 1), adapter).unflatten(0, chunk.shape[:2]))
    return torch.cat(parts)


def encode_texts(backbone: Backbone, adapter: Adapter | None, texts: Sequence[str], words: int | None = None) -> Tensor:
    """Text vectors: (len(texts), D); `words` as in `evaluate`."""
    parts = []
    for i in range(0, len(texts), BATCH_TEXTS):
        part = texts[i : i + BATCH_TEXTS]
        tokens = backbone.tokenize(part) if words is None else backbone.tokenize(part, words)
        parts.append(backbone.encode_text(tokens.ids, adapter))
    return torch.cat(parts)
