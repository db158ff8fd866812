"""CPU mechanisms, each measured alone: with it and without it in turn, nothing else changed. What saves less than a tenth in
its own case is to go. Texts: processor time of one thread, which other work on the machine disturbs least; one text and 32, of
2 to 20 words. Clips: four of 10 seconds through a decoder that is kept and forks, against one that is started for each.
Training: a step on the last 2 layers with the states of the frozen layers before them kept, against computed in each step.

`Reordered` and `HalfWeights` are kept for single texts, which is what a search asks for; `Packing` for batches of different
lengths; the decoder that forks for short clips; kept states for training on few layers."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from backbone import Backbone, load_backbone
from backbone.linear import HalfWeights, Reordered, onednn
from backbone.packing import Packing
from bench.indexing import film
from bench.timing import Row, compare
from bench.training_step import step
from indexer.sandbox import Sandbox

ROUNDS = 3


def run() -> list[Row]:
    rows, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    for name, pretrained in (("builtin", None), ("ViT-B-32", "random")):
        rows += texts(name, load_backbone(name, pretrained))
    torch.set_num_threads(threads)
    return rows + clips() + steps()


def pair(what: str, without: Callable[[], object], with_it: Callable[[], object], **more: Any) -> list[Row]:
    ways = {f"{what}: without": without, f"{what}: with it": with_it}
    return compare(ways, f"{what}: without", ROUNDS, 1, **more)


def texts(name: str, backbone: Backbone) -> list[Row]:
    words, lengths = ["a", "red", "ball", "on", "snow"] * 4, np.random.default_rng(0).integers(2, 21, 32)
    tokens = backbone.tokenize([" ".join(words[:length]) for length in lengths]).ids
    chosen, reordered, halves, packing = backbone._text_linear, Reordered(), HalfWeights(), Packing.of
    rows = []

    def encode(count: int, linear: Any, packed: bool = True) -> Callable[[], object]:
        def once() -> None:
            backbone._text_linear = linear
            with torch.inference_mode(), patch.object(Packing, "of", packing if packed else lambda ends: None):
                backbone.encode_text(tokens[:count])

        return once

    for count in (1, 32):
        what, more = f"{name}, {count} text{'s' * (count > 1)}", {"clock": time.thread_time}
        rows += pair(f"{what}, Reordered", encode(count, onednn), encode(count, reordered), **more)
        rows += pair(f"{what}, HalfWeights for Reordered", encode(count, reordered), encode(count, halves), **more)
        if count > 1:
            rows += pair(f"{what}, Packing", encode(count, chosen, packed=False), encode(count, chosen), **more)
    return rows


def clips() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder, Sandbox() as kept:
        files = [Path(folder) / f"{number}.mp4" for number in range(4)]
        for number, file in enumerate(files):
            file.write_bytes(film(number))

        def decode(path: Path, sandbox: Sandbox) -> None:
            with tempfile.TemporaryDirectory() as out:
                sandbox.decode(path, Path(out))

        def each() -> None:
            for path in files:
                with Sandbox() as sandbox:
                    decode(path, sandbox)

        def forked() -> None:
            for path in files:
                decode(path, kept)

        return pair("four clips, a decoder that forks", each, forked)


def steps() -> list[Row]:
    rows = []
    for name, pretrained, batch in (("builtin", None, 32), ("ViT-B-32", "random", 4)):
        with tempfile.TemporaryDirectory() as folder:
            way = "adapter in the last 2 layers"
            computed, kept = (step(name, pretrained, batch, way, scratch) for scratch in (None, Path(folder)))
            rows += pair(f"{name}, a training step of {batch} pairs, kept states", computed, kept)
    return rows
