"""What a search must score, computed by the client itself: from the bytes that it uploaded, the adapter's file and a frozen
backbone. Nothing is read from the service, so an answer that mixes adapters, or vectors of another one, differs.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from serving import clip

import adapters_store
from backbone import Adapter, AdapterShape, Backbone, load_backbone, rescore
from indexer.decode import decode
from indexer.frames import FrameArchive, pack_frames

COLOURS = 180  # `serving.colour` repeats after as many numbers
BACKBONE = load_backbone("builtin")
BACKBONES = {BACKBONE.fingerprint: BACKBONE}  # by fingerprint, what a collection may be changed to


def other_weights(to: Path) -> None:
    """Weights of another backbone of the built-in shape, which `score` knows from now on."""
    tensors = {name: tensor.half().contiguous() for name, tensor in BACKBONE.weights().items()}
    tensors["token_embedding.weight"] = tensors["token_embedding.weight"].roll(1000, 0).contiguous()
    tensors["visual.conv1.weight"] = tensors["visual.conv1.weight"].flip(0).contiguous()
    save_file(tensors, to)
    other = load_backbone("builtin", str(to))
    BACKBONES[other.fingerprint] = other


def strange_adapter(seed: int, scope: str) -> bytes:
    """The file of an adapter of random weights, large enough that every score tells it from any other."""
    shape = AdapterShape(BACKBONE.dims, rank=4, shared=0, scope=scope)  # type: ignore[arg-type]
    noise = torch.Generator().manual_seed(seed)
    tensors = {name: 0.3 * torch.randn(size, generator=noise) for name, size in shape.layout().items()}
    return adapters_store.pack(shape, BACKBONE.fingerprint, tensors)


def score(backbone: str, weights: bytes | None, text: str, number: int) -> float:
    """The score of clip `number` for a text, by the backbone of this fingerprint and this adapter, None: no adapter."""
    return _score(BACKBONES[backbone], weights, text, number % COLOURS)


@cache
def _score(backbone: Backbone, weights: bytes | None, text: str, number: int) -> float:
    with torch.inference_mode():
        frames = backbone.encode_frames(torch.from_numpy(_pixels(number)), _adapter(backbone, weights)).numpy()
    return float(rescore(_query(backbone, weights, text), [frames.astype(np.float16).tobytes()])[0])


@cache
def _query(backbone: Backbone, weights: bytes | None, text: str) -> np.ndarray:
    with torch.inference_mode():
        row: np.ndarray = backbone.encode_text(backbone.tokenize([text]).ids, _adapter(backbone, weights)).numpy()[0]
        return row


@cache
def _adapter(backbone: Backbone, weights: bytes | None) -> Adapter | None:
    return None if weights is None else adapters_store.unpack(weights).adapter(backbone.fingerprint)


@cache
def _pixels(number: int) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "clip.mp4").write_bytes(clip(number))
        archive = FrameArchive(pack_frames(decode(Path(folder) / "clip.mp4", Path(folder)), Path(folder)))
    (segment,) = archive.segments
    return archive.pixels(segment.frames, BACKBONE.image_size)
