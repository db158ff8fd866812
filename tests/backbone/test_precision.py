"""Half precision finds what float32 finds: vectors of the demo world, queries and frames, with and without adapters."""

import copy
import functools

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from backbone import AdapterShape, AdapterStack, Backbone, FlatAdapter, Slots, load_backbone, q_score, to_pixels
from backbone.linear import HalfWeights
from demo.worlds import scenes

VIDEOS = 100
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")],
    ),
]


@functools.cache
def full() -> Backbone:
    return load_backbone("builtin")


def halved(dtype: torch.dtype, device: str) -> Backbone:
    """What a GPU computes: on a CPU, float16 products are not made by themselves."""
    if device == "cuda":
        return load_backbone("builtin", device=device, dtype=dtype)
    backbone = copy.copy(full())
    backbone._take(copy.deepcopy(full()._model))
    backbone._compute_in(dtype)
    return backbone


@functools.cache
def questions() -> tuple[Tensor, Tensor]:
    """Three captions of each scene, and pixels of a frame of each."""
    drawn = scenes("daylight", VIDEOS, 5)
    pictures = [to_pixels(Image.fromarray(scene.frame(2.0)), 64) for scene in drawn]
    captions = [caption for scene in drawn for caption in scene.captions]
    return full().tokenize(captions).ids, torch.from_numpy(np.stack(pictures))


def encoded(backbone: Backbone, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Texts and frames; with a `dtype`, rows of four adapters and of none in turn, from a stack of it."""
    tokens, pixels = questions()

    def adapters(rows: int) -> Slots | None:
        return None if dtype is None else Slots(stack(dtype, str(backbone.device)), torch.arange(rows) % 5)

    with torch.inference_mode():
        texts = torch.cat([backbone.encode_text(part, adapters(len(part))).cpu() for part in tokens.split(100)])
        return texts, torch.cat([backbone.encode_frames(part, adapters(len(part))).cpu() for part in pixels.split(100)])


@functools.cache
def stack(dtype: torch.dtype, device: str) -> AdapterStack:
    shape, stack = AdapterShape(full().dims), AdapterStack(full().dims, 5, device=device, dtype=dtype)
    for slot in range(1, 5):
        generator = torch.Generator().manual_seed(slot)
        tensors = {name: 0.05 * torch.randn(size, generator=generator) for name, size in shape.layout().items()}
        stack.write(slot, FlatAdapter.of(shape.assemble(tensors), full().dims, pinned=device == "cuda"))
    return stack


@functools.cache
def reference(adapted: bool) -> tuple[Tensor, Tensor]:
    return encoded(full(), torch.float32 if adapted else None)


def relative(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def first_ten(texts: Tensor, frames: Tensor) -> list[set[int]]:
    scores = q_score(texts, frames[:, None])
    return [set(row) for row in scores.topk(10).indices.tolist()]


@pytest.mark.parametrize(("dtype", "adapted"), [(torch.float16, False), (torch.float16, True), (torch.bfloat16, True)])
@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_finds_what_float32_finds(device: str, dtype: torch.dtype, adapted: bool) -> None:
    backbone = halved(dtype, device)
    assert backbone.dtype == dtype and backbone.fingerprint == full().fingerprint, "either searches what the other indexed"
    (texts, frames), (expected_texts, expected_frames) = encoded(backbone, dtype if adapted else None), reference(adapted)
    assert texts.dtype == frames.dtype == torch.float32
    for found, expected in ((texts, expected_texts), (frames, expected_frames)):
        assert 0 < relative(found, expected) < (1e-2 if dtype == torch.bfloat16 else 1e-3)
    expected_hits = first_ten(expected_texts, expected_frames)
    for gallery in (frames, expected_frames):  # indexed by the same backbone, or by one of float32
        hits = first_ten(texts, gallery)
        assert np.mean([len(a & b) / 10 for a, b in zip(hits, expected_hits, strict=True)]) >= 0.99
        same = np.mean([a == b for a, b in zip(hits, expected_hits, strict=True)])
        assert same >= (0.99 if dtype == torch.float16 else 0.95), "float16 is what a GPU takes by itself"


def test_weights_that_were_published_as_float16_are_kept_so_and_nothing_is_lost() -> None:
    backbone, tokens = load_backbone("builtin"), questions()[0][:40]
    halves = backbone._text_linear
    assert isinstance(halves, HalfWeights)
    with torch.inference_mode():
        found, backbone._text_linear = backbone.encode_text(tokens), F.linear
        torch.testing.assert_close(found, backbone.encode_text(tokens), atol=1e-5, rtol=1e-5)
    layers = backbone.dims.text_layers
    assert len(halves._prepared) == 4 * layers + 1, "four products a block; the last one has its queries apart"


def test_weights_of_float32_are_halved_only_for_who_asks() -> None:
    exact, halves = (load_backbone("ViT-S-32-alt", "random", dtype=dtype) for dtype in (torch.float32, torch.float16))
    assert isinstance(halves._text_linear, HalfWeights) and not isinstance(exact._text_linear, HalfWeights)
    assert exact.fingerprint == halves.fingerprint
    tokens = exact.tokenize(["a dog", "a longer text about two dogs that run through deep snow"]).ids
    with torch.inference_mode():
        assert 0 < relative(halves.encode_text(tokens), exact.encode_text(tokens)) < 2e-3


def test_training_has_gradients_where_weights_are_kept_as_float16() -> None:
    shape = AdapterShape(full().dims, 4)
    tensors = {name: tensor.requires_grad_() for name, tensor in shape.initial(0).items()}
    full().encode_text(questions()[0][:3], shape.assemble(tensors)).square().sum().backward()
    assert all(t.grad is not None and t.grad.any() for name, t in tensors.items() if name.startswith("text_adapter_up"))
