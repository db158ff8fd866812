"""The whole forward of both towers with adapters against the paper's equations, written out with loops in float64.

Nothing of ours computes the reference: it reads the tensors of the released layout and open_clip's raw weights by name, and
goes block by block, sample by sample, token by token and head by head. The outputs are O(1), so that the tolerance of 1e-5
holds absolutely, and relative to the reference's norm too.
"""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor

from adapters_store import from_official
from backbone import AdapterShape, Backbone, TowerDims, load_backbone, mean_pool, q_score

TOLERANCE = 1e-5
B32 = TowerDims(visual_width=768, visual_layers=12, text_width=512, text_layers=12)
HEAD = 64  # features of an attention head, in both towers
VOCABULARY = 1000


def released(r: int, d_s: int, layers: int, seed: int = 0, d_v: int = 768, d_t: int = 512) -> dict[str, Tensor]:
    """A trained-looking adapter in the released layout, as FACTS gives it: float16, biases that are not zero."""
    places = 2 * layers
    shapes = {
        "visual_adapter_down_weight": (places, r, d_v),
        "visual_adapter_down_bias": (places, r),
        "visual_adapter_up_unique_weight": (places, d_v - d_s, r),
        "visual_adapter_up_unique_bias": (places, d_v - d_s),
        "text_adapter_down_weight": (places, r, d_t),
        "text_adapter_down_bias": (places, r),
    }
    if d_s < d_t:
        shapes["text_adapter_up_unique_weight"] = (places, d_t - d_s, r)
        shapes["text_adapter_up_unique_bias"] = (places, d_t - d_s)
    if d_s > 0:
        shapes["vt_adapter_up_share_weight"] = (places, d_s, r)
        shapes["vt_adapter_up_share_bias"] = (places, d_s)
    generator = torch.Generator().manual_seed(seed)
    return {f"clip.{name}": (0.1 * torch.randn(size, generator=generator)).half() for name, size in shapes.items()}


class Paper:
    """The paper's forward for one checkpoint, in float64; every vector is one token of one sample."""

    def __init__(self, model: torch.nn.Module, adapter: dict[str, Tensor]) -> None:
        self.w = {name: tensor.double() for name, tensor in model.state_dict().items()}
        self.a = {name.removeprefix("clip."): tensor.double() for name, tensor in adapter.items()}

    def adapted(self, h: Tensor, tower: str, place: int) -> Tensor:
        """A(h) = h + up(act(down(h))): the first features from the tower's own rows, the last from the shared ones."""
        a = self.a
        z = a[f"{tower}_adapter_down_weight"][place] @ h + a[f"{tower}_adapter_down_bias"][place]
        z = z / (1 + torch.exp(-1.702 * z))
        own = f"{tower}_adapter_up_unique"
        names = [name for name in (own, "vt_adapter_up_share") if f"{name}_weight" in a]
        weight = torch.cat([a[f"{name}_weight"][place] for name in names])
        bias = torch.cat([a[f"{name}_bias"][place] for name in names])
        return h + weight @ z + bias

    def norm(self, x: Tensor, name: str) -> Tensor:
        variance = ((x - x.mean()) ** 2).mean()
        return (x - x.mean()) / (variance + 1e-5).sqrt() * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]  # type: ignore[no-any-return]

    def attention(self, xs: list[Tensor], name: str, causal: bool) -> list[Tensor]:
        d = len(xs[0])
        qkv = [self.w[f"{name}.in_proj_weight"] @ x + self.w[f"{name}.in_proj_bias"] for x in xs]
        outs = []
        for i in range(len(xs)):
            seen = range(i + 1) if causal else range(len(xs))
            heads = []
            for start in range(0, d, HEAD):
                q = qkv[i][start : start + HEAD]
                scores = torch.stack([q @ qkv[j][d + start : d + start + HEAD] / math.sqrt(HEAD) for j in seen])
                weights = torch.exp(scores - scores.max())
                weights = weights / weights.sum()
                heads.append(sum(w * qkv[j][2 * d + start : 2 * d + start + HEAD] for w, j in zip(weights, seen, strict=True)))
            outs.append(self.w[f"{name}.out_proj.weight"] @ torch.cat(heads) + self.w[f"{name}.out_proj.bias"])
        return outs

    def mlp(self, x: Tensor, name: str, act: Callable[[Tensor], Tensor]) -> Tensor:
        hidden = act(self.w[f"{name}.c_fc.weight"] @ x + self.w[f"{name}.c_fc.bias"])
        return self.w[f"{name}.c_proj.weight"] @ hidden + self.w[f"{name}.c_proj.bias"]  # type: ignore[no-any-return]

    def blocks(self, xs: list[Tensor], tower: str, layers: int, quick: bool) -> list[Tensor]:
        prefix = "visual.transformer" if tower == "visual" else "transformer"
        act = (lambda h: h / (1 + torch.exp(-1.702 * h))) if quick else (lambda h: 0.5 * h * (1 + torch.erf(h / math.sqrt(2))))
        for layer in range(layers):
            block = f"{prefix}.resblocks.{layer}"
            normed = [self.norm(x, f"{block}.ln_1") for x in xs]
            attended = self.attention(normed, f"{block}.attn", causal=tower == "text")
            xs = [x + self.adapted(h, tower, 2 * layer) for x, h in zip(xs, attended, strict=True)]
            xs = [
                x + self.adapted(self.mlp(self.norm(x, f"{block}.ln_2"), f"{block}.mlp", act), tower, 2 * layer + 1) for x in xs
            ]
        return xs

    def frame(self, pixels: Tensor, layers: int, quick: bool) -> Tensor:
        kernel = self.w["visual.conv1.weight"]  # (d, 3, P, P)
        patch = kernel.shape[-1]
        xs = [self.w["visual.class_embedding"]]
        for y in range(0, pixels.shape[1], patch):
            for x in range(0, pixels.shape[2], patch):
                xs.append(kernel.flatten(1) @ pixels[:, y : y + patch, x : x + patch].double().flatten())
        xs = [self.norm(x + p, "visual.ln_pre") for x, p in zip(xs, self.w["visual.positional_embedding"], strict=True)]
        xs = self.blocks(xs, "visual", layers, quick)
        return self.norm(xs[0], "visual.ln_post") @ self.w["visual.proj"]  # type: ignore[no-any-return]

    def text(self, tokens: list[int], layers: int, quick: bool) -> Tensor:
        xs = [self.w["token_embedding.weight"][t] + self.w["positional_embedding"][i] for i, t in enumerate(tokens)]
        xs = self.blocks(xs, "text", layers, quick)
        return self.norm(xs[tokens.index(max(tokens))], "ln_final") @ self.w["text_projection"]  # type: ignore[no-any-return]


def small(quick: bool = True, layers: int = 3) -> Backbone:
    """ViT-B/32's widths, few layers, 5 tokens an image; every weight random, none left at 0 or 1 by the initialisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        vision = CLIPVisionCfg(layers=layers, width=768, patch_size=32, image_size=64)
        text = CLIPTextCfg(context_length=12, vocab_size=VOCABULARY, width=512, heads=8, layers=layers)
        model = CLIP(512, vision, text, quick_gelu=quick)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name != "logit_scale":
                    weight += 0.02 * torch.randn_like(weight)
    return Backbone("small", model, None, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))


@pytest.fixture(scope="module")
def backbone() -> Iterator[Backbone]:
    yield small()


def equal(ours: Tensor, theirs: Tensor) -> None:
    assert 0.5 < theirs.abs().max() < 20, "values of O(1), for which an absolute tolerance means something"
    assert (ours.double() - theirs).abs().max() <= TOLERANCE
    assert (ours.double() - theirs).norm() <= TOLERANCE * theirs.norm()


def frames_and_tokens() -> tuple[Tensor, Tensor]:
    """Two normalised frames, and texts that end at different places, with padding after their ends."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, VOCABULARY - 2, (3, 12), generator=generator)
    for row, end in enumerate((1, 11, 6)):
        tokens[row, end] = VOCABULARY - 1
        tokens[row, end + 1 :] = 0
    return torch.randn(2, 3, 64, 64, generator=generator), tokens


@pytest.mark.parametrize("r", [8, 16])
@pytest.mark.parametrize("d_s", [0, 8, 16, 64, 512])
def test_both_towers_compute_the_paper_s_equations(backbone: Backbone, r: int, d_s: int) -> None:
    checkpoint = released(r, d_s, layers=3, seed=r + d_s)
    shape, tensors, _ = from_official(checkpoint, backbone.dims)
    adapter = shape.assemble(tensors)
    paper = Paper(backbone._model, checkpoint)
    pixels, tokens = frames_and_tokens()
    with torch.inference_mode():
        equal(backbone.encode_frames(pixels, adapter), torch.stack([paper.frame(p, 3, quick=True) for p in pixels]))
        equal(backbone.encode_text(tokens, adapter), torch.stack([paper.text(t.tolist(), 3, quick=True) for t in tokens]))
        assert (backbone.encode_text(tokens, adapter) - backbone.encode_text(tokens)).abs().max() > 0.1, "it changes much"


def test_a_batch_of_different_released_adapters_computes_each_row_s_equations(backbone: Backbone) -> None:
    checkpoints = [released(8, 16, 3, seed=1), released(16, 512, 3, seed=2), released(8, 0, 3, seed=3)]
    adapters = [shape.assemble(tensors) for shape, tensors, _ in (from_official(c, backbone.dims) for c in checkpoints)]
    _, tokens = frames_and_tokens()
    papers = [Paper(backbone._model, checkpoint) for checkpoint in checkpoints]
    with torch.inference_mode():
        theirs = torch.stack([paper.text(t.tolist(), 3, quick=True) for paper, t in zip(papers, tokens, strict=True)])
        equal(backbone.encode_text(tokens, adapters), theirs)


def test_a_backbone_with_the_plain_gelu_keeps_the_quick_one_in_its_adapters() -> None:
    backbone = small(quick=False, layers=2)
    checkpoint = released(8, 16, layers=2)
    shape, tensors, _ = from_official(checkpoint, backbone.dims)
    paper = Paper(backbone._model, checkpoint)
    pixels, tokens = frames_and_tokens()
    with torch.inference_mode():
        ours = backbone.encode_frames(pixels[:1], shape.assemble(tensors))
        equal(ours, paper.frame(pixels[0], 2, quick=False)[None])
        ours = backbone.encode_text(tokens[:1], shape.assemble(tensors))
        equal(ours, paper.text(tokens[0].tolist(), 2, quick=False)[None])


@pytest.mark.slow
def test_the_paper_s_backbone_and_adapter() -> None:
    """ViT-B/32 as it is, with random weights; r 8, d_s 16."""
    backbone = load_backbone("ViT-B-32-quickgelu", "random")
    checkpoint = released(8, 16, layers=12)
    shape, tensors, source = from_official(checkpoint, backbone.dims)
    assert (backbone.dims, source, shape.parameters) == (B32, "float16", 519_168)
    paper = Paper(backbone._model, checkpoint)
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(5))
    tokens = backbone.tokenize(["a dog runs through the snow"]).ids
    with torch.inference_mode():
        adapter = shape.assemble(tensors)
        equal(backbone.encode_frames(pixels, adapter), paper.frame(pixels[0], 12, quick=True)[None])
        equal(backbone.encode_text(tokens, adapter), paper.text(tokens[0, :12].tolist(), 12, quick=True)[None])


def naive_scores(texts: Tensor, frames: Tensor, temperature: float | None) -> Tensor:
    """cosine(t, Σ_f w_f · v_f) number by number: w = softmax of ⟨t, v_f⟩ / temperature, or 1 / F where it is None."""
    scores = torch.empty(len(texts), len(frames), dtype=torch.float64)
    for i, text in enumerate(texts.tolist()):
        for j, video in enumerate(frames.tolist()):
            dots = [math.fsum(map(math.prod, zip(text, frame, strict=True))) for frame in video]
            logits = [0.0 if temperature is None else dot / temperature for dot in dots]
            powers = [math.exp(logit - max(logits)) for logit in logits]
            weights = [power / sum(powers) for power in powers]
            pooled = [math.fsum(map(math.prod, zip(weights, feature, strict=True))) for feature in zip(*video, strict=True)]
            dot = math.fsum(map(math.prod, zip(text, pooled, strict=True)))
            scores[i, j] = dot / (math.hypot(*text) * math.hypot(*pooled))
    return scores


@pytest.mark.parametrize("scale", [0.1, 0.4, 3.0])  # frames weigh nearly the same, differently, and one alone
def test_the_similarities_are_the_paper_s(scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    texts, frames = (scale * torch.randn(size, generator=generator) for size in ((4, 128), (3, 12, 128)))
    assert (q_score(texts, frames).double() - naive_scores(texts, frames, 5)).abs().max() <= TOLERANCE
    assert (mean_pool(texts, frames).double() - naive_scores(texts, frames, None)).abs().max() <= TOLERANCE


def test_the_similarities_of_encoded_videos_are_the_paper_s(backbone: Backbone) -> None:
    checkpoint = released(8, 16, layers=3)
    shape, tensors, _ = from_official(checkpoint, backbone.dims)
    adapter, paper = shape.assemble(tensors), Paper(backbone._model, checkpoint)
    pixels, tokens = frames_and_tokens()
    with torch.inference_mode():
        ours = q_score(backbone.encode_text(tokens, adapter), backbone.encode_frames(pixels, adapter)[None])
        texts = torch.stack([paper.text(t.tolist(), 3, quick=True) for t in tokens])
        frames = torch.stack([paper.frame(p, 3, quick=True) for p in pixels])[None]
    assert (ours.double() - naive_scores(texts, frames, 5)).abs().max() <= TOLERANCE
    assert backbone.logit_scale == pytest.approx(math.exp(float(backbone._model.state_dict()["logit_scale"])))


@pytest.mark.parametrize(
    ("data_set", "r", "d_s", "parameters", "printed"),
    [
        ("MSR-VTT", 8, 16, 519_168, 0.52),
        ("MSVD", 16, 16, 1_008_000, 1.00),
        ("VATEX", 16, 64, 988_416, 0.99),
        ("DiDeMo", 8, 8, 520_896, 0.52),
        ("ActivityNet", 16, 512, 805_632, 0.81),
    ],
)
def test_parameters_are_as_many_as_the_paper_prints(data_set: str, r: int, d_s: int, parameters: int, printed: float) -> None:
    """Millions to two decimals; the paper cuts MSVD's 1.008 off where it rounds the others."""
    assert AdapterShape(B32, r, d_s).parameters == parameters
    assert sum(tensor.numel() for tensor in released(r, d_s, layers=12).values()) == parameters
    assert abs(parameters / 1e6 - printed) < 0.01
