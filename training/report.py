"""The report of a training run or an evaluation: one HTML file that needs nothing else, and the same numbers as JSON.

Equal input gives equal bytes.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from adapters_store import durable
from training.dataset import Pair
from training.evaluation import Evaluation
from training.metrics import METRICS, Gain, Recall, expected_ranks, gain

Thumbnails = Callable[[int], bytes | None]
Point = tuple[float, float, float, float]
"""x, mean, low, high."""

COLOURS = ("#3a7ebf", "#d9822b", "#2f9e77", "#b8659f", "#8a7f2c", "#c0504d")  # told apart on white and on black
MARKERS = "osD^vP"
INK = "#010203"  # stands for currentColor until the SVG is written
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}
RANK_BINS = (1, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
PAGES = Environment(
    loader=PackageLoader("training", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def write_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, Any],
    results: Mapping[str, Evaluation | None],
    pairs: Sequence[Pair],
    curve: Sequence[Mapping[str, Any]] | None = None,
    loss: Sequence[tuple[int, float]] | None = None,
    thumbnails: Thumbnails | None = None,
    worst: int = 20,
) -> None:
    """Writes the report in one piece: the file at `path` is the old one or the whole new one.

    results: systems by name, in the order of the table, None for one that was not measured; `pairs` are the captions of
    their rows, in order. curve: `{"step", "text_to_video": {"R@1", "R@5", …}}` for each validation. loss: (step, value).
    thumbnails: the JPEG of a clip (`Pair.clip`), or None. The `worst` queries are those of the last system without a
    query bank. Raises ValueError where a system has not one row for each pair.
    """
    measured = {name: found for name, found in results.items() if found is not None}
    for name, found in measured.items():
        if len(found.targets) != len(pairs):
            raise ValueError(f"{name} has {len(found.targets)} queries, there are {len(pairs)} captions")
    plots = [
        *([_loss_plot(loss)] if loss else []),
        *([_curve_plot(curve)] if curve else []),
        *([_rank_plot(measured)] if measured else []),
    ]
    own = [name for name, found in measured.items() if not found.bank_queries]
    html = PAGES.get_template("report.html").render(
        title=title,
        facts=facts,
        metrics=METRICS,
        directions=_tables(results),
        plots=[_inline(plot) for plot in plots],
        judged=own[-1] if own else None,
        failures=_worst(measured[own[-1]], pairs, thumbnails, worst) if own else [],
    )
    durable.write(path, html.encode())


def write_json(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, Any],
    results: Mapping[str, Evaluation | None],
    curve: Sequence[Mapping[str, Any]] | None = None,
    loss: Sequence[tuple[int, float]] | None = None,
) -> None:
    """The report's numbers, intervals included; arguments as in `write_report`."""
    document = {
        "title": title,
        "facts": dict(facts),
        "results": {name: None if found is None else found.to_json(intervals=True) for name, found in results.items()},
        "curve": list(curve or ()),
        "loss": [list(point) for point in loss or ()],
    }
    text = json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n"
    durable.write(path, text.encode())


def line_plot(series: Mapping[str, Sequence[Point]], xlabel: str, ylabel: str, title: str, log_x: bool = False) -> str:
    """An SVG file's text: a line for each series with its interval, as error bars (as a band from 13 points on).

    A series without points is left out.
    """
    series = {name: points for name, points in series.items() if points}

    def draw(axes: Axes) -> None:
        for number, (name, points) in enumerate(series.items()):
            x, mean, low, high = np.asarray(points, float).T
            look: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "label": name, "linewidth": 1.8}
            if len(x) > 12:
                axes.plot(x, mean, **look)
                axes.fill_between(x, low, high, color=look["color"], alpha=0.2, linewidth=0)
            else:
                errors = np.clip([mean - low, high - mean], 0, None)
                marker = MARKERS[number % len(MARKERS)]
                axes.errorbar(x, mean, errors, marker=marker, markersize=5, capsize=3, elinewidth=1.2, **look)
        if log_x:
            axes.set_xscale("log")
            values = sorted({point[0] for points in series.values() for point in points})
            if len(values) <= 8:
                axes.set_xticks(values)
                axes.xaxis.set_major_formatter(ScalarFormatter())
                axes.minorticks_off()

    return plot_svg(draw, xlabel, ylabel, title, legend=len(series) > 1)


def plot_svg(draw: Callable[[Axes], None], xlabel: str, ylabel: str, title: str, legend: bool = True) -> str:
    """An SVG file's text of what `draw` puts on the axes, in the house's style: light or dark as its reader prefers."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):  # so that the clip paths of two plots in a page differ
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_title(title, loc="left", pad=12)
        if legend:
            figure.legend(loc="outside lower center", ncols=3)
        buffer = io.StringIO()
        nameless = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nameless)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"<style.*?</style>", f"<style>{SVG_STYLE}</style>", svg, count=1, flags=re.DOTALL)
    return svg.replace("<svg", f'<svg class="plot" role="img" aria-label="{escape(title)}"', 1)


def _inline(svg: str) -> Markup:
    """An SVG of ours as a part of an HTML page, where it needs no namespaces."""
    return Markup(re.sub(r' xmlns(:xlink)?="[^"]+"', "", svg).replace("xlink:href", "href"))


def _loss_plot(loss: Sequence[tuple[int, float]]) -> str:
    steps, values = np.asarray(loss, float).T
    window = len(values) // 20

    def draw(axes: Axes) -> None:
        axes.plot(steps, values, color=COLOURS[0], linewidth=1, alpha=0.5 if window > 1 else 1, label="loss")
        if window > 1:
            mean = np.convolve(values, np.ones(window) / window, "valid")
            middle = steps[window // 2 :][: len(mean)]
            axes.plot(middle, mean, color=COLOURS[0], linewidth=2, label=f"mean of {window} points")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return plot_svg(draw, "step", "contrastive loss", "Training loss", legend=window > 1)


def _curve_plot(curve: Sequence[Mapping[str, Any]]) -> str:
    series: dict[str, list[Point]] = {}
    for name in ("R@1", "R@5"):
        for point in curve:
            found = point["text_to_video"]
            low, high = found.get("intervals", {}).get(name, (found[name], found[name]))
            series.setdefault(name, []).append((point["step"], found[name], low, high))
    return line_plot(series, "step", "recall, %", "Validation, text → video")


def _rank_plot(measured: Mapping[str, Evaluation]) -> str:
    gallery = max(found.similarity.shape[1] for found in measured.values())
    uppers = [*(edge for edge in RANK_BINS if edge < gallery), gallery]
    lowers = [1, *(edge + 1 for edge in uppers[:-1])]
    names = [str(high) if low == high else f"{low}–{high}" for low, high in zip(lowers, uppers, strict=True)]
    width = 0.8 / len(measured)

    def draw(axes: Axes) -> None:
        for number, (name, found) in enumerate(measured.items()):
            bins = np.searchsorted(uppers, expected_ranks(found.similarity, found.targets))
            share = 100 * np.bincount(bins, minlength=len(uppers)) / len(bins)
            place = np.arange(len(uppers)) + (number - (len(measured) - 1) / 2) * width
            axes.bar(place, share, 0.92 * width, color=COLOURS[number % len(COLOURS)], label=name)
        axes.set_xticks(range(len(uppers)), names, rotation=30 if len(names) > 7 else 0)
        axes.grid(False, axis="x")

    return plot_svg(draw, "rank of the right video", "captions, %", "Ranks, text → video")


def _tables(results: Mapping[str, Evaluation | None]) -> list[dict[str, Any]]:
    """Text → video and video → text: rows of cells for systems by themselves and, apart, for those with a query bank."""
    tables: list[dict[str, Any]] = [
        {"name": "Text → video", "of": "captions", "own": [], "bank": []},
        {"name": "Video → text", "of": "videos, each found by its best caption", "own": [], "bank": []},
    ]
    first = next((found for found in results.values() if found is not None), None)
    for name, found in results.items():
        if found is None:
            for table in tables:
                table["own"].append((name, None, None))
            continue
        bounds = found.intervals()
        sides = [(found.text_to_video, False), (found.video_to_text, True)]
        for recall, backwards in sides[:1] if found.bank_queries else sides:
            table = tables[backwards]
            table.update(queries=recall.queries, gallery=recall.gallery)
            gained = None if first is None or found is first else _gained(first, found, backwards)
            table["bank" if found.bank_queries else "own"].append((name, _cells(recall, bounds[backwards]), gained))
    return [table for table in tables if "queries" in table]


def _cells(recall: Recall, bounds: Mapping[str, tuple[float, float]]) -> list[tuple[str, str]]:
    values = recall.to_json()
    return [(f"{values[name]:.1f}", " – ".join(f"{bound:.1f}" for bound in bounds[name])) for name in METRICS]


def _gained(first: Evaluation, found: Evaluation, backwards: bool) -> Gain:
    if backwards:
        videos = found.video_groups
        return gain(first.video_similarity, found.video_similarity, range(len(videos)), videos)
    return gain(first.similarity, found.similarity, found.targets, found.groups)


def _worst(found: Evaluation, pairs: Sequence[Pair], thumbnails: Thumbnails | None, count: int) -> list[dict[str, Any]]:
    """The captions of the highest ranks, worst first, each with what the system put first instead of its video."""
    rank = expected_ranks(found.similarity, found.targets)
    shown = {target: pair for target, pair in zip(reversed(found.targets), reversed(pairs), strict=True)}

    def picture(pair: Pair | None) -> str | None:
        jpeg = thumbnails(pair.clip) if thumbnails and pair else None
        return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}" if jpeg else None

    failures = []
    for row in np.argsort(-rank, kind="stable")[:count]:
        if rank[row] <= 1:
            break
        scores = found.similarity[row].copy()
        scores[found.targets[row]] = -np.inf
        instead = shown.get(int(scores.argmax()))
        failures.append(
            {
                "pair": pairs[row],
                "rank": f"{rank[row]:g}",
                "gallery": found.similarity.shape[1],
                "picture": picture(pairs[row]),
                "instead": instead,
                "instead_picture": picture(instead),
            }
        )
    return failures


SVG_STYLE = (
    "svg.plot{color:#2b2f36;stroke-linejoin:round;stroke-linecap:butt}"
    "@media(prefers-color-scheme:dark){svg.plot{color:#d5d9e0}}"
)
