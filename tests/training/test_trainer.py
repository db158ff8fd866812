from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from adapters_store import Artifact
from backbone import VOCABULARY_ROWS, AdapterShape, Backbone, load_backbone, q_score, to_pixels
from training.dataset import ArrayClips, Dataset, InvalidDataset, Pair, pick_frames
from training.inputs import Inputs
from training.optimiser import optimiser_of, warmup_cosine
from training.progress import Progress, unheard
from training.ranks import ALONE
from training.recipe import Recipe
from training.step import Learner, backward, contrastive_loss
from training.trainer import MINIMUM_QUERIES, Rival, Stopped, Trained, TrainingDiverged, train
from training.vocabulary import Plan, plan

COLOURS = {
    "crimson": (220, 20, 40),
    "azure": (20, 120, 240),
    "lime": (120, 220, 30),
    "black": (5, 5, 5),
    "white": (250, 250, 250),
}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("builtin")


def colours(repeat: int = 6) -> Dataset:
    """Plain pictures and the words of their colours: learnt in a few steps."""
    rng = np.random.default_rng(0)
    pixels, pairs = [], []
    for i in range(repeat):
        for word, colour in COLOURS.items():
            noise = rng.normal(0, 6, (12, 3, 64, 64))
            pixels.append(np.clip(np.asarray(colour).reshape(1, 3, 1, 1) + noise, 0, 255).astype(np.uint8))
            pairs.append(Pair(len(pixels) - 1, f"zzyx {word}", f"{word}-{i}"))
    return Dataset(ArrayClips(np.stack(pixels)), tuple(pairs), {})


def equal(a: Trained, b: Trained) -> bool:
    return all(torch.equal(a.final[name], b.final[name]) for name in a.final)


RECIPE = Recipe(steps=30, batch_size=5, frames=2, learning_rate=1e-2, evaluations=2, rank=4, shared=8)


@pytest.fixture(scope="module")
def told() -> list[Progress]:
    """The events of the training below."""
    return []


@pytest.fixture(scope="module")
def plain(backbone: Backbone, told: list[Progress]) -> Trained:
    """A training that several tests look at."""
    return train(backbone, colours(), RECIPE, told.append)


def test_the_loss_falls_and_only_the_adapter_learns(told: list[Progress], plain: Trained, backbone: Backbone) -> None:
    losses = [e.facts["loss"] for e in told if e.stage == "step"]
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:3])
    assert backbone._fingerprint() == backbone.fingerprint
    assert plain.shape is not None and set(plain.tensors) == set(plain.shape.layout())
    start = RECIPE.shape(backbone.dims).initial(RECIPE.seed, start=RECIPE.start)
    assert all(not torch.equal(plain.tensors[name], start[name]) for name in start), "every tensor gets a gradient"


def test_the_first_validation_is_the_frozen_backbone_and_the_best_one_is_kept(plain: Trained) -> None:
    curve = plain.metrics["curve"]
    assert [point["step"] for point in curve] == [0, 15, 30]
    assert plain.metrics["before"]["text_to_video"] == curve[0]["text_to_video"]
    best = min(curve[1:], key=lambda point: point["log_rank"])
    assert plain.metrics["after"]["text_to_video"] == best["text_to_video"]
    assert not set(plain.metrics["data"]["validation_videos"]) & {"nothing"}


def test_a_rival_is_measured_on_the_same_captions_and_the_gain_is_over_it(
    plain: Trained, backbone: Backbone, tmp_path: Path
) -> None:
    _, adapter = plain.on(backbone)
    assert adapter is not None
    over_nothing = plain.metrics["after"]["text_to_video"]["R@1"] - plain.metrics["before"]["text_to_video"]["R@1"]
    assert plain.metrics["gain"]["mean"] == pytest.approx(over_nothing, abs=0.02)
    with pytest.raises(Stopped):
        train(backbone, colours(), RECIPE, unheard, None, Rival("a" * 64, adapter), folder=tmp_path, stop=lambda: True)
    second = train(backbone, colours(), RECIPE, unheard, None, Rival("a" * 64, adapter), folder=tmp_path)
    assert second.metrics["in_use"] == {"digest": "a" * 64, **plain.metrics["after"]}
    nothing = {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert second.metrics["gain"] == second.metrics["rank_gain"] == nothing, "the same seed, the same adapter"


def test_the_same_seed_gives_the_same_adapter(backbone: Backbone) -> None:
    recipe = Recipe(steps=3, batch_size=5, frames=2, evaluations=1)
    a, b = (train(backbone, colours(), recipe, unheard).tensors for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("scope", ["text", "vision"])
def test_an_adapter_of_one_tower_has_only_its_tensors(backbone: Backbone, scope: str) -> None:
    recipe = Recipe(steps=2, batch_size=5, frames=2, evaluations=1, scope=scope)  # type: ignore[arg-type]
    trained = train(backbone, colours(2), recipe, unheard)
    tower = {"text": "text", "vision": "visual"}[scope]
    assert {name.split("_")[0] for name in trained.tensors} <= {tower, "vocabulary"}
    assert (scope == "text") == ("vocabulary_rows" in trained.tensors)


def test_a_loss_that_is_not_finite_ends_the_run_in_words(backbone: Backbone) -> None:
    wild = Recipe(steps=50, batch_size=5, frames=2, learning_rate=1.0, gradient_clip=1e6, evaluations=1)
    shape = wild.shape(backbone.dims)
    tensors = {name: t * 1e30 for name, t in shape.initial(0, start="small").items()}
    start = Artifact("", backbone.fingerprint, shape, tensors)
    with pytest.raises(TrainingDiverged, match="try a lower learning rate"):
        train(backbone, colours(2), wild, unheard, start)


def test_one_training_video_is_told(backbone: Backbone) -> None:
    pairs = (Pair(0, "a", "v0"), Pair(1, "b", "v1"))
    with pytest.raises(InvalidDataset, match="at least 2 captioned training videos"):
        train(backbone, Dataset(ArrayClips(np.zeros((2, 12, 3, 64, 64), np.uint8)), pairs, {}), Recipe(steps=1), unheard)


def test_the_schedule_warms_up_then_falls_to_zero() -> None:
    factors = [warmup_cosine(step, 100, 0.1) for step in range(101)]
    assert factors[0] < 0.2
    assert max(factors) <= 1.0
    assert factors.index(max(factors)) in range(9, 12)
    assert factors[100] == pytest.approx(0, abs=1e-6)
    assert all(b <= a for a, b in pairwise(factors[11:]))


def test_picked_frames_come_one_from_each_slice_in_order() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        picked = pick_frames(2, 12, 4, rng)
        assert all(3 * i <= frame < 3 * i + 3 for row in picked for i, frame in enumerate(row))
    assert pick_frames(1, 12, 12, rng).tolist() == [list(range(12))]


def test_captions_that_are_all_the_same_are_told(backbone: Backbone) -> None:
    data = colours()
    same = Dataset(data.clips, tuple(Pair(p.clip, "a video", p.video) for p in data.pairs), {})
    with pytest.raises(InvalidDataset, match="all training captions are the same"):
        train(backbone, same, RECIPE, unheard)


@pytest.mark.parametrize(
    "change",
    [{"micro_batch": 2}, {"micro_batch": 3, "recompute": True}, {"recompute": True}],
    ids=["gradient caching", "uneven parts", "recomputed activations"],
)
def test_less_memory_gives_the_same_adapter(backbone: Backbone, change: dict[str, Any]) -> None:
    recipe = RECIPE.model_copy(update=dict(steps=3))
    whole = train(backbone, colours(), recipe, unheard)
    small = train(backbone, colours(), recipe.model_copy(update=change), unheard)
    for name in whole.final:
        torch.testing.assert_close(small.final[name], whole.final[name], atol=2e-5, rtol=1e-3)


def test_a_run_that_was_stopped_goes_on_to_the_same_weights_and_losses(backbone: Backbone, tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update=dict(steps=12, evaluations=3))
    whole = train(backbone, colours(), recipe, unheard)
    steps: list[int] = []
    events: list[Progress] = []

    def note(event: Progress) -> None:
        events.append(event)
        if event.stage == "step":
            steps.append(int(event.done))

    for after in (5, 7):
        with pytest.raises(Stopped):
            train(backbone, colours(), recipe, note, folder=tmp_path, stop=lambda after=after: steps[-1] == after)  # type: ignore[misc]
    resumed = train(backbone, colours(), recipe, note, folder=tmp_path)
    assert steps == list(range(1, 13)), "no step is done twice"
    assert [e.done for e in events if e.stage == "resumed"] == [5, 7]
    assert equal(resumed, whole)
    assert resumed.metrics == whole.metrics


def test_a_checkpoint_of_another_run_is_not_gone_on_from(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(backbone, colours(), RECIPE, unheard, folder=tmp_path, stop=lambda: True)
    other = RECIPE.model_copy(update=dict(steps=2, seed=7))
    assert equal(train(backbone, colours(), other, unheard, folder=tmp_path), train(backbone, colours(), other, unheard))


def test_a_full_disk_leaves_the_checkpoint_before(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Stopped):
        train(backbone, colours(), RECIPE, unheard, folder=tmp_path, stop=lambda: True)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("training.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        train(backbone, colours(), RECIPE, unheard, folder=tmp_path, stop=lambda: True)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.safetensors"]


@pytest.mark.parametrize("last", [1, 2, 3])
def test_only_the_last_layers_learn_and_their_cached_prefix_changes_nothing(
    backbone: Backbone, tmp_path: Path, last: int
) -> None:
    recipe = RECIPE.model_copy(update=dict(steps=3, layers=last, vocabulary="off"))
    cached = train(backbone, colours(), recipe, unheard, scratch=tmp_path)
    for name, tensor in train(backbone, colours(), recipe, unheard).final.items():
        torch.testing.assert_close(cached.final[name], tensor, atol=2e-5, rtol=1e-3)
    shape = recipe.shape(backbone.dims)
    first = shape.first_rows(last)
    assert all(not tensor[: first[name]].any() for name, tensor in cached.final.items())
    assert all(tensor[first[name] :].any() for name, tensor in cached.final.items() if first[name] < len(tensor))
    adapter = shape.assemble(cached.final)
    pixels = torch.from_numpy(colours(1).clips.pixels([0])[0, :2])
    visual, text = shape.first_layers(last)
    with torch.inference_mode():
        prefix = backbone.frame_prefix(pixels, visual)
        whole, shortcut = backbone.encode_frames(pixels, adapter), backbone.encode_frames(prefix, adapter)
        torch.testing.assert_close(shortcut, whole, atol=1e-5, rtol=1e-4)
        tokens = backbone.tokenize(["zzyx lime", "a much longer text than that"]).ids
        prefix = backbone.text_prefix(tokens, text)
        torch.testing.assert_close(
            backbone.encode_text(tokens, adapter, prefix=prefix), backbone.encode_text(tokens, adapter), atol=1e-5, rtol=1e-4
        )


def test_full_fine_tuning_changes_a_copy_and_leaves_the_backbone(backbone: Backbone, tmp_path: Path) -> None:
    before = backbone._fingerprint()
    recipe = RECIPE.model_copy(update=dict(method="full", learning_rate=1e-3))
    losses: list[float] = []
    trained = train(backbone, colours(), recipe, lambda e: losses.append(e.facts["loss"]) if e.stage == "step" else None)
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:3])
    assert backbone._fingerprint() == before
    assert trained.shape is None
    assert sum(t.numel() for t in trained.final.values()) == backbone.parameters - 1, "all but logit_scale"
    save_file({name: tensor.contiguous() for name, tensor in trained.tensors.items()}, tmp_path / "weights.safetensors")
    loaded = load_backbone("builtin", str(tmp_path / "weights.safetensors"))
    tokens = backbone.tokenize(["zzyx lime"]).ids
    tuned, adapter = trained.on(backbone)
    assert adapter is None
    with torch.inference_mode():
        torch.testing.assert_close(loaded.encode_text(tokens), tuned.encode_text(tokens))
        assert not torch.allclose(loaded.encode_text(tokens), backbone.encode_text(tokens))


def test_half_precision_gives_nearly_the_gradient_of_single_precision(backbone: Backbone) -> None:
    gradients = []
    for precision in ("float32", "bfloat16"):
        recipe = RECIPE.model_copy(update=dict(precision=precision, batch_size=3, frames=1))
        shape, data = recipe.shape(backbone.dims), colours(1)
        tensors = {name: tensor.requires_grad_() for name, tensor in shape.initial(0).items()}
        learner = Learner(backbone, shape, tensors, recipe)
        inputs = Inputs(backbone, data.clips, data.pairs[:3], recipe, ALONE, (0, 0), None)
        backward(learner, inputs.parts(1), inputs.clips_of(1), (0, 0), ALONE)
        assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in tensors.values())
        gradients.append(torch.cat([t.grad.flatten() for t in tensors.values() if t.grad is not None]))
    assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.98


def test_two_captions_of_one_clip_in_a_batch_are_not_each_others_negatives() -> None:
    rng = torch.Generator().manual_seed(0)
    texts, frames = torch.randn(3, 8, generator=rng), torch.randn(3, 2, 8, generator=rng)
    frames[2] = frames[0]
    loss = contrastive_loss(texts, frames, torch.tensor([5, 6, 5]), 10.0, RECIPE)
    rows = [10.0 * q_score(texts, frames, RECIPE.temperature), 10.0 * q_score(texts, frames, RECIPE.temperature).T]
    allowed = {0: (0, 1), 1: (0, 1, 2), 2: (1, 2)}
    naive = [torch.logsumexp(side[i, list(js)], 0) - side[i, i] for side in rows for i, js in allowed.items()]
    torch.testing.assert_close(loss, torch.stack(naive).mean())


def test_adam_without_bias_correction_is_its_equation() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, requires_grad=True)
    optimiser = optimiser_of({"x_weight": x}, Recipe(bias_correction=False, learning_rate=0.1, weight_decay=0.2))
    expected, m, v = x.detach().clone(), torch.zeros(3, 2), torch.zeros(3, 2)
    for step in range(4):
        x.grad = torch.full_like(x, step - 1.5)
        m, v = 0.9 * m + 0.1 * x.grad, 0.98 * v + 0.02 * x.grad**2
        expected -= 0.1 * (m / (v.sqrt() + 1e-6) + 0.2 * expected)
        optimiser.step()
        torch.testing.assert_close(x.detach(), expected)


def test_a_run_of_one_step_has_one(backbone: Backbone) -> None:
    trained = train(backbone, colours(2), RECIPE.model_copy(update=dict(steps=1)), unheard)
    assert [point["step"] for point in trained.metrics["curve"]] == [0, 1]


def test_few_held_out_queries_are_no_evidence_and_folds_tell_more(backbone: Backbone) -> None:
    """With 30 captions 4 are held out: the folds ask all 30, at the price of as many steps again."""
    events: list[Progress] = []
    recipe = RECIPE.model_copy(update=dict(steps=10))
    trained = train(backbone, colours(), recipe, events.append, folds=5)
    alone = train(backbone, colours(), recipe, unheard)
    assert trained.metrics["not_enough_evidence"] is alone.metrics["not_enough_evidence"] is True
    assert trained.metrics["after"]["text_to_video"]["queries"] < MINIMUM_QUERIES
    crossed = trained.metrics["cross_validation"]
    assert (crossed["folds"], crossed["steps"], crossed["queries"], crossed["videos"]) == (5, 2, 30, 30)
    change = crossed["after"]["text_to_video"]["R@1"] - crossed["before"]["text_to_video"]["R@1"]
    assert crossed["gain"]["low"] <= crossed["gain"]["mean"] == pytest.approx(change, abs=0.02)
    assert equal(trained, alone), "the folds change nothing about the adapter"
    assert {e.facts["work"] for e in events if e.stage == "step"} == {20}


def test_enough_held_out_queries_need_no_folds(backbone: Backbone) -> None:
    many = colours()
    pairs = tuple(Pair(pair.clip, f"{pair.text} {i}", pair.video) for pair in many.pairs for i in range(10))
    trained = train(backbone, replace(many, pairs=pairs), RECIPE.model_copy(update=dict(steps=2)), unheard, folds=5)
    assert trained.metrics["after"]["text_to_video"]["queries"] >= MINIMUM_QUERIES
    assert not {"not_enough_evidence", "cross_validation"} & set(trained.metrics)


def test_a_run_whose_time_is_over_ends_with_the_best_that_it_has(backbone: Backbone, tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update=dict(steps=1_000_000))
    with pytest.raises(Stopped):
        train(backbone, colours(2), recipe, unheard, folder=tmp_path, stop=lambda: True)
    trained = train(backbone, colours(2), recipe, unheard, folder=tmp_path, seconds=1e-9)
    assert trained.metrics["timed_out"] == {"steps": trained.metrics["steps"], "of": 1_000_000}
    assert trained.metrics["steps"] <= 2 and trained.metrics["best_step"] == trained.metrics["steps"]
    assert set(trained.tensors) == set(recipe.shape(backbone.dims).layout())


# --- vocabulary rows


def trained_on_colours(backbone: Backbone, **fields: Any) -> Trained:
    recipe = Recipe(**{"steps": 8, "batch_size": 5, "frames": 2, "evaluations": 1, "learning_rate": 1e-2, **fields})
    return train(backbone, colours(), recipe, unheard)


def test_the_words_of_the_captions_get_rows_and_are_named(backbone: Backbone) -> None:
    trained = trained_on_colours(backbone)
    assert trained.shape is not None
    told = [pair.text for pair in colours().split(0.2).train]
    ids = backbone.tokenize(told).ids
    texts = {token for row, length in zip(ids.tolist(), backbone.lengths(ids).tolist(), strict=True) for token in row[:length]}
    assert set(trained.shape.vocabulary) <= texts
    assert set(COLOURS) <= set(trained.words) <= {*COLOURS, "zzyx"}
    rows = trained.tensors["vocabulary_rows"]
    assert rows.shape == (len(trained.shape.vocabulary), 128) and bool((rows.norm(dim=1) > 0).all())
    assert not trained_on_colours(backbone, vocabulary="off").words
    assert Recipe.of({"preset": "paper"}).vocabulary == "off"


def test_a_row_learns_in_the_measure_in_which_its_word_is_unknown(backbone: Backbone) -> None:
    """Captions that the frozen backbone tells apart get the least rate, those that it does not tell apart the full one."""
    from demo.worlds import scenes

    def of(world: str) -> Plan:
        drawn = scenes(world, 24, 5)
        frames = [[to_pixels(Image.fromarray(s.frame(s.duration / 2)), 64)] for s in drawn]
        pairs = [Pair(i, s.captions[0], f"v{i}") for i, s in enumerate(drawn)]
        recipe = Recipe(batch_size=12)
        return plan(backbone, recipe.shape(backbone.dims), ArrayClips(np.asarray(frames)), pairs, recipe)

    known, unknown = of("daylight"), of("nightwatch")
    assert max(known.rates) < 0.2 < min(unknown.rates)
    assert np.mean(unknown.rates) > 0.9 and max(unknown.rates) == 1.0


def test_so_many_rows_as_asked_for_and_none_of_a_token_that_is_in_one_pair_alone(backbone: Backbone) -> None:
    data = colours()
    odd = replace(data, pairs=(replace(data.pairs[0], text="zzyx crimson flamingo"), *data.pairs[1:]))
    recipe = Recipe(batch_size=5)

    def found(vocabulary: Any) -> tuple[int, ...]:
        asked = recipe.model_copy(update={"vocabulary": vocabulary})
        return plan(backbone, recipe.shape(backbone.dims), odd.clips, odd.pairs, asked).ids

    flamingo = set(backbone.tokenize(["flamingo"]).ids[0, 1:-1].tolist()) - {0, 49407}
    assert flamingo and not flamingo & set(found("auto")) and flamingo <= set(found(100))
    assert len(found(3)) == 3 and set(found(3)) <= set(found(100)) and list(found(100)) == sorted(found(100))
    assert found("off") == ()


def test_a_rare_word_gets_its_row_though_not_every_caption_is_judged(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = colours()
    recipe = Recipe(batch_size=5)
    shape = recipe.shape(backbone.dims)
    whole = plan(backbone, shape, data.clips, data.pairs, recipe)
    monkeypatch.setattr("training.vocabulary.ASKED", 2)
    few = plan(backbone, shape, data.clips, data.pairs, recipe)
    assert few.ids == whole.ids and len(few.rates) == len(few.ids)


def test_a_continued_adapters_words_come_first_where_there_is_no_room_for_all() -> None:
    full = Plan(tuple(range(VOCABULARY_ROWS)), (1.0,) * VOCABULARY_ROWS).with_ids((3, 9000))
    assert len(full.ids) == len(full.rates) == VOCABULARY_ROWS and list(full.ids) == sorted(full.ids)
    assert {3, 9000} <= set(full.ids) and full.rates[full.ids.index(9000)] < full.rates[full.ids.index(3)] == 1.0


def test_an_adapter_that_is_continued_keeps_the_words_that_it_knows(backbone: Backbone) -> None:
    shape = AdapterShape(backbone.dims, vocabulary=(7, 400))
    tensors = {**shape.initial(0), "vocabulary_rows": torch.randn(2, 128)}
    start = Artifact("0" * 64, backbone.fingerprint, shape, tensors)
    recipe = Recipe(steps=1, batch_size=5, frames=2, evaluations=1, learning_rate=1e-8)
    trained = train(backbone, colours(), recipe, unheard, start)
    assert trained.shape is not None and trained.shape.vocabulary == (7, 400), "rows that have not moved are dropped"
    torch.testing.assert_close(trained.tensors["vocabulary_rows"], tensors["vocabulary_rows"])
