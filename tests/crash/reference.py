"""What a search must score, computed by the client itself: from the bytes that it uploaded, the adapter's file and the frozen
backbone. Nothing is read from the service, so an answer that mixes adapters, or vectors of another one, differs.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from serving import clip

import adapters_store
from backbone import Adapter, AdapterShape, load_backbone, rescore
from indexer.decode import decode
from indexer.frames import FrameArchive, pack_frames

COLOURS = 180  # `serving.colour` repeats after as many numbers
BACKBONE = load_backbone("builtin")


def strange_adapter(seed: int, scope: str) -> bytes:
    """The file of an adapter of random weights, large enough that every score tells it from any other."""
    shape = AdapterShape(BACKBONE.dims, rank=4, shared=0, scope=scope)  # type: ignore[arg-type]
    noise = torch.Generator().manual_seed(seed)
    tensors = {name: 0.3 * torch.randn(size, generator=noise) for name, size in shape.layout().items()}
    return adapters_store.pack(shape, BACKBONE.fingerprint, tensors)


def score(weights: bytes | None, text: str, number: int) -> float:
    """The score of clip `number` for a text, with this adapter or, for None, with the frozen backbone alone."""
    return _score(weights, text, number % COLOURS)


@cache
def _score(weights: bytes | None, text: str, number: int) -> float:
    with torch.inference_mode():
        frames = BACKBONE.encode_frames(torch.from_numpy(_pixels(number)), _adapter(weights)).numpy()
    return float(rescore(_query(weights, text), [frames.astype(np.float16).tobytes()])[0])


@cache
def _query(weights: bytes | None, text: str) -> np.ndarray:
    with torch.inference_mode():
        row: np.ndarray = BACKBONE.encode_text(BACKBONE.tokenize([text]).ids, _adapter(weights)).numpy()[0]
        return row


@cache
def _adapter(weights: bytes | None) -> Adapter | None:
    return None if weights is None else adapters_store.unpack(weights).adapter(BACKBONE.fingerprint)


@cache
def _pixels(number: int) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "clip.mp4").write_bytes(clip(number))
        archive = FrameArchive(pack_frames(decode(Path(folder) / "clip.mp4", Path(folder)), Path(folder)))
    (segment,) = archive.segments
    return archive.pixels(segment.frames, BACKBONE.image_size)
