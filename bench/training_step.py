"""One training step at equal batch: full fine-tuning, the adapter as the paper trains it, and cheaper ways. Both towers, 2
frames a video, optimiser included; the built-in backbone with 32 pairs, ViT-B/32 (random weights) with 4. Peak memory is what
three steps add to a fresh process that has loaded the backbone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from backbone import load_backbone
from bench.timing import Row, compare
from training.dataset import ArrayClips, Pair
from training.inputs import Inputs
from training.optimiser import optimiser_of
from training.ranks import ALONE
from training.recipe import Recipe
from training.step import Learner, backward

BACKBONES = {"builtin": (None, 32), "ViT-B-32": ("random", 4)}
WAYS: dict[str, dict[str, object]] = {
    "full fine-tuning": {"method": "full"},
    "adapter, no bias correction": {"bias_correction": False},
    "adapter": {},
    "adapter, recomputed activations": {"recompute": True},
    "adapter in the last 2 layers": {"layers": 2},
    "adapter in the last layer": {"layers": 1},
    "adapter, text only": {"scope": "text"},
}


def run() -> list[Row]:
    rows = []
    for name, (pretrained, batch) in BACKBONES.items():
        with tempfile.TemporaryDirectory() as folder:
            steps = {way: step(name, pretrained, batch, way, Path(folder) / str(i)) for i, way in enumerate(WAYS)}
            found = compare(steps, naive="full fine-tuning", rounds=3, warmup=1)
        for row in found:
            memory = peak(name, row.what)
            what = f"{name}, {batch} pairs: {row.what} ({memory:.0f} MB)"
            against = row.against.replace("of full", f"of {name}: full")
            rows.append(Row(what, row.median_ms, row.low_ms, row.high_ms, row.ratio, against))
    return rows


def step(name: str, pretrained: str | None, batch: int, way: str, scratch: Path | None) -> Callable[[], object]:
    """A function that takes one optimiser step on random pixels; what layers without adapters make is kept in `scratch`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = load_backbone(name, pretrained, device)
    recipe = Recipe.of({"batch_size": batch, "frames": 2, "learning_rate": 1e-5, **WAYS[way]})
    size = backbone.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (batch, 2, 3, size, size), dtype=np.uint8)
    pairs = [Pair(i, f"two small striped red balls on the left, number {i}", f"v{i}") for i in range(batch)]
    shape = recipe.shape(backbone.dims)
    first = (0, 0)
    if recipe.method == "full":
        tuned, weights = backbone.unfrozen()
        learner = Learner(tuned, None, weights, recipe)
    else:
        first = shape.first_layers(recipe.layers)
        initial = shape.initial(0, recipe.layers, recipe.start)
        tensors = {name: t.to(backbone.device).requires_grad_() for name, t in initial.items()}
        learner = Learner(backbone, shape, tensors, recipe)
    if scratch is not None:
        scratch.mkdir(parents=True, exist_ok=True)
    inputs = Inputs(backbone, ArrayClips(pixels), pairs, recipe, ALONE, first, scratch)
    parts, clips, optimiser = inputs.parts(1), inputs.clips_of(1), optimiser_of(learner.tensors, recipe)

    def once() -> None:
        optimiser.zero_grad(set_to_none=True)
        backward(learner, parts, clips, first, ALONE)
        torch.nn.utils.clip_grad_norm_(list(learner.tensors.values()), 1.0)
        optimiser.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return once


def peak(name: str, way: str) -> float:
    """Megabytes that three steps add, in a process of their own."""
    done = subprocess.run([sys.executable, "-m", "bench.training_step", name, way], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def _memory(name: str, way: str) -> float:
    pretrained, batch = BACKBONES[name]
    with tempfile.TemporaryDirectory() as folder:
        once = step(name, pretrained, batch, way, Path(folder))
        if torch.cuda.is_available():
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is held now
            before = _held()
        for _ in range(3):
            once()
        after = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _held()
        return (after - before) / 1e6


def _held() -> int:
    """Bytes of this process's peak of resident memory."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_memory(sys.argv[1], sys.argv[2])) + "\n")
