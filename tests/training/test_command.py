"""`python -m training`: what it writes, what stops it, what it goes on from, and what it refuses in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from miniature import miniature
from PIL import Image
from typer.testing import CliRunner

import adapters_store
from backbone import Backbone, load_backbone
from indexer.decode import DecodedSegment, DecodedVideo, MediaFacts
from indexer.frames import DamagedFrames, pack_frames
from training.__main__ import app
from training.dataset import InvalidDataset
from training.display import evidence
from training.progress import Progress
from training.recipe import InvalidRecipe, Recipe
from training.run import InUse, _alone, run
from training.source import Source

COLOURS = {"crimson": (220, 20, 40), "azure": (20, 120, 240), "lime": (120, 220, 30), "black": (5, 5, 5)}
RECIPE = {"steps": 12, "batch_size": 4, "frames": 2, "evaluations": 3, "rank": 4, "shared": 8, "folds": 0}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("builtin")


def _dataset_on_disk(folder: Path, videos: int) -> Path:
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
    """The command in this process: its exit status, and the JSON lines that it writes where no terminal is."""
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "Traceback" not in done.stderr
    return done.exit_code, [json.loads(line) for line in done.stdout.splitlines()]


@contextmanager
def started_training(*arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """A training process of one thread, killed at the end of the block."""
    command = [sys.executable, "-m", "training", "--json", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        yield child
        child.kill()


def train_here(dataset: Path, out: Path, **fields: Any) -> dict[str, Any]:
    """The same in this process, which saves the start of another."""
    source = Source(dataset, None, None, None, None, False)
    return run(source, out, "builtin", None, {**RECIPE, **fields}, None, None, lambda event: None)


def wait_for(what: Callable[[], bool], child: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


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
    assert manifest.vocabulary and manifest.parameters == 55_584 + 128 * manifest.vocabulary, "rank 8, 16 shared rows, built-in"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter.safetensors", "manifest.json"]


@pytest.mark.parametrize(
    ("videos", "fields", "error"),
    [
        (1, {}, InvalidDataset),
        (12, {"rank": 0}, InvalidRecipe),
        (12, {"learnign_rate": 1}, InvalidRecipe),
        (12, {"preset": "best"}, InvalidRecipe),
        (12, {"shared": 129}, InvalidRecipe),
    ],
)
def test_what_cannot_be_trained_leaves_nothing_behind(
    tmp_path: Path, videos: int, fields: dict[str, Any], error: type[Exception]
) -> None:
    dataset = _dataset_on_disk(tmp_path, videos)
    (tmp_path / "out").mkdir()
    with pytest.raises(error):
        train_here(dataset, tmp_path / "out", **fields)
    assert list((tmp_path / "out").iterdir()) == []


def test_on_the_command_line_a_refusal_is_one_line_and_status_1(tmp_path: Path) -> None:
    dataset = _dataset_on_disk(tmp_path, 1)
    status, events = run_training("--dataset", str(dataset), "--out", str(tmp_path / "out"))
    assert status == 1
    assert events[-1]["event"] == "error" and events[-1]["code"] == "invalid_dataset"
    assert "\n" not in events[-1]["detail"]


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_kill_9_in_mid_epoch_and_the_same_command_again_give_the_same_weights(tmp_path: Path) -> None:
    dataset = _dataset_on_disk(tmp_path, 40)
    recipe = json.dumps({**RECIPE, "steps": 60, "evaluations": 6, "frames": 1})
    arguments = ("--dataset", str(dataset), "--recipe", recipe)
    out = tmp_path / "killed"
    with started_training(*arguments, "--out", str(out)) as child:
        wait_for((out / "checkpoint.safetensors").exists, child)
    assert not (out / "manifest.json").exists()
    status, events = run_training(*arguments, "--out", str(out))
    assert status == 0
    resumed = [event for event in events if event["event"] == "resumed"]
    assert len(resumed) == 1 and 0 < resumed[0]["step"] < 60
    status, whole = run_training(*arguments, "--out", str(tmp_path / "whole"))
    assert events[-1]["digest"] == whole[-1]["digest"], "the same weights, bit by bit"
    curves = [adapters_store.read(tmp_path / name)[1].metrics for name in ("whole", "killed")]
    assert curves[0] == curves[1], "the same losses and validations"
    assert sorted(p.name for p in out.iterdir()) == ["adapter.safetensors", "manifest.json"]


def test_sigterm_saves_and_says_so(tmp_path: Path) -> None:
    dataset = _dataset_on_disk(tmp_path, 12)
    recipe = json.dumps({**RECIPE, "steps": 5000})
    with started_training("--dataset", str(dataset), "--out", str(tmp_path / "out"), "--recipe", recipe) as child:
        assert child.stdout is not None
        while json.loads(child.stdout.readline())["event"] != "step":
            pass
        child.send_signal(signal.SIGTERM)
        rest = [json.loads(line) for line in child.stdout]
        assert child.wait(timeout=30) == 1
    assert rest[-1]["event"] == "error" and rest[-1]["code"] == "stopped"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["checkpoint.safetensors"]


def test_two_runs_into_one_folder_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.run.LOCK_SECONDS", 0.5)
    dataset = _dataset_on_disk(tmp_path, 12)
    with _alone(tmp_path / "out", first=True), pytest.raises(InUse, match="another run trains into"):
        train_here(dataset, tmp_path / "out")


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    dataset = _dataset_on_disk(tmp_path, 24)
    fields = {"steps": 5, "evaluations": 1, "batch_size": 8}
    train_here(dataset, tmp_path / "one", **fields)
    arguments = ["--json", "--dataset", str(dataset), "--recipe", json.dumps({**RECIPE, **fields})]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, "-m", "training", *arguments, "--out", str(tmp_path / "two")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (adapters_store.unpack(adapters_store.read(tmp_path / name)[0]).tensors for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["msrvtt", "msvd", "vatex", "didemo", "activitynet", "jsonl"])
def test_a_published_data_set_goes_from_its_files_to_a_tested_adapter(name: str, tmp_path: Path) -> None:
    root = miniature(name, tmp_path)
    report = tmp_path / "report.html"
    source = Source(None, name, root, None, None, False)
    fields = {"preset": "paper", "batch_size": 4, "epochs": 1, "rank": 2, "shared": 4, "frames": 2}
    events: list[Progress] = []
    done = run(source, tmp_path / "out", "builtin", None, fields, None, None, events.append, True, report, tmp_path / "board")
    assert {"decoding", "step", "validation"} <= {event.stage for event in events}
    assert done["test"] is not None
    _, manifest = adapters_store.read(tmp_path / "out")
    tested = manifest.metrics["test"]["text_to_video"]
    assert tested["gallery"] == 4
    assert tested["queries"] == {"msvd": 12}.get(name, tested["queries"]) >= 4
    assert manifest.recipe["words"] == (64 if name in ("didemo", "activitynet") else 32)
    assert manifest.data["validation_pairs"] > 0
    assert "<svg" in report.read_text() and report.with_suffix(".json").exists()
    assert any((tmp_path / "board").iterdir())


def test_a_broken_archive_names_its_video(tmp_path: Path) -> None:
    dataset = _dataset_on_disk(tmp_path, 12)
    (tmp_path / "3.zip").write_bytes(b"PK no more")
    with pytest.raises(DamagedFrames, match="vid_3"):
        train_here(dataset, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_paper_preset_is_what_the_paper_says() -> None:
    recipe = Recipe.of({"preset": "paper", "rank": 16})
    assert (recipe.rank, recipe.shared, recipe.batch_size, recipe.epochs) == (16, 16, 128, 5.0)
    assert not recipe.bias_correction and recipe.total_steps(9000) == 352
    assert np.isclose(recipe.weight_decay, 0.2)


def test_the_figures_of_a_small_set_carry_their_number_and_are_no_evidence(tmp_path: Path) -> None:
    dataset = _dataset_on_disk(tmp_path, 20)
    recipe = json.dumps({"steps": 10, "batch_size": 4, "frames": 1, "evaluations": 1})  # two a fold
    status, events = run_training("--dataset", str(dataset), "--out", str(tmp_path / "out"), "--recipe", recipe)
    done = events[-1]
    assert status == 0 and done["queries"] < 30 and done["not_enough_evidence"] is True
    assert (done["cross_validation"]["queries"], done["cross_validation"]["folds"]) == (20, 5)
    assert any(f"not enough evidence: {done['queries']} held-out" in line for line in evidence(done, done["queries"]))
    assert adapters_store.read(tmp_path / "out")[1].metrics["cross_validation"] == done["cross_validation"]


def test_a_run_out_of_time_publishes_what_it_has(tmp_path: Path) -> None:
    dataset = _dataset_on_disk(tmp_path, 6)
    recipe = json.dumps({"steps": 100_000, "batch_size": 4, "frames": 2})
    where = ("--dataset", str(dataset), "--out", str(tmp_path / "out"))
    status, events = run_training(*where, "--recipe", recipe, "--seconds", "0.001")
    assert status == 0 and events[-1]["timed_out"] == {"steps": 1, "of": 100_000}
