"""`make results`: the paper's claims, measured on the shifted demo worlds with the built-in backbone; writes docs/results.md.

Each cell is one training run: a world, a method, a size, a number of pairs, a seed. Cells are computed two at a time, one
thread each, and appended to docs/results/cells.jsonl as they end, so that the command may be stopped and run again. Training
scenes, validation scenes (best step) and test scenes (the tables) are drawn from different seeds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
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
PAGE = ROOT / "docs" / "results.md"
OPEN, CLOSE = "<!-- figures -->", "<!-- end of figures -->"
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
    wanted = [Cell("archive", recipe, seed=seed) for seed in SEEDS for recipe in METHODS.values()]
    wanted += [Cell("archive", {**METHODS[m], "learning_rate": r}) for m, rates in SWEEP.items() for r in rates]
    wanted += [Cell("archive", recipe, 50, seed) for seed in SEEDS for recipe in (BOTH, FULL)]
    wanted += [Cell("archive", r, 50, seed) for seed in SEEDS for r in (LOW_BOTH, LOW_FULL)]
    wanted += [Cell("archive", {**BOTH, "layers": k}, seed=seed) for seed in SEEDS for k in (1, 2)]
    wanted += [Cell("archive", {**BOTH, "rank": r}, seed=seed) for seed in SEEDS for r in (2, 4, 16)]
    wanted += [Cell("archive", recipe, 800, seed) for seed in SEEDS for recipe in (BOTH, FULL)]
    wanted += [Cell("archive", {**BOTH, "shared": 64}, seed=seed) for seed in SEEDS]
    wanted += [Cell("archive", {**BOTH, "start": "small"}, seed=seed) for seed in SEEDS]
    wanted += [Cell("archive", {**PAPER, "learning_rate": r}, 800) for r in PAPER_RATES]
    wanted += [Cell("nightwatch", recipe, 800, seed) for seed in SEEDS for recipe in METHODS.values()]
    wanted += [Cell("blueprint", recipe, 800, seed) for seed in SEEDS for recipe in METHODS.values()]
    wanted += [Cell("archive", WORDS, pairs, seed) for seed in SEEDS for pairs in (50, 200, 800)]
    wanted += [Cell("archive", LOW_WORDS, 50, seed) for seed in SEEDS]
    wanted += [
        Cell(world, r, 800, seed) for seed in SEEDS for world in ("nightwatch", "blueprint") for r in VOCABULARY.values()
    ]
    wanted += [Cell(world, {"frames": 1}, n, s, gate=True) for n in FEW for s in SEEDS for world in ("archive", "nightwatch")]
    return list({cell.name: cell for cell in wanted}.values())


def main() -> None:
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
    """The cells that have been computed, by name."""
    if not CELLS.exists():
        return {}
    rows = [json.loads(line) for line in CELLS.read_text().splitlines() if line.endswith("}")]
    return {row["name"]: row for row in rows}


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


# --- the page


@dataclass(frozen=True, slots=True)
class Score:
    """R@1 over all seeds: mean, its 95 % interval (bootstrap over test videos), lowest and highest seed."""

    mean: float
    low: float
    high: float
    seeds: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.mean:.1f} [{self.low:.1f}, {self.high:.1f}]"


def hit_table(rows: Iterable[dict[str, Any]], key: str = "hits") -> NDArray[np.float64]:
    """(seeds, test videos) share of each video's captions that are answered right at rank 1, in per cent."""
    tables = []
    for row in rows:
        better, equal = (np.asarray(side) for side in row[key])
        tables.append(100 * np.clip((1 - better) / (equal + 1), 0, 1).reshape(-1, 3).mean(axis=1))
    return np.stack(tables)


def score(table: NDArray[np.float64]) -> Score:
    rng = np.random.default_rng(0)
    drawn = table.mean(axis=0)[rng.integers(table.shape[1], size=(2000, table.shape[1]))].mean(axis=1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Score(float(table.mean()), float(low), float(high), tuple(table.mean(axis=1).tolist()))


def outcome(row: dict[str, Any]) -> tuple[str, str, str]:
    return f"{row['test']['R@1']:.1f}", f"{row['last_loss']:.3f}", str(row["best_step"])


def costs() -> dict[str, tuple[float, float]]:
    """(time of a step, peak memory) of each way, full fine-tuning = 1, built-in backbone: `python -m bench training_step`."""
    path = ROOT / "bench" / "results" / "training_step.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    found: dict[str, tuple[float, float]] = {}
    for row in rows:
        if match := re.fullmatch(r"builtin, \d+ pairs: (.*) \((\d+) MB\)", row["what"]):
            found[match[1]] = row["ratio"], float(match[2])
    whole = found.get("full fine-tuning", (1.0, 1.0))[1]
    return {way: (ratio, memory / whole) for way, (ratio, memory) in found.items()}


def way_of(recipe: dict[str, Any]) -> str:
    """The way of bench/training_step.py that costs what a run of this recipe costs; ranks differ by next to nothing."""
    if recipe.get("method") == "full":
        return "full fine-tuning"
    if recipe.get("scope") == "text":
        return "adapter, text only"
    return {1: "adapter in the last layer", 2: "adapter in the last 2 layers"}.get(recipe.get("layers", 0), "adapter")


def write_page(done: dict[str, dict[str, Any]]) -> None:
    """Puts the figures between their marks in docs/results.md; what stands around them is written by hand."""
    from training.report import line_plot

    def of(world: str, recipe: dict[str, Any], pairs: int = 200) -> list[dict[str, Any]]:
        named = (Cell(world, recipe, pairs, seed).name for seed in SEEDS)
        return [done[name] for name in named if name in done]

    def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
        rows = [head, ["---"] * len(head), *lines]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)

    cost = costs()

    def line(label: str, rows: list[dict[str, Any]], full: list[dict[str, Any]]) -> list[str] | None:
        if not rows:
            return None
        own = hit_table(rows)
        same = json.loads(rows[0]["name"])["recipe"].get("method") == "full"
        gap = "" if same or len(rows) != len(full) else str(score(own - hit_table(full)))
        costs_told = [f"{c:.2f}" for c in cost.get(way_of(json.loads(rows[0]["name"])["recipe"]), ())] or ["–", "–"]
        means = [np.mean([r["test"][k] for r in rows]) for k in ("R@5", "R@10", "MnR")]
        back = np.mean([r["video_to_text"]["R@1"] for r in rows])
        seeds = " ".join(f"{s:.1f}" for s in score(own).seeds)
        spread = [f"{means[0]:.1f}", f"{means[1]:.1f}", f"{means[2]:.1f}", f"{back:.1f}"]
        return [label, f"{rows[0]['parameters']:,}", str(score(own)), seeds, gap, *spread, *costs_told]

    head = ("", "tuned", "R@1 [95 %]", "by seed", "less full", "R@5", "R@10", "MnR", "V→T R@1", "step", "memory")
    parts = []
    for world, pairs in (("archive", 200), ("archive", 50), ("archive", 800), ("nightwatch", 800), ("blueprint", 800)):
        full = of(world, FULL, pairs)
        lower = {"adapter, rate 0.003": LOW_BOTH, "full fine-tuning, rate 0.0001": LOW_FULL}
        if pairs == 50:
            lower["adapter with rows, rate 0.003"] = LOW_WORDS
        rows_shown = {"adapter with rows": WORDS} if world == "archive" else VOCABULARY
        shown = {**METHODS, **rows_shown, **(lower if pairs == 50 else {})}
        lines = [found for label, recipe in shown.items() if (found := line(label, of(world, recipe, pairs), full))]
        if rows := of(world, BOTH, pairs):
            zero = ["zero-shot", "0", str(score(hit_table(rows[:1], "zero_hits"))), *[""] * 8]
            parts.append(f"### {world}, {pairs} pairs\n\n{table(head, [zero, *lines])}")
    gate = []
    for world in ("archive", "nightwatch"):
        for n in FEW:
            named = [Cell(world, {"frames": 1}, n, seed, gate=True).name for seed in SEEDS]
            if runs := [done[name] for name in named if name in done]:
                before, after = (" ".join(f"{row[side]['R@1']:.1f}" for row in runs) for side in ("zero_shot", "test"))
                active = " ".join("yes" if row["activated"] else "no" for row in runs)
                worse = sum(row["activated"] and row["test"]["R@1"] < row["zero_shot"]["R@1"] for row in runs)
                gate.append([f"{world}, {n} scenes", before, after, active, str(worse)])
    if gate:
        gated = table(("", "R@1 before, by seed", "after", "activated", "activated and worse"), gate)
        parts.append(f"### What the gate lets through: the default recipe on few scenes\n\n{gated}")
    sizes = {f"r {r}, d_s 16": {**BOTH, "rank": r} for r in (2, 4, 16)} | {"r 8, d_s 64": {**BOTH, "shared": 64}}
    sizes = {"r 8, d_s 16": BOTH, "r 8, d_s 0": UNSHARED, **sizes, "r 8, d_s 16, the paper's start": {**BOTH, "start": "small"}}
    sizes |= {f"r 8, d_s 16, last {k} of 4 layers": {**BOTH, "layers": k} for k in (1, 2)}
    full = of("archive", FULL)
    lines = [found for label, recipe in sizes.items() if (found := line(label, of("archive", recipe), full))]
    parts.append(f"### archive, 200 pairs: sizes\n\n{table(head, lines)}")
    rates = []
    for method, values in SWEEP.items():
        for rate in values:
            for row in of("archive", {**METHODS[method], "learning_rate": rate})[:1]:
                rates.append([method, f"{rate:g}", *outcome(row)])
    for rate in PAPER_RATES:
        for row in of("archive", {**PAPER, "learning_rate": rate}, 800)[:1]:
            rates.append(["the preset `paper`, 800 pairs, 5 epochs", f"{rate:g}", *outcome(row)])
    swept = table(("", "rate", "R@1", "last loss", "best step"), rates)
    parts.append(f"### archive: learning rates, seed 0 (200 pairs unless said otherwise)\n\n{swept}")
    plots: dict[str, Callable[[], str]] = {
        "pairs": lambda: line_plot(
            {
                label: [
                    (n, *point(score(hit_table(rows))))
                    for n, recipe in recipes.items()
                    if (rows := of("archive", recipe, n))
                ]
                for label, recipes in {
                    "adapter": {50: LOW_BOTH, 200: BOTH, 800: BOTH},
                    "full fine-tuning": {50: LOW_FULL, 200: FULL, 800: FULL},
                }.items()
            },
            "training pairs", "R@1", "archive: R@1 by training pairs", log_x=True,
        ),
        "rank": lambda: line_plot(
            {"adapter": [
                (r, *point(score(hit_table(rows))))
                for r in (2, 4, 8, 16)
                if (rows := of("archive", BOTH if r == 8 else {**BOTH, "rank": r}))
            ]},
            "rank r", "R@1", "archive, 200 pairs: R@1 by rank", log_x=True,
        ),
        "cost": lambda: line_plot(
            {
                label: [
                    (cost[way_of(recipe)][0], *point(score(hit_table(rows))))
                    for recipe in recipes
                    if (rows := of("archive", recipe)) and way_of(recipe) in cost
                ]
                for label, recipes in {
                    "last 1, 2, all blocks": [{**BOTH, "layers": 1}, {**BOTH, "layers": 2}, BOTH],
                    "adapter, text tower": [TEXT],
                    "full fine-tuning": [FULL],
                }.items()
            },
            "time of a step, full fine-tuning = 1", "R@1", "archive, 200 pairs: R@1 by cost",
        ),
    }  # fmt: skip
    for name, draw in plots.items():
        (FOLDER / f"{name}.svg").write_text(draw())
        parts.append(f"![R@1 by {name}](results/{name}.svg)")
    missing = sum(cell.name not in done for cell in cells())
    if missing:
        parts.append(f"{missing} of {len(cells())} runs are not there yet: `make results` goes on.")
    before, rest = PAGE.read_text().split(OPEN)
    PAGE.write_text(before + OPEN + "\n\n" + "\n\n".join(parts) + "\n\n" + CLOSE + rest.split(CLOSE)[1])


def point(found: Score) -> tuple[float, float, float]:
    return found.mean, found.low, found.high


if __name__ == "__main__":
    main()
