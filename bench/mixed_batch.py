"""Texts with adapters in one batch, ViT-B/32 with random weights, texts of 12 tokens, adapters of rank 8 in slots of a stack of
rank 16: batches of 1 to 64 with 1, 8 and 32 different adapters; against the same batch without adapters, with the adapters
as a list (copied together for each batch), one text after the other, and open_clip's own `encode_text` at 77 tokens, of the
batch and of one text after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch

from backbone import AdapterShape, AdapterStack, FlatAdapter, Slots, load_backbone
from bench.timing import Row, compare

BATCHES = (1, 8, 32, 64)
ADAPTERS = (1, 8, 32)


def run() -> list[Row]:
    backbone = load_backbone("ViT-B-32", "random", "cuda" if torch.cuda.is_available() else "cpu")
    shape = AdapterShape(backbone.dims)
    adapters = [shape.assemble(shape.initial(seed)) for seed in range(max(ADAPTERS))]
    stack = AdapterStack(backbone.dims, 1 + len(adapters), device=backbone.device)
    for slot, adapter in enumerate(adapters, 1):
        stack.write(slot, FlatAdapter.of(adapter, backbone.dims, pinned=backbone.device.type == "cuda"))
    there = [adapter.to(backbone.device) for adapter in adapters]

    def timed(work: Callable[..., object], *arguments: object) -> Callable[[], object]:
        def once() -> None:
            with torch.inference_mode():
                work(*arguments)
                if backbone.device.type == "cuda":
                    torch.cuda.synchronize()

        return once

    def mixed(tokens: torch.Tensor, count: int) -> object:
        return backbone.encode_text(tokens, Slots(stack, 1 + torch.arange(len(tokens)) % count))

    def listed(tokens: torch.Tensor) -> object:
        return backbone.encode_text(tokens, [there[i % len(there)] for i in range(len(tokens))])

    def one_by_one(tokens: torch.Tensor) -> object:
        return [backbone.encode_text(row[None], there[i % len(there)]) for i, row in enumerate(tokens)]

    def naive(tokens: torch.Tensor) -> object:
        return [backbone._model.encode_text(row[None]) for row in tokens]

    rows = []
    for size in BATCHES:
        tokens = backbone.tokenize([f"a person number {i} walks a small dog there" for i in range(size)]).ids
        tokens, texts = tokens.to(backbone.device), f"{size} text{'s' * (size > 1)}"
        ways = {f"{texts}, no adapter": timed(backbone.encode_text, tokens)}
        for count in ADAPTERS:
            if count <= size:
                ways[f"{texts}, {count} adapter{'s' * (count > 1)}"] = timed(mixed, tokens, count)
        if size > 1:
            ways[f"{texts}, {min(size, len(there))} adapters as a list"] = timed(listed, tokens)
            ways[f"{texts}, {min(size, len(there))} adapters, one by one"] = timed(one_by_one, tokens)
            ways[f"{texts}, open_clip's encode_text, one by one"] = timed(naive, tokens)
        ways[f"{texts}, open_clip's encode_text"] = timed(backbone._model.encode_text, tokens)
        rows += compare(ways, naive=f"{texts}, no adapter", rounds=31 if size == 1 else 7)
    return rows
