"""What users said of hits in a training: clicks are pairs, what they rejected is pushed down, and the gate sees neither."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_trainer import colours

from backbone import Backbone, load_backbone, q_score
from training.dataset import ArrayClips, Dataset, Pair, falls_out, load_dataset
from training.evaluation import encode_clips, encode_texts
from training.feedback import Feedback
from training.progress import unheard
from training.recipe import Recipe
from training.step import contrastive_loss, judged_loss
from training.trainer import Trained, train

RECIPE = Recipe(steps=8, batch_size=5, frames=2, learning_rate=1e-2, evaluations=1, rank=4, shared=8, vocabulary="off")
DATA = colours(3)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("builtin")


@pytest.fixture(scope="module")
def plain(backbone: Backbone) -> Trained:
    return train(backbone, DATA, RECIPE, unheard)


def scores(backbone: Backbone, trained: Trained, text: str) -> dict[str, float]:
    """The score of each training video for a text, best first."""
    model, adapter = trained.on(backbone)
    pairs = DATA.split(RECIPE.validation).train
    with torch.inference_mode():
        frames = encode_clips(model, adapter, DATA.clips, [pair.clip for pair in pairs])
        found = q_score(encode_texts(model, adapter, [text]), frames)[0].tolist()
    return dict(sorted(zip([pair.video for pair in pairs], found, strict=True), key=lambda each: -each[1]))


def equal(a: Trained, b: Trained) -> bool:
    return all(torch.equal(a.final[name], b.final[name]) for name in a.final)


@pytest.mark.parametrize("text", ["zzyx azure", "a night without stars"], ids=["with a pair", "without one"])
def test_a_rejected_video_is_pushed_down(backbone: Backbone, plain: Trained, text: str) -> None:
    """The hit that was wrong: the best video of another colour. Told so, the training ranks it lower than it had."""
    before = scores(backbone, plain, text)
    worst = next(video for video in before if not text.endswith(video.split("-")[0]))
    (clip,) = [pair.clip for pair in DATA.pairs if pair.video == worst]
    told = train(backbone, replace(DATA, rejected=(Pair(clip, text, worst, True),)), RECIPE, unheard)
    after = scores(backbone, told, text)
    assert after[worst] < before[worst] - 0.02
    assert list(after).index(worst) > list(before).index(worst)
    assert told.metrics["data"]["feedback"] == {"relevant": 0, "irrelevant": 1}


def test_a_clicked_video_rises_and_weight_0_is_as_if_nobody_had_spoken(backbone: Backbone, plain: Trained) -> None:
    text = "a night without stars"
    black = next(pair for pair in DATA.split(RECIPE.validation).train if "black" in pair.text)
    spoken = replace(DATA, clicked=(Pair(black.clip, text, black.video, True),))
    told = train(backbone, spoken, RECIPE, unheard)
    assert scores(backbone, told, text)[black.video] > scores(backbone, plain, text)[black.video] + 0.02
    assert equal(train(backbone, spoken, RECIPE.model_copy(update={"feedback": 0.0}), unheard), plain)
    assert Recipe.of({"preset": "paper"}).feedback == 0


def test_gradient_caching_carries_hard_negatives_too(backbone: Backbone) -> None:
    lime = DATA.pairs[2]
    texts = ("zzyx crimson", "zzyx azure", "something else")
    spoken = replace(DATA, rejected=tuple(Pair(lime.clip, text, lime.video, True) for text in texts))
    one = RECIPE.model_copy(
        update={"steps": 1}
    )  # where a gradient is next to nothing, Adam makes further steps of its rounding
    whole, parts = (train(backbone, spoken, one.model_copy(update={"micro_batch": m}), unheard) for m in (None, 2))
    without = train(backbone, DATA, one, unheard)
    name = "text_adapter_up_unique_weight"
    off, moved = ((each.final[name] - whole.final[name]).abs().mean() for each in (parts, without))
    assert off < 1e-7 and off < moved / 100


def test_the_loss_is_its_equation() -> None:
    """Rows: a caption, a click of the same video, a second hit of the click's query, another caption; then the hard negatives:
    one of the click's query, one of a text that has no pair."""
    recipe = Recipe(feedback=0.5)
    pairs = [Pair(0, "a", "v0"), Pair(1, "q", "v0", True), Pair(2, "q", "v2", True), Pair(3, "d", "v3")]
    rejected = [Pair(4, "q", "v4", True), Pair(3, "alone", "v3", True)]
    feedback = Feedback.of(pairs, rejected, recipe)
    assert feedback is not None and feedback.lone == rejected[1:]
    rng = torch.Generator().manual_seed(0)
    texts, frames = torch.randn(6, 8, generator=rng), torch.randn(6, 2, 8, generator=rng)
    clips = torch.tensor([0, 1, 2, 3])
    s = 10.0 * q_score(texts, frames, recipe.temperature)
    against = {
        0: (0, 2, 3),
        1: (1, 3),
        2: (2, 0, 3),
        3: (3, 0, 1, 2),
    }  # (text, clips): 0 and 1 are of one video, 1 and 2 of one query
    expected = 0.0
    for row, weight in enumerate((1.0, 0.5, 0.5, 1.0)):
        forth = [s[row, j] for j in against[row]] + ([s[row, 4] + math.log(0.5)] if row in (1, 2) else [])
        back = [s[i, row] for i in range(4) if row in against[i]]
        expected += weight * sum(float(torch.logsumexp(torch.stack(side), 0) - s[row, row]) for side in (forth, back)) / 2
    others = [s[5, j] for j in (0, 1, 2)]  # not the clip that was rejected
    everything = torch.stack([*others, s[5, 5] + math.log(0.5)])
    expected += float(torch.logsumexp(everything, 0) - torch.logsumexp(torch.stack(others), 0))
    loss = judged_loss(texts, frames, clips, 10.0, recipe, feedback.judge(pairs, rejected))
    assert float(loss) == pytest.approx(expected / 4, rel=1e-5)
    plain = [replace(pair, clicked=False, text=pair.video, video=str(i)) for i, pair in enumerate(pairs)]
    judged = feedback.judge(plain, [])
    assert torch.equal(
        judged_loss(texts[:4], frames[:4], clips, 10.0, recipe, judged),
        contrastive_loss(texts[:4], frames[:4], clips, 10.0, recipe),
    )


def test_hard_negatives_leave_room_for_each_other() -> None:
    pairs = [Pair(i, f"t{i % 2}", f"v{i}") for i in range(16)]
    rejected = [Pair(100 + i, "t0" if i < 50 else f"alone {i}", f"w{i}", True) for i in range(100)]
    feedback = Feedback.of(pairs, rejected, RECIPE)
    assert feedback is not None
    found = feedback.negatives(3, pairs)
    assert [pair.text == "t0" for pair in found] == [True, True, False, False] and found == feedback.negatives(3, pairs)
    assert {pair.clip for step in range(200) for pair in feedback.negatives(step, pairs)} == {pair.clip for pair in rejected}
    assert all(pair.text != "t0" for pair in feedback.negatives(1, pairs[1::2])), "only of texts of the batch, or of none"


def test_feedback_is_never_held_out_and_nothing_of_a_held_out_video_is_trained_on() -> None:
    pairs = tuple(Pair(v, f"caption of {v}", f"vid_{v}") for v in range(50))
    spoken = tuple(Pair(v, f"query {v}", f"vid_{v}", True) for v in range(80))  # 30 of videos without a caption
    data = Dataset(ArrayClips(np.zeros((80, 12, 3, 8, 8), np.uint8)), pairs, {}, spoken, spoken)
    split, alone = data.split(0.2), Dataset(data.clips, pairs, {}).split(0.2)
    assert (split.train, split.validation) == (alone.train, alone.validation)
    held = {pair.video for pair in split.validation}
    outside = {f"vid_{v}" for v in range(50, 80) if falls_out(f"vid_{v}", 0.2)}
    assert held and outside
    for side in (split.clicked, split.rejected):
        assert {pair.video for pair in side} == {f"vid_{v}" for v in range(80)} - held - outside
    named = replace(data, splits={"vid_3": "validation", "vid_60": "test"}).split(0.2)
    assert {"vid_3", "vid_60"} == {pair.video for pair in spoken} - {pair.video for pair in named.clicked}


def test_feedback_is_read_beside_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.dataset.PIXEL_BYTES", 0)  # no pixels are read
    said = [("b", True, None), ("b", True, None), ("a", True, None), ("b", False, None), ("c", False, 3.0)]
    heard = [{"text": text, "relevant": relevant, "start": start} for text, relevant, start in said]
    rows = [
        {"video": "v", "frames": "f.zip", "captions": [{"text": "a"}], "feedback": heard},
        {"video": "w", "frames": "f.zip", "captions": [], "feedback": [{"text": "d", "relevant": False}]},
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_dataset(tmp_path / "d.jsonl", tmp_path, 8)
    assert [(p.text, p.clip) for p in data.pairs] == [("a", 0)]
    assert [(p.text, p.clip) for p in data.clicked] == [("b", 0)], "a caption says it already; twice is once"
    assert [(p.text, p.clip) for p in data.rejected] == [("c", 1), ("d", 2)], "what is a pair is no negative"
    assert data.digest() != replace(data, rejected=()).digest() != replace(data, rejected=(), clicked=()).digest()
