"""The page of `make results`: docs/results.md with the tables and pictures of the runs that are there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.claims import (
    BOTH,
    FEW,
    FOLDER,
    FULL,
    LOW_BOTH,
    LOW_FULL,
    LOW_WORDS,
    METHODS,
    PAPER,
    PAPER_RATES,
    ROOT,
    SEEDS,
    SWEEP,
    TEXT,
    UNSHARED,
    VOCABULARY,
    WORDS,
    Cell,
    cells,
)  # fmt: skip

PAGE = ROOT / "docs" / "results.md"
OPEN, CLOSE = "<!-- figures -->", "<!-- end of figures -->"


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
        if rows := next(filter(None, (of(world, recipe, pairs) for recipe in shown.values())), None):
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
    if lines:
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
    if rates:
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
    for name, draw in plots.items() if of("archive", BOTH) else ():
        (FOLDER / f"{name}.svg").write_text(draw())
        parts.append(f"![R@1 by {name}](results/{name}.svg)")
    missing = sum(cell.name not in done for cell in cells())
    if missing:
        parts.append(f"{missing} of {len(cells())} runs are not there yet: `make results` goes on.")
    before, rest = PAGE.read_text().split(OPEN)
    PAGE.write_text(before + OPEN + "\n\n" + "\n\n".join(parts) + "\n\n" + CLOSE + rest.split(CLOSE)[1])


def point(found: Score) -> tuple[float, float, float]:
    return found.mean, found.low, found.high
