"""The towers of other kinds than CLIP's own, against open_clip's and timm's modules, in every way that they are run."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from small import NAMES, shaken, small, tokenizer_in
from torch import Tensor

from backbone import Adapter, AdapterShape, AdapterStack, Backbone, FlatAdapter, Form, Graphs, Slots, load_backbone, to_pixels
from training.dataset import ArrayClips, Pair
from training.inputs import Inputs
from training.ranks import ALONE
from training.recipe import Recipe
from training.step import Learner

TEXTS = ["ball", "a red ball and two blue boxes on the left of a snowy field", "", "snow " * 70, "two boxes"]
WHOLE = ("PE-Core-T-16-384", "PE-Core-S-16-384", "PE-Core-B-16", "ViT-L-14", "ViT-B-32-256", "EVA02-B-16", "ViT-B-16-SigLIP2")


@pytest.fixture(scope="module", params=NAMES)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return small(request.param)


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    relative = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(relative.max()) <= tolerance


def pixels_of(backbone: Backbone, count: int) -> tuple[Tensor, Tensor]:
    """As bytes, and normalised."""
    side = backbone.image_size
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, side, side), dtype=np.uint8))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (backbone._mean, backbone._std))
    return pixels, (pixels.float() / 255 - mean) / std


def adapters_of(backbone: Backbone, count: int, words: tuple[int, ...] = ()) -> list[Adapter]:
    shape = AdapterShape(backbone.dims, 4, 8, vocabulary=words)
    generator = torch.Generator().manual_seed(0)
    drawn = ({n: 0.1 * torch.randn(s, generator=generator) for n, s in shape.layout().items()} for _ in range(count))
    return [shape.assemble(tensors) for tensors in drawn]


def equals_open_clip(backbone: Backbone) -> None:
    model = backbone._model
    pixels, normalised = pixels_of(backbone, 2)
    tokens = backbone.tokenize(TEXTS).ids
    with torch.inference_mode():
        near(backbone.encode_frames(pixels), model.encode_image(normalised))
        near(backbone.encode_text(tokens), model.encode_text(tokens))


def test_without_adapter_the_outputs_are_open_clips_own(backbone: Backbone) -> None:
    equals_open_clip(backbone)


@pytest.mark.parametrize("name", WHOLE)
def test_the_whole_architectures_equal_open_clips(name: str, tmp_path: Path) -> None:
    whole = load_backbone(name, "random", tokenizer=tokenizer_in(tmp_path) if "SigLIP" in name else None)
    shaken(whole._model)
    equals_open_clip(whole)


def naive_text(model: Any, tokens: Tensor, apply: Callable[[Tensor, int], Tensor]) -> Tensor:
    text = model.text
    x = text.token_embedding(tokens) + text.positional_embedding
    for layer, block in enumerate(text.transformer.resblocks):
        x = x + apply(block.ls_1(block.attention(block.ln_1(x), attn_mask=text.attn_mask)), 2 * layer)
        x = x + apply(block.ls_2(block.mlp(block.ln_2(x))), 2 * layer + 1)
    x = text.ln_final(x)
    if text.pool_type == "last":
        return text.text_projection(x[:, -1])  # type: ignore[no-any-return]
    return x[torch.arange(len(x)), tokens.argmax(-1)] @ text.text_projection  # type: ignore[no-any-return]


def naive_frames(model: Any, pixels: Tensor, apply: Callable[[Tensor, int], Tensor]) -> Tensor:
    trunk, rope = model.visual.trunk, {}
    x = trunk._pos_embed(trunk.patch_embed(pixels))
    if getattr(trunk, "rope", None) is not None:
        x, rope["rope"] = x
    x = trunk.norm_pre(x)
    for layer, block in enumerate(trunk.blocks):
        x = x + apply(block.attn(block.norm1(x), **rope), 2 * layer)
        x = x + apply(block.mlp(block.norm2(x)), 2 * layer + 1)
    return model.visual.head(trunk.forward_head(trunk.norm(x)))  # type: ignore[no-any-return]


def test_adapters_stand_after_each_sub_layer(backbone: Backbone) -> None:
    (adapter,) = adapters_of(backbone, 1)
    pixels, normalised = pixels_of(backbone, 2)
    tokens = backbone.tokenize(TEXTS).ids
    assert adapter.text is not None and adapter.visual is not None
    with torch.inference_mode():
        near(backbone.encode_text(tokens, adapter), naive_text(backbone._model, tokens, adapter.text))
        near(backbone.encode_frames(pixels, adapter), naive_frames(backbone._model, normalised, adapter.visual))
        assert (backbone.encode_frames(pixels, adapter) - backbone.encode_frames(pixels)).abs().max() > 0.01


@pytest.mark.parametrize("words", [0, 6])
def test_every_way_to_run_a_batch_gives_the_same_vectors(backbone: Backbone, words: int) -> None:
    """Mixed as a list, as slots and through the graphs' buffers, behind frozen prefixes, and with activations recomputed:
    all as one row at a time.
    """
    known = tuple(backbone.tokenize(TEXTS).ids.unique()[:words].tolist())
    made = [None, *adapters_of(backbone, 3, known)]
    stack = AdapterStack(backbone.dims, 4, words=words, tokens=backbone.tokens)
    for slot, adapter in enumerate(made[1:], 1):
        assert adapter is not None
        stack.write(slot, FlatAdapter.of(adapter, backbone.dims))
    graphs = Graphs(backbone, stack, texts=8, frames=8)
    index = torch.tensor([1, 0, 3, 2, 1])
    mixed, slots = [made[slot] for slot in index], Slots(stack, index)
    tokens, (pixels, _) = backbone.tokenize(TEXTS).ids, pixels_of(backbone, 5)
    with torch.inference_mode():
        for encode, again, rows in (
            (backbone.encode_text, graphs.encode_text, tokens),
            (backbone.encode_frames, graphs.encode_frames, pixels),
        ):
            alone = torch.cat([encode(row[None], own) for row, own in zip(rows, mixed, strict=True)])
            for found in (
                encode(rows, mixed),
                encode(rows, slots),
                again(rows, slots),
                again(rows[:3], Slots(stack, index[:3])),
            ):
                near(found, alone[: len(found)])
            near(again(rows), encode(rows))
            for same in (None, made[2]):
                near(encode(rows, same), torch.cat([encode(row[None], same) for row in rows]))
    near(backbone.encode_text(tokens, made[1], recompute=True).detach(), backbone.encode_text(tokens, made[1]).detach())
    near(backbone.encode_frames(pixels, made[1], recompute=True).detach(), backbone.encode_frames(pixels, made[1]).detach())


@pytest.mark.parametrize("last", [0, 1, 2])
def test_a_frozen_prefix_changes_nothing(backbone: Backbone, last: int) -> None:
    """What the trainer keeps of the layers before the first adapter."""
    shape = AdapterShape(backbone.dims, 4, 8)
    visual, text = (backbone.dims.visual_layers, backbone.dims.text_layers) if last == 0 else shape.first_layers(last)
    adapter = shape.assemble(shape.initial(0, last))
    tokens, (pixels, _) = backbone.trim(backbone.tokenize(TEXTS).ids), pixels_of(backbone, 2)
    with torch.inference_mode():
        prefix = backbone.text_prefix(tokens, text)
        near(backbone.encode_text(tokens, adapter, prefix=prefix), backbone.encode_text(tokens, adapter))
        near(
            backbone.encode_text(tokens[:2], adapter, prefix=backbone.text_prefix(tokens[:2], text)),
            backbone.encode_text(tokens, adapter)[:2],
        )
        near(backbone.encode_frames(backbone.frame_prefix(pixels, visual), adapter), backbone.encode_frames(pixels, adapter))


def test_a_training_s_cached_layers_are_what_it_would_compute(backbone: Backbone, tmp_path: Path) -> None:
    recipe = Recipe(steps=2, batch_size=4, frames=2, rank=4, shared=8, layers=1, vocabulary="off", words=16)
    shape = AdapterShape(backbone.dims, 4, 8)
    layers = shape.first_layers(1)
    frames = np.random.default_rng(1).integers(0, 256, (4, 3, 3, 48, 48), dtype=np.uint8)
    pairs = [Pair(i, text, str(i)) for i, text in enumerate(TEXTS[:4])]
    learner = Learner(backbone, shape, shape.initial(0, 1), recipe)
    with torch.inference_mode():
        cached, computed = (
            [
                vectors
                for part in Inputs(backbone, ArrayClips(frames), pairs, recipe, ALONE, layers, scratch).parts(1)
                for vectors in learner.encode(part, first)
            ]
            for scratch, first in ((tmp_path, layers), (None, layers))
        )
        plain = [
            vectors
            for part in Inputs(backbone, ArrayClips(frames), pairs, recipe, ALONE, (0, 0), None).parts(1)
            for vectors in learner.encode(part, (0, 0))
        ]
    for found, again, expected in zip(cached, computed, plain, strict=True):
        near(found, expected)
        near(again, expected)


def test_only_a_causal_text_may_be_cut_and_packed() -> None:
    for name, causal in zip(NAMES, (True, True, False), strict=True):
        tower = small(name)
        tokens = tower.tokenize(["ball", "a red ball"]).ids
        assert tower.causal is causal
        assert tower.trim(tokens).shape[1] == (5 if causal else tower.context_length)


def test_fewer_words_keep_the_place_where_a_text_is_pooled() -> None:
    """A tower that pools at the last position reads it, so that a limit on words may not move it."""
    tower = small("ViT-B-16-SigLIP2")
    few = tower.tokenize(["a red ball", "snow " * 70], words=16)
    assert few.ids.shape == (2, tower.context_length) and few.truncated == (False, True)
    assert torch.equal(few.ids[0], tower.tokenize(["a red ball"]).ids[0])
    assert not few.ids[1, 16:].any()
    assert small("EVA02-B-16").tokenize(["a red ball"], words=16).ids.shape == (1, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near(backbone: Backbone, dtype: torch.dtype) -> None:
    halved = copy.copy(backbone)
    halved._take(copy.deepcopy(backbone._model))
    halved._compute_in(dtype)
    tokens, (pixels, _) = backbone.tokenize(TEXTS).ids, pixels_of(backbone, 2)
    with torch.inference_mode():
        near(halved.encode_text(tokens), backbone.encode_text(tokens), 2e-2)
        near(halved.encode_frames(pixels), backbone.encode_frames(pixels), 2e-2)
        assert halved.encode_frames(pixels).dtype == torch.float32


def test_a_tuned_copy_starts_where_the_frozen_one_stands(backbone: Backbone) -> None:
    twin, weights = backbone.unfrozen()
    pixels, _ = pixels_of(backbone, 1)
    found = twin.encode_frames(pixels)
    near(found.detach(), backbone.encode_frames(pixels))
    found.square().sum().backward()
    assert any(
        weight.grad is not None and weight.grad.any() for name, weight in weights.items() if "trunk.blocks.0.attn" in name
    )


@pytest.mark.parametrize(("name", "interpolation"), [("PE-Core-T-16-384", "bilinear"), ("ViT-B-16-SigLIP2", "bicubic")])
def test_the_whole_picture_is_squeezed_as_the_published_weights_want_it(name: str, interpolation: str) -> None:
    (tag,) = open_clip.list_pretrained_tags_by_model(name)
    assert open_clip.get_pretrained_cfg(name, tag)["interpolation"] == interpolation
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 256, (90, 160, 3), dtype=np.uint8))
    transform = open_clip.image_transform(
        64, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode="squash", interpolation=interpolation
    )
    expected = (transform(picture) * 255).round().to(torch.uint8).numpy()
    np.testing.assert_array_equal(to_pixels(picture, Form(64, "squash", interpolation)), expected)


def test_weights_without_a_tag_are_fed_as_the_published_ones_of_their_architecture() -> None:
    whole = load_backbone("PE-Core-T-16-384", "random")
    assert whole.form == Form(384, "squash", "bilinear") and whole._mean == whole._std == (0.5, 0.5, 0.5)
    assert load_backbone("ViT-B-32", "random").form == Form(224)
