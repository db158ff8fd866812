"""Texts with adapters in one batch, ViT-B/32 with random weights, texts of 12 tokens, adapters of rank 8 in slots of a stack of
rank 16: batches of 1 to 64 with 1, 8 and 32 different adapters, and with as many that have 256 vocabulary rows each, for all
tokens of the texts among them; against the same batch without adapters, with the adapters as a list (copied together for each
batch), one text after the other, and open_clip's own `encode_text` at 77 tokens, of the batch and of one text after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from backbone import VOCABULARY_ROWS, AdapterShape, AdapterStack, FlatAdapter, Slots, load_backbone
from bench.timing import Row, compare

BATCHES = (1, 8, 32, 64)
ADAPTERS = (1, 8, 32)
ROWS = 256


def text(number: int) -> str:
    return f"a person number {number} walks a small dog there"


def run() -> list[Row]:
    backbone = load_backbone("ViT-B-32", "random", "cuda" if torch.cuda.is_available() else "cpu")
    shape = AdapterShape(backbone.dims)
    adapters = [shape.assemble(shape.initial(seed)) for seed in range(max(ADAPTERS))]
    told = backbone.tokenize([text(i) for i in range(max(BATCHES))]).ids.unique().tolist()
    rich_shape = replace(shape, vocabulary=tuple(sorted([*told, *set(range(1000)).difference(told)][:ROWS])))
    rich = [rich_shape.assemble(rich_shape.initial(seed)) for seed in range(max(ADAPTERS))]
    stack, rich_stack = (
        AdapterStack(backbone.dims, 1 + len(adapters), device=backbone.device, words=VOCABULARY_ROWS, tokens=backbone.tokens)
        for _ in range(2)
    )
    for filled, values in ((stack, adapters), (rich_stack, rich)):
        for slot, adapter in enumerate(values, 1):
            filled.write(slot, FlatAdapter.of(adapter, backbone.dims, pinned=backbone.device.type == "cuda"))
    there = [adapter.to(backbone.device) for adapter in adapters]

    def timed(work: Callable[..., object], *arguments: object) -> Callable[[], object]:
        def once() -> None:
            with torch.inference_mode():
                work(*arguments)
                if backbone.device.type == "cuda":
                    torch.cuda.synchronize()

        return once

    def mixed(tokens: torch.Tensor, count: int, stack: AdapterStack = stack) -> object:
        return backbone.encode_text(tokens, Slots(stack, 1 + torch.arange(len(tokens)) % count))

    def listed(tokens: torch.Tensor) -> object:
        return backbone.encode_text(tokens, [there[i % len(there)] for i in range(len(tokens))])

    def one_by_one(tokens: torch.Tensor) -> object:
        return [backbone.encode_text(row[None], there[i % len(there)]) for i, row in enumerate(tokens)]

    def naive(tokens: torch.Tensor) -> object:
        return [backbone._model.encode_text(row[None]) for row in tokens]

    rows = []
    for size in BATCHES:
        tokens = backbone.tokenize([text(i) for i in range(size)]).ids
        tokens, texts = tokens.to(backbone.device), f"{size} text{'s' * (size > 1)}"
        ways = {f"{texts}, no adapter": timed(backbone.encode_text, tokens)}
        for count in ADAPTERS:
            if count <= size:
                ways[f"{texts}, {count} adapter{'s' * (count > 1)}"] = timed(mixed, tokens, count)
        count = min(size, len(there))
        ways[f"{texts}, {count} adapter{'s' * (count > 1)} with vocabulary rows"] = timed(mixed, tokens, count, rich_stack)
        if size > 1:
            ways[f"{texts}, {min(size, len(there))} adapters as a list"] = timed(listed, tokens)
            ways[f"{texts}, {min(size, len(there))} adapters, one by one"] = timed(one_by_one, tokens)
            ways[f"{texts}, open_clip's encode_text, one by one"] = timed(naive, tokens)
        ways[f"{texts}, open_clip's encode_text"] = timed(backbone._model.encode_text, tokens)
        rows += compare(ways, naive=f"{texts}, no adapter", rounds=31 if size == 1 else 7)
    return rows
