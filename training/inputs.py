"""What a training step reads, prepared on a thread of its own while the step before computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backbone import Backbone, Prefix
from training.dataset import Batches, Clips, Pair, mapped, pick_frames
from training.feedback import Feedback, Judged
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
        rejected: Sequence[Pair] = (),
    ) -> None:
        """`rejected`: hard negatives, some of which are encoded beside each batch (`Feedback`)."""
        size = min(recipe.batch_size, len({pair.clip for pair in pairs}))
        self.batches = Batches(pairs, size - size % ranks.count, recipe.seed)
        self._feedback = Feedback.of(pairs, rejected, recipe)
        self._backbone, self._clips, self._recipe, self._ranks = backbone, clips, recipe, ranks
        self._visual_layers, self._text_layers = first_layers
        self._text_row = {text: row for row, text in enumerate(dict.fromkeys(pair.text for pair in (*pairs, *rejected)))}
        self._tokens = backbone.trim(backbone.tokenize(list(self._text_row), recipe.words).ids)
        self._clip_rows = sorted({*self.batches.clips, *(pair.clip for pair in rejected)})
        self._text_states: NDArray[np.float32] | None = None
        self._frame_states: NDArray[np.float32] | None = None
        if scratch is not None and self._visual_layers:
            self._frame_states = self._cached_frame_states(scratch / "frame-states")
        if scratch is not None and self._text_layers:
            self._text_states = self._cached_text_states(scratch / "text-states")

    def stream(self, first: int, steps: int) -> Iterator[tuple[int, list[Part]]]:
        """(step, parts) from step `first` + 1 up to `steps`."""
        waiting: deque[tuple[int, Future[list[Part]]]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="inputs") as loader:
            ahead = iter(range(first + 1, steps + 1))
            while True:
                for step in islice(ahead, AHEAD + 1 - len(waiting)):
                    waiting.append((step, loader.submit(self.parts, step)))
                if not waiting:
                    return
                step, parts = waiting.popleft()
                yield step, parts.result()

    def clips_of(self, step: int) -> Tensor:
        """(B,) the clip of each pair of a step's batch, of all ranks."""
        return torch.tensor([pair.clip for pair in self.batches[step - 1]])

    def judged_of(self, step: int) -> Judged | None:
        """What feedback says of a step's batch; None where there is none."""
        if self._feedback is None:
            return None
        pairs = self.batches[step - 1]
        return self._feedback.judge(pairs, self._negatives(step, pairs))

    def _negatives(self, step: int, pairs: Sequence[Pair]) -> list[Pair]:
        """The hard negatives beside a batch, equal on every rank and as many for each."""
        found = [] if self._feedback is None else self._feedback.negatives(step, pairs)
        return found[: len(found) - len(found) % self._ranks.count]

    def parts(self, step: int) -> list[Part]:
        """What this rank encodes in a step, counted from 1: its share of the pairs, and of the hard negatives behind them."""
        pairs = self.batches[step - 1]
        pairs = [*pairs, *self._negatives(step, pairs)]
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

    @torch.inference_mode()
    def _cached_frame_states(self, path: Path) -> NDArray[np.float32] | None:
        """What the layers before the first adapter make of every frame, (clips, F, T, width); None where it is too much."""
        backbone, rows = self._backbone, self._clip_rows

        def states(row: int) -> NDArray[np.float32]:
            pixels = torch.from_numpy(self._clips.pixels([row])[0])
            return backbone.frame_prefix(pixels, self._visual_layers).states.cpu().numpy()

        shape = (max(rows) + 1, *states(rows[0]).shape)
        return self._filled(path, shape, ((row, states(row)) for row in rows))

    @torch.inference_mode()
    def _cached_text_states(self, path: Path) -> NDArray[np.float32] | None:
        """The same for every text: (texts, L, width)."""

        def states(first: int) -> NDArray[np.float32]:
            tokens = self._tokens[first : first + CHUNK]
            return self._backbone.text_prefix(tokens, self._text_layers).states.cpu().numpy()

        shape = (len(self._tokens), *states(0).shape[1:])
        firsts = range(0, len(self._tokens), CHUNK)
        return self._filled(path, shape, ((slice(first, first + CHUNK), states(first)) for first in firsts))

    def _filled(
        self, path: Path, shape: tuple[int, ...], parts: Iterator[tuple[int | slice, NDArray[np.float32]]]
    ) -> NDArray[np.float32] | None:
        """A mapped file that the first rank fills and every rank reads."""
        if 4 * np.prod(shape) > STATE_BYTES:
            return None
        if self._ranks.first:
            array = mapped(path, shape, np.float32)
            for rows, values in parts:
                array[rows] = values
        self._ranks.wait()
        return mapped(path, shape, np.float32, new=False)
