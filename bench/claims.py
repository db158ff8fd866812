"""`make results`: the paper's claims, measured on the shifted demo worlds with the built-in backbone; writes docs/results.md.

Each cell is one training run: a world, a method, a size, a number of pairs, a seed. Cells are computed two at a time, one
thread each, and appended to docs/results/cells.jsonl as they end, so that the command may be stopped and run again. Training
scenes, validation scenes (best step) and test scenes (the tables) are drawn from different seeds.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "results"
CELLS = FOLDER / "cells.jsonl"
PAIRS = {"train": (800, 101), "validation": (100, 102), "test": (200, 103)}  # scenes, seed
FRAMES = 4  # drawn of each scene
STEPS, BATCH = {"archive": 150, "nightwatch": 400, "blueprint": 400}, 32
CAPTIONS = {"archive": 1, "nightwatch": 3, "blueprint": 3}  # of a training scene
SEEDS = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class Cell:
    """A training run; `recipe` holds what differs from the common one. `gate`: as a service trains, with no validation scenes
    of its own, where the gate decides whether the adapter is activated.
    """

    world: str
    recipe: dict[str, Any] = field(hash=False)
    pairs: int = 200
    seed: int = 0
    gate: bool = False

    @property
    def name(self) -> str:
        return json.dumps({k: v for k, v in asdict(self).items() if k != "gate" or v}, sort_keys=True)


BOTH: dict[str, Any] = {"learning_rate": 1e-2}
UNSHARED: dict[str, Any] = {"learning_rate": 1e-2, "shared": 0}
TEXT: dict[str, Any] = {"learning_rate": 3e-3, "scope": "text"}
FULL: dict[str, Any] = {"method": "full", "learning_rate": 3e-4}
LOW_BOTH, LOW_FULL = {**BOTH, "learning_rate": 3e-3}, {**FULL, "learning_rate": 1e-4}
METHODS = {"adapter": BOTH, "adapter, nothing shared": UNSHARED, "adapter, text tower": TEXT, "full fine-tuning": FULL}
SWEEP = {"adapter": (3e-3, 1e-2, 2e-2), "full fine-tuning": (1e-4, 3e-4, 1e-3)}
PAPER: dict[str, Any] = {"preset": "paper", "batch_size": 128, "steps": 31}  # five epochs of 800 pairs
PAPER_RATES = (1e-5, 1e-3, 3e-3, 1e-2)
WORDS: dict[str, Any] = {**BOTH, "vocabulary": "auto"}
WORDS_TEXT: dict[str, Any] = {**BOTH, "vocabulary": "auto", "scope": "text"}
LOW_WORDS = {**LOW_BOTH, "vocabulary": "auto"}
LONG = {"steps": 800}
FEW = (20, 50, 100, 200)  # scenes of a collection
VOCABULARY = {  # on worlds with new words
    "adapter with rows": WORDS,
    "adapter with rows, 800 steps": {**WORDS, **LONG},
    "adapter with rows, r 16": {**WORDS, "rank": 16},
    "adapter with rows, text tower": WORDS_TEXT,
    "adapter with rows, text tower, 800 steps": {**WORDS_TEXT, **LONG},
}


def cells() -> list[Cell]:
    """Every run of the page, the most telling first."""
    new = ("nightwatch", "blueprint")
    wanted = [Cell(world, {**WORDS, **LONG}, 800, seed) for seed in SEEDS for world in new]
    wanted += [Cell("archive", recipe, 200, seed) for seed in SEEDS for recipe in (BOTH, WORDS)]
    wanted += [Cell(world, {**WORDS_TEXT, **LONG}, 800, seed) for seed in SEEDS for world in new]
    wanted += [Cell("archive", recipe, 50, seed) for seed in SEEDS for recipe in (LOW_BOTH, LOW_WORDS)]
    wanted += [Cell(world, {"frames": 1}, n, s, gate=True) for n in FEW for s in SEEDS for world in ("archive", "nightwatch")]
    wanted += [Cell(world, recipe, 800, seed) for seed in SEEDS for world in new for recipe in METHODS.values()]
    wanted += [Cell("archive", recipe, seed=seed) for seed in SEEDS for recipe in METHODS.values()]
    wanted += [Cell("archive", {**METHODS[m], "learning_rate": r}) for m, rates in SWEEP.items() for r in rates]
    wanted += [Cell("archive", r, 50, seed) for seed in SEEDS for r in (BOTH, FULL, WORDS, LOW_FULL)]
    wanted += [Cell("archive", {**BOTH, "layers": k}, seed=seed) for seed in SEEDS for k in (1, 2)]
    wanted += [Cell("archive", {**BOTH, "rank": r}, seed=seed) for seed in SEEDS for r in (2, 4, 16)]
    wanted += [Cell("archive", recipe, 800, seed) for seed in SEEDS for recipe in (BOTH, FULL, WORDS)]
    wanted += [Cell("archive", {**BOTH, "shared": 64}, seed=seed) for seed in SEEDS]
    wanted += [Cell("archive", {**BOTH, "start": "small"}, seed=seed) for seed in SEEDS]
    wanted += [Cell("archive", {**PAPER, "learning_rate": r}, 800) for r in PAPER_RATES]
    wanted += [Cell(world, r, 800, seed) for seed in SEEDS for world in new for r in VOCABULARY.values()]
    return list({cell.name: cell for cell in wanted}.values())


def main() -> None:
    from bench.claims_page import write_page

    FOLDER.mkdir(exist_ok=True)
    if "--page" not in sys.argv:
        done = read()
        todo = [cell for cell in cells() if cell.name not in done]
        say(f"{len(done)} cells are there, {len(todo)} to compute")
        with (
            ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), initializer=one_thread) as pool,
            CELLS.open("a") as file,
        ):
            for finished in as_completed([pool.submit(compute, cell) for cell in todo]):
                row = finished.result()
                file.write(json.dumps(row) + "\n")
                file.flush()
                say(f"{row['name']}: R@1 {row['test']['R@1']}, {row['seconds']} s")
    write_page(read())


def say(line: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stdout.flush()


def read() -> dict[str, dict[str, Any]]:
    """The cells that have been computed with the built-in backbone as it is now, by name."""
    if not CELLS.exists():
        return {}
    rows = [json.loads(line) for line in CELLS.read_text().splitlines() if line.endswith("}")]
    return {row["name"]: row for row in rows if row.get("weights") == weights()}


def weights() -> str:
    """Which weights the built-in backbone has: the beginning of their file's sha256."""
    with (ROOT / "backbone" / "weights" / "builtin.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    os.nice(5)


# --- one run


def compute(cell: Cell) -> dict[str, Any]:
    """Trains and tests one cell; `hits` are the test captions' better and equal candidates."""
    from backbone import load_backbone
    from service.adapters.train import verdict
    from training.evaluation import evaluate
    from training.metrics import ranks
    from training.progress import unheard
    from training.recipe import Recipe
    from training.trainer import train

    started = time.monotonic()
    backbone = load_backbone()
    common = {
        "steps": STEPS[cell.world],
        "batch_size": BATCH,
        "frames": 1,
        "evaluations": 3,
        "seed": cell.seed,
        "vocabulary": "off",
    }
    recipe = Recipe.of({**cell.recipe, "seed": cell.seed} if cell.gate else {**common, **cell.recipe})
    dataset, test = data(cell)
    with TemporaryDirectory() as scratch:
        folds = recipe.folds if cell.gate else 0
        trained = train(backbone, dataset, recipe, unheard, scratch=Path(scratch), folds=folds)
    model, adapter = trained.on(backbone)
    found = evaluate(model, adapter, dataset.clips, test, recipe.temperature)
    zero = evaluate(backbone, None, dataset.clips, test, recipe.temperature)
    shape = trained.shape
    first = None if shape is None else shape.first_rows(recipe.layers)
    return {
        "name": cell.name,
        "weights": weights(),
        "zero_shot": zero.text_to_video.to_json(),
        "test": found.text_to_video.to_json(),
        "video_to_text": found.video_to_text.to_json(),
        "hits": [side.tolist() for side in ranks(found.similarity, found.targets)],
        "zero_hits": [side.tolist() for side in ranks(zero.similarity, zero.targets)],
        "parameters": sum(t[first[n] if first else 0 :].numel() for n, t in trained.final.items()),
        "best_step": trained.metrics["best_step"],
        **({"activated": verdict(trained.metrics, "if_better")[0]} if cell.gate else {}),
        "last_loss": round(float(np.mean([loss for _, loss in trained.metrics["loss"][-20:]])), 4),
        "seconds": round(time.monotonic() - started, 1),
    }


def data(cell: Cell) -> tuple[Any, Any]:
    """The cell's training and validation pairs as a data set, and the test pairs among the same clips."""
    from demo.worlds import scenes
    from training.dataset import ArrayClips, Dataset, Pair

    pixels, splits, row = [], {}, 0
    pairs: list[Pair] = []
    rng = np.random.default_rng(cell.seed)
    test: list[Pair] = []
    for split, (count, seed) in PAIRS.items():
        drawn = scenes(cell.world, count, seed)
        chosen = sorted(rng.permutation(count)[: cell.pairs]) if split == "train" else range(count)
        pixels.append(pictures(cell.world, split)[list(chosen)])
        for index in chosen:
            video, captions = f"{split}-{index}", drawn[index].captions
            splits[video] = split
            one = split == "train" and CAPTIONS[cell.world] == 1
            texts = (captions[rng.integers(3)],) if one else captions
            (test if split == "test" else pairs).extend(Pair(row, text, video) for text in texts)
            row += 1
    if cell.gate:  # the collection's own split, of its own scenes
        pairs = [pair for pair in pairs if splits[pair.video] == "train"]
        splits = {}
    return Dataset(ArrayClips(np.concatenate(pixels)), tuple(pairs), splits), test


def pictures(world: str, split: str) -> NDArray[np.uint8]:
    """(scenes, FRAMES, 3, 64, 64), drawn once and kept in the temporary folder."""
    from PIL import Image

    from backbone import to_pixels
    from demo.worlds import scenes

    count, seed = PAIRS[split]
    path = Path(gettempdir()) / f"polyclip-claims-{world}-{count}-{seed}-{FRAMES}.npy"
    if not path.exists():
        drawn = [
            [to_pixels(Image.fromarray(s.frame(s.duration * (i + 0.5) / FRAMES)), 64) for i in range(FRAMES)]
            for s in scenes(world, count, seed)
        ]
        aside = path.with_suffix(f".{os.getpid()}.npy")
        np.save(aside, np.asarray(drawn, np.uint8))
        os.replace(aside, path)
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
