"""Texts with adapters in one batch, ViT-B/32 with random weights: 32 texts of 12 tokens, each with another adapter, in one
forward; against the same batch without adapters, one text after the other, and open_clip's own `encode_text` at 77 tokens."""

from __future__ import annotations

import torch

from backbone import AdapterShape, load_backbone
from bench.timing import Row, compare

BATCH = 32


def run() -> list[Row]:
    backbone = load_backbone("ViT-B-32", "random", "cuda" if torch.cuda.is_available() else "cpu")
    shape = AdapterShape(backbone.dims)
    adapters = [shape.assemble(shape.initial(seed)).to(backbone.device) for seed in range(BATCH)]
    texts = [f"a person number {i} walks a small dog there" for i in range(BATCH)]
    tokens = backbone.tokenize(texts).ids.to(backbone.device)

    def timed(work: object) -> object:
        def once() -> None:
            with torch.inference_mode():
                work()  # type: ignore[operator]
                if backbone.device.type == "cuda":
                    torch.cuda.synchronize()

        return once

    batch = compare(
        {
            f"{BATCH} texts, no adapter": timed(lambda: backbone.encode_text(tokens)),
            f"{BATCH} texts, {BATCH} adapters, one batch": timed(lambda: backbone.encode_text(tokens, adapters)),
            f"{BATCH} texts, one adapter, one batch": timed(lambda: backbone.encode_text(tokens, adapters[0])),
            f"{BATCH} texts, {BATCH} adapters, one by one": timed(
                lambda: [backbone.encode_text(tokens[i : i + 1], adapters[i]) for i in range(BATCH)]
            ),
        },
        naive=f"{BATCH} texts, no adapter",
        rounds=7,
    )  # type: ignore[arg-type]
    one = compare(
        {
            "open_clip encode_text, one text": timed(lambda: backbone._model.encode_text(tokens[:1])),
            "one text, one adapter": timed(lambda: backbone.encode_text(tokens[:1], adapters[0])),
        },
        naive="open_clip encode_text, one text",
    )  # type: ignore[arg-type]
    return batch + one
