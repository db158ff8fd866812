"""What a training step reads, prepared on a thread of its own while the step before computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backbone import Backbone, Prefix
from training.dataset import Batches, Clips, Pair, mapped, pick_frames
from training.ranks import Ranks
from training.recipe import Recipe

AHEAD = 2  # steps
STATE_BYTES = 16 << 30  # a larger cache of frozen layers is not made; they are computed in each step instead
CHUNK = 64  # rows of a forward pass that fills the cache


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a batch: every text and every clip once, and which row has which."""

    tokens: Tensor  # (t, L) int64
    text_prefix: Prefix | None
    text_of: Tensor  # (rows,) int64
    frames: Tensor | Prefix  # of (c · F) frames
    clip_of: Tensor  # (rows,) int64
    per_clip: int  # F


class Inputs:
    """The batches of a run, each cut into this rank's parts of at most `recipe.micro_batch` rows."""

    def __init__(
        self,
        backbone: Backbone,
        clips: Clips,
        pairs: Sequence[Pair],
        recipe: Recipe,
        ranks: Ranks,
        first_layers: tuple[int, int],
        scratch: Path | None,
    ) -> None:
        size = min(recipe.batch_size, len({pair.clip for pair in pairs}))
        self.batches = Batches(pairs, size - size % ranks.count, recipe.seed)
        self._backbone, self._clips, self._recipe, self._ranks = backbone, clips, recipe, ranks
        self._visual_layers, self._text_layers = first_layers
        self._text_row = {text: row for row, text in enumerate(dict.fromkeys(pair.text for pair in pairs))}
        self._tokens = backbone.trim(backbone.tokenize(list(self._text_row), recipe.words).ids)
        self._text_states: NDArray[np.float32] | None = None
        self._frame_states: NDArray[np.float32] | None = None
        if scratch is not None and first_layers != (0, 0):
            self._cache_frozen_layers(scratch)

    def stream(self, first: int, steps: int) -> Iterator[tuple[int, list[Part]]]:
        """(step, parts) from step `first` + 1 up to `steps`."""
        waiting: deque[Future[list[Part]]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="inputs") as loader:
            for step in range(first + 1, steps + AHEAD + 1):
                if step <= steps:
                    waiting.append(loader.submit(self.parts, step))
                if len(waiting) > AHEAD or step > steps:
                    yield step - AHEAD, waiting.popleft().result()

    def parts(self, step: int) -> list[Part]:
        """What this rank encodes in a step, counted from 1."""
        pairs = self.batches[step - 1]
        rng = np.random.default_rng([self._recipe.seed, step])
        picks = pick_frames(len(pairs), self._clips.frames, self._recipe.frames, rng)  # (B, F), equal on every rank
        share = self._ranks.share(len(pairs))
        pairs, picks = pairs[share], picks[share]
        size = self._recipe.micro_batch or len(pairs)
        return [self._part(pairs[i : i + size], picks[i : i + size]) for i in range(0, len(pairs), size)]

    def _part(self, pairs: Sequence[Pair], picks: NDArray[np.int64]) -> Part:
        texts, text_of = np.unique([self._text_row[pair.text] for pair in pairs], return_inverse=True)
        clips, first, clip_of = np.unique([pair.clip for pair in pairs], return_index=True, return_inverse=True)
        tokens = self._tokens[torch.from_numpy(texts)]
        prefix = None
        if self._text_states is not None:
            prefix = Prefix(torch.from_numpy(self._text_states[texts]), self._text_layers)
        frames: Tensor | Prefix
        if self._frame_states is not None:
            states = self._frame_states[clips[:, None], picks[first]]  # (c, F, T, width)
            frames = Prefix(torch.from_numpy(states).flatten(0, 1), self._visual_layers)
        else:
            frames = torch.from_numpy(self._clips.pixels(clips.tolist(), picks[first])).flatten(0, 1)
        return Part(tokens, prefix, torch.from_numpy(text_of), frames, torch.from_numpy(clip_of), picks.shape[1])

    def _cache_frozen_layers(self, scratch: Path) -> None:
        """The layers before the last blocks see no adapter: their states of every frame and text, computed once."""
        backbone, clips = self._backbone, self.batches.clips
        with torch.inference_mode():
            one = backbone.frame_prefix(torch.from_numpy(self._clips.pixels(clips[:1])[0, :1]), self._visual_layers)
            frame_shape = (max(clips) + 1, self._clips.frames, *one.states.shape[1:])
            text_shape = (*self._tokens.shape, backbone.dims.text_width)
            if 4 * (np.prod(frame_shape) + np.prod(text_shape)) > STATE_BYTES:
                return
            if self._ranks.first:
                frames = mapped(scratch / "frame-states", frame_shape, np.float32)
                for clip in clips:
                    pixels = torch.from_numpy(self._clips.pixels([clip])[0])
                    frames[clip] = backbone.frame_prefix(pixels, self._visual_layers).states.cpu().numpy()
                texts = mapped(scratch / "text-states", text_shape, np.float32)
                for start in range(0, len(texts), CHUNK):
                    tokens = self._tokens[start : start + CHUNK]
                    texts[start : start + CHUNK] = backbone.text_prefix(tokens, self._text_layers).states.cpu().numpy()
        self._ranks.wait()
        self._frame_states = mapped(scratch / "frame-states", frame_shape, np.float32, new=False)
        self._text_states = mapped(scratch / "text-states", text_shape, np.float32, new=False)
