"""The Cross-Modal Adapter against a loop-by-loop reference of its equations, and mixed batches against one by one."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from backbone import Adapter, AdapterShape, Backbone, TowerDims, load_backbone

B32 = TowerDims(visual_width=768, visual_layers=12, text_width=512, text_layers=12)
SMALL = TowerDims(visual_width=192, visual_layers=6, text_width=128, text_layers=4)


def tensors_of(shape: AdapterShape, seed: int) -> dict[str, Tensor]:
    """Large enough to change the outputs, biases too."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.2 * torch.randn(size, generator=generator) for name, size in shape.layout().items()}


def reference(h: Tensor, shape: AdapterShape, tensors: dict[str, Tensor], tower: str, place: int) -> Tensor:
    """A(h) feature by feature, from the stored layout."""
    layer, sub = divmod(place, 2)
    layers = {"visual": shape.dims.visual_layers, "text": shape.dims.text_layers}[tower]
    partner = {pair[0 if tower == "visual" else 1]: i for i, pair in enumerate(shape.pairs())}
    alone = [i for i in range(layers) if i not in partner]
    z = h @ tensors[f"{tower}_adapter_down_weight"][place].T + tensors[f"{tower}_adapter_down_bias"][place]
    z = z * torch.sigmoid(1.702 * z)
    out = h.clone()
    own = h.shape[-1] - shape.shared
    for feature in range(h.shape[-1]):
        if feature < own:
            row = tensors[f"{tower}_adapter_up_unique_weight"][place, feature]
            bias = tensors[f"{tower}_adapter_up_unique_bias"][place, feature]
        elif layer in partner:
            row = tensors["vt_adapter_up_share_weight"][2 * partner[layer] + sub, feature - own]
            bias = tensors["vt_adapter_up_share_bias"][2 * partner[layer] + sub, feature - own]
        else:
            row = tensors[f"{tower}_adapter_up_unpaired_weight"][2 * alone.index(layer) + sub, feature - own]
            bias = tensors[f"{tower}_adapter_up_unpaired_bias"][2 * alone.index(layer) + sub, feature - own]
        out[..., feature] += z @ row + bias
    return out


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("builtin")


@pytest.mark.parametrize("rank", [1, 8, 16])
@pytest.mark.parametrize("shared", [0, 8, 16, 64, 128])
@pytest.mark.parametrize("tower", ["visual", "text"])
def test_each_place_computes_the_paper_s_equation(rank: int, shared: int, tower: str) -> None:
    shape = AdapterShape(SMALL, rank, shared)
    tensors = tensors_of(shape, 0)
    fused = getattr(shape.assemble(tensors), tower)
    width, layers = (192, 6) if tower == "visual" else (128, 4)
    h = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(1))
    for place in range(2 * layers):
        torch.testing.assert_close(fused(h, place), reference(h, shape, tensors, tower, place), atol=1e-5, rtol=1e-5)


def test_adapters_stand_after_attention_and_after_the_mlp_of_every_block(backbone: Backbone) -> None:
    shape = AdapterShape(backbone.dims)
    tensors = tensors_of(shape, 2)
    adapter = shape.assemble(tensors)
    tokens = backbone.tokenize(["a red ball"]).ids
    text = backbone._model
    with torch.inference_mode():
        x = text.token_embedding(tokens) + text.positional_embedding
        for layer, block in enumerate(text.transformer.resblocks):
            x = x + reference(block.attention(block.ln_1(x), attn_mask=text.attn_mask), shape, tensors, "text", 2 * layer)
            x = x + reference(block.mlp(block.ln_2(x)), shape, tensors, "text", 2 * layer + 1)
        expected = text.ln_final(x)[0, int(tokens.argmax())] @ text.text_projection
        torch.testing.assert_close(backbone.encode_text(tokens, adapter)[0], expected, atol=1e-4, rtol=1e-4)


def test_parameters_at_the_papers_size() -> None:
    assert AdapterShape(B32, 8, 16).parameters == 519_168


def test_the_released_layout_at_equal_depth_has_no_tensor_of_ours() -> None:
    assert AdapterShape(B32, 8, 16).layout() == {
        "visual_adapter_down_weight": (24, 8, 768),
        "visual_adapter_down_bias": (24, 8),
        "visual_adapter_up_unique_weight": (24, 752, 8),
        "visual_adapter_up_unique_bias": (24, 752),
        "text_adapter_down_weight": (24, 8, 512),
        "text_adapter_down_bias": (24, 8),
        "text_adapter_up_unique_weight": (24, 496, 8),
        "text_adapter_up_unique_bias": (24, 496),
        "vt_adapter_up_share_weight": (24, 16, 8),
        "vt_adapter_up_share_bias": (24, 16),
    }


def test_layers_pair_by_relative_depth() -> None:
    assert AdapterShape(B32).pairs() == [(i, i) for i in range(12)]
    assert AdapterShape(TowerDims(1024, 24, 768, 12)).pairs() == [(2 * i + 1, i) for i in range(12)]


def test_zero_up_weights_are_the_frozen_backbone(backbone: Backbone) -> None:
    shape = AdapterShape(backbone.dims)
    tensors = {name: t if "down" in name else torch.zeros_like(t) for name, t in tensors_of(shape, 3).items()}
    tokens = backbone.tokenize(["a red ball"]).ids
    torch.testing.assert_close(backbone.encode_text(tokens, shape.assemble(tensors)), backbone.encode_text(tokens))


def test_shared_rows_tie_the_towers(backbone: Backbone) -> None:
    shape = AdapterShape(backbone.dims)
    tensors = {name: t.requires_grad_() for name, t in tensors_of(shape, 4).items()}
    backbone.encode_text(backbone.tokenize(["a ball"]).ids, shape.assemble(tensors)).sum().backward()
    from_text = tensors["vt_adapter_up_share_weight"].grad
    assert from_text is not None and from_text.abs().sum() > 0
    tensors["vt_adapter_up_share_weight"].grad = None
    backbone.encode_frames(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), shape.assemble(tensors)).sum().backward()
    from_frames = tensors["vt_adapter_up_share_weight"].grad
    assert from_frames is not None and from_frames.abs().sum() > 0


POPULARITIES: dict[str, Callable[[int, np.random.Generator], list[int]]] = {
    "distinct": lambda n, rng: list(range(n)),
    "uniform": lambda n, rng: rng.integers(0, 5, n).tolist(),
    "zipf": lambda n, rng: (np.minimum(rng.zipf(1.5, n), 6) - 1).tolist(),
    "identical": lambda n, rng: [1] * n,
    "skewed": lambda n, rng: [0] * (n - 1) + [2],
}


def zoo(backbone: Backbone, count: int) -> list[Adapter | None]:
    """Adapters of different ranks, shared rows and scopes, the frozen backbone among them."""
    made: list[Adapter | None] = []
    for i in range(count):
        if i % 5 == 3:
            made.append(None)
            continue
        scope = ("both", "text", "both", "both", "vision")[i % 5]
        shape = AdapterShape(backbone.dims, (8, 4, 16)[i % 3], 16 if scope == "both" else 0, scope)  # type: ignore[arg-type]
        made.append(shape.assemble(tensors_of(shape, i)))
    return made


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_a_mixed_batch_equals_one_by_one(backbone: Backbone, popularity: str, size: int) -> None:
    rng = np.random.default_rng(size)
    adapters = zoo(backbone, max(size, 6))
    rows = [adapters[i] for i in POPULARITIES[popularity](size, rng)]
    tokens = backbone.tokenize([" ".join(["ball"] * int(rng.integers(1, 12))) for _ in range(size)]).ids
    frames = torch.from_numpy(rng.integers(0, 256, (size, 3, 64, 64), dtype=np.uint8))
    with torch.inference_mode():
        texts = torch.cat([backbone.encode_text(tokens[i : i + 1], row) for i, row in enumerate(rows)])
        images = torch.cat([backbone.encode_frames(frames[i : i + 1], row) for i, row in enumerate(rows)])
        torch.testing.assert_close(backbone.encode_text(tokens, rows), texts, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(backbone.encode_frames(frames, rows), images, atol=1e-4, rtol=1e-4)


def test_the_adapter_is_never_state_of_the_model(backbone: Backbone) -> None:
    """In any order and from threads at once, every call gives what a model fresh from its file gives with that adapter."""
    tokens, pixels = backbone.tokenize(["a red ball"]).ids, torch.full((1, 3, 64, 64), 90, dtype=torch.uint8)
    adapters = [adapter for adapter in zoo(backbone, 6) if adapter is None or (adapter.text and adapter.visual)]
    assert None in adapters and len(adapters) == 4

    def vectors(of: Backbone, adapter: Adapter | None) -> Tensor:
        with torch.inference_mode():
            return torch.cat([of.encode_text(tokens, adapter), of.encode_frames(pixels, adapter)])

    expected = [vectors(load_backbone("builtin"), adapter) for adapter in adapters]
    assert all((a - b).abs().max() > 1e-2 for i, a in enumerate(expected) for b in expected[:i]), "each changes the vectors"
    fingerprint, attributes = backbone._fingerprint(), set(vars(backbone))
    parts = {name: set(vars(part)) for name, part in backbone._model.named_modules()}
    order = np.random.default_rng(0).integers(0, len(adapters), 60).tolist()
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda which: vectors(backbone, adapters[which]), order))
    for which, rows in zip(order, found, strict=True):
        torch.testing.assert_close(rows, expected[which], atol=1e-5, rtol=1e-5)
    assert backbone._fingerprint() == fingerprint == backbone.fingerprint and set(vars(backbone)) == attributes
    assert {name: set(vars(part)) for name, part in backbone._model.named_modules()} == parts


def test_as_many_adapters_as_rows(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="2 adapters for a batch of 1 rows"):
        backbone.encode_text(backbone.tokenize(["a"]).ids, [None, None])


@pytest.mark.parametrize(
    ("rank", "shared", "scope"), [(0, 0, "both"), (8, 129, "both"), (8, -1, "both"), (8, 16, "text"), (8, 0, "audio")]
)
def test_impossible_shapes_are_refused(rank: int, shared: int, scope: str) -> None:
    with pytest.raises(ValueError, match=r"rank|shared|scope"):
        AdapterShape(SMALL, rank, shared, scope)  # type: ignore[arg-type]
