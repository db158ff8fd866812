"""What a frame and a text of 12 tokens cost in the backbones of `polyclip backbones`, with seeded weights: processor time of
one thread, each against ViT-B-32 in the same round. Writes backbone/weights/costs.json, which that command reads."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch

from backbone import Backbone
from backbone.catalogue import CHOICES
from bench.timing import Row, compare

COSTS = Path(__file__).parent.parent / "backbone" / "weights" / "costs.json"
ROUNDS = 5


def run() -> list[Row]:
    rows, costs, threads = [], dict[str, dict[str, Any]](), torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # open_clip's, that the weights are random
    naive = made("ViT-B-32")
    for name in CHOICES:
        one = naive if name == "ViT-B-32" else made(name)
        costs[name] = {"parameters": one.parameters, "image_size": one.image_size, "context_length": one.context_length}
        for what, encode in (("frame", frame), ("text", text)):
            ways: dict[str, Callable[[], object]] = {f"a {what}, ViT-B-32": partial(encode, naive)}
            ways[f"a {what}, {name}"] = partial(encode, one)
            found = compare(ways, f"a {what}, ViT-B-32", ROUNDS, 1, clock=time.thread_time)[-1]
            rows.append(found)
            costs[name][what] = round(found.ratio, 2)
    torch.set_num_threads(threads)
    logging.disable(logging.NOTSET)
    COSTS.write_text(json.dumps({"command": "python -m bench backbones", "backbones": costs}, indent=2) + "\n")
    return rows


def made(name: str) -> Backbone:
    """Without a tokenizer of its own, which some have on the hub only."""
    torch.manual_seed(0)
    return Backbone(name, open_clip.create_model(name), open_clip.SimpleTokenizer(), (0.5,) * 3, (0.5,) * 3)


@torch.inference_mode()
def frame(backbone: Backbone) -> None:
    backbone.encode_frames(torch.zeros(1, 3, backbone.image_size, backbone.image_size, dtype=torch.uint8))


@torch.inference_mode()
def text(backbone: Backbone) -> None:
    tokens = torch.zeros(1, backbone.context_length, dtype=torch.int64)
    tokens[0, :12] = torch.arange(1, 13)  # the largest id ends it
    backbone.encode_text(tokens)
