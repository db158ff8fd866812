import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import adapters_store
from backbone import Backbone, load_backbone
from training.dataset import Dataset, InvalidDataset, Pair
from training.recipe import Recipe
from training.trainer import TrainingDiverged, sample_frames, train, warmup_cosine

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
    return Dataset(np.stack(pixels), tuple(pairs))


RECIPE = Recipe(steps=30, batch_size=5, frames=2, learning_rate=1e-2, evaluations=2, rank=4, shared=8)


def test_the_loss_falls_and_only_the_adapter_learns(backbone: Backbone) -> None:
    events: list[dict[str, Any]] = []
    before = backbone._fingerprint()
    trained = train(backbone, colours(), RECIPE, events.append)
    losses = [e["loss"] for e in events if e["event"] == "step"]
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:3])
    assert backbone._fingerprint() == before
    assert set(trained.tensors) == set(RECIPE.shape(backbone.dims).layout())
    start = RECIPE.shape(backbone.dims).initial(RECIPE.seed)
    assert all(not torch.equal(trained.tensors[name], start[name]) for name in start), "every tensor gets a gradient"


def test_the_first_validation_is_the_frozen_backbone_and_the_best_one_is_kept(backbone: Backbone) -> None:
    trained = train(backbone, colours(), RECIPE, lambda event: None)
    curve = trained.metrics["curve"]
    assert [point["step"] for point in curve] == [0, 15, 30]
    assert trained.metrics["before"]["text_to_video"] == curve[0]["text_to_video"]
    assert trained.metrics["after"]["text_to_video"]["R@1"] == max(p["text_to_video"]["R@1"] for p in curve[1:])
    assert not set(trained.metrics["data"]["validation_videos"]) & {"nothing"}


def test_the_same_seed_gives_the_same_adapter(backbone: Backbone) -> None:
    recipe = Recipe(steps=3, batch_size=5, frames=2, evaluations=1)
    a, b = (train(backbone, colours(), recipe, lambda event: None).tensors for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("scope", ["text", "vision"])
def test_an_adapter_of_one_tower_has_only_its_tensors(backbone: Backbone, scope: str) -> None:
    recipe = Recipe(steps=2, batch_size=5, frames=2, evaluations=1, scope=scope)  # type: ignore[arg-type]
    trained = train(backbone, colours(2), recipe, lambda event: None)
    tower = {"text": "text", "vision": "visual"}[scope]
    assert all(name.startswith(tower) for name in trained.tensors)


def test_a_loss_that_is_not_finite_ends_the_run_in_words(backbone: Backbone) -> None:
    wild = Recipe(steps=50, batch_size=5, frames=2, learning_rate=1.0, gradient_clip=1e6, evaluations=1)
    start = {name: tensor * 1e30 for name, tensor in wild.shape(backbone.dims).initial(0).items()}
    with pytest.raises(TrainingDiverged, match="try a lower learning rate"):
        train(backbone, colours(2), wild, lambda event: None, start)


def test_one_training_video_is_told(backbone: Backbone) -> None:
    pairs = (Pair(0, "a", "v0"), Pair(1, "b", "v1"))
    with pytest.raises(InvalidDataset, match="at least 2 captioned training videos"):
        train(backbone, Dataset(np.zeros((2, 12, 3, 64, 64), np.uint8), pairs), Recipe(steps=1), lambda event: None)


def test_the_schedule_warms_up_then_falls_to_zero() -> None:
    factors = [warmup_cosine(step, 100, 0.1) for step in range(101)]
    assert factors[0] < 0.2
    assert max(factors) <= 1.0
    assert factors.index(max(factors)) in range(9, 12)
    assert factors[100] == pytest.approx(0, abs=1e-6)
    assert all(b <= a for a, b in pairwise(factors[11:]))


def test_sampled_frames_come_one_from_each_slice_in_order() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(1, 12, 1, 1, 1).repeat(2, axis=0)
    rng = np.random.default_rng(0)
    for _ in range(50):
        picked = sample_frames(pixels, [0, 1], 4, rng)[:, :, 0, 0, 0]
        assert all(3 * i <= frame < 3 * i + 3 for row in picked for i, frame in enumerate(row))
    assert sample_frames(pixels, [1], 12, rng).shape == (1, 12, 1, 1, 1)


def _dataset_on_disk(folder: Path, videos: int) -> Path:
    from PIL import Image

    from indexer.decode import DecodedSegment, DecodedVideo, MediaFacts
    from indexer.frames import pack_frames

    lines = []
    for v in range(videos):
        word, colour = list(COLOURS.items())[v % len(COLOURS)]
        names = tuple(f"{v:03d}-{f:02d}.jpg" for f in range(12))
        for name in names:
            Image.new("RGB", (64, 64), colour).save(folder / name)
        facts = MediaFacts(5.0, 64, 64, 10.0, "h264", 50, "mp4", "decord")
        decoded = DecodedVideo(facts, (DecodedSegment(0.0, 5.0, names, names[0]),))
        (folder / f"{v}.zip").write_bytes(pack_frames(decoded, folder))
        row = {"video": f"vid_{v}", "frames": str(folder / f"{v}.zip"), "captions": [{"text": f"zzyx {word} {v}"}]}
        lines.append(json.dumps(row))
    path = folder / "dataset.jsonl"
    path.write_text("\n".join(lines))
    return path


def run_training(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
    done = subprocess.run([sys.executable, "-m", "training", "--json", *arguments], capture_output=True, text=True, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_the_command_writes_an_adapter_that_fits_its_backbone(tmp_path: Path, backbone: Backbone) -> None:
    dataset = _dataset_on_disk(tmp_path, 12)
    recipe = json.dumps({"steps": 4, "batch_size": 4, "frames": 2, "evaluations": 2})
    status, events = run_training("--dataset", str(dataset), "--out", str(tmp_path / "out"), "--recipe", recipe)
    assert status == 0
    assert events[0]["event"] == "validation" and events[-1]["event"] == "done"
    data, manifest = adapters_store.read(tmp_path / "out")
    artifact = adapters_store.unpack(data)
    artifact.adapter(backbone.fingerprint)
    assert manifest.digest == events[-1]["digest"]
    assert manifest.recipe["steps"] == 4
    assert manifest.data["train_videos"] + len(manifest.data["validation_videos"]) == 12
    assert manifest.parameters == 55_584, "rank 8, 16 shared rows, built-in backbone"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter.safetensors", "manifest.json"]


@pytest.mark.parametrize(
    ("videos", "recipe", "code"),
    [(1, "{}", "invalid_dataset"), (12, '{"rank": 0}', "invalid_recipe"), (12, '{"learnign_rate": 1}', "invalid_recipe")],
)
def test_what_cannot_be_trained_is_one_line_and_status_1(tmp_path: Path, videos: int, recipe: str, code: str) -> None:
    dataset = _dataset_on_disk(tmp_path, videos)
    status, events = run_training("--dataset", str(dataset), "--out", str(tmp_path / "out"), "--recipe", recipe)
    assert status == 1
    assert events[-1]["event"] == "error" and events[-1]["code"] == code
    assert "\n" not in events[-1]["detail"]
    assert not (tmp_path / "out" / "manifest.json").exists()
