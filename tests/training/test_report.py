import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from training.dataset import Pair
from training.evaluation import Evaluation
from training.report import line_plot, write_json, write_report

HOSTILE = "<script>alert('harbour')</script> https://example.invalid/x.js"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Raises on a tag that closes what is not open; collects tags, their attributes, text and identifiers."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute of <{tag}> stands twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


def example() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    pairs = [Pair(clip, f"caption {number} of clip {clip}", f"video-{clip}") for clip in range(30, 60) for number in (0, 1)]
    pairs[0] = replace(pairs[0], text=HOSTILE, video='"><script>v</script>')
    targets, videos = [pair.clip - 30 for pair in pairs], [pair.video for pair in pairs]
    before = rng.normal(size=(60, 30)).astype(np.float32)
    after = before.copy()
    after[np.arange(60), targets] += 2
    after[0, targets[0]] = -9
    adapter = Evaluation.of(after, targets, videos)
    return {
        "title": "Adapter <1>",
        "facts": {"backbone": "builtin", "learning rate": 0.003, "note": "<b>bold</b>"},
        "results": {
            "zero-shot": Evaluation.of(before, targets, videos),
            "adapter": adapter,
            "text only": None,
            "adapter + QB-Norm": adapter.with_query_bank(rng.normal(size=(50, 30)).astype(np.float32)),
        },
        "pairs": pairs,
        "curve": [
            {"step": 0, "text_to_video": {"R@1": 10.0, "R@5": 30.0}},
            {"step": 9, "text_to_video": {"R@1": 40.0, "R@5": 60.0, "intervals": {"R@1": [30, 50], "R@5": [50, 70]}}},
        ],
        "loss": [(step, 3 / step) for step in range(1, 60)],
        "thumbnails": lambda clip: b"\xff\xd8picture %d" % clip if clip % 2 else None,
    }


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, **example())
    return path.read_text(encoding="utf-8")


def test_a_report_is_well_formed_and_its_identifiers_are_unique(html: str) -> None:
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("svg") == 3
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names))
    assert {name[1:] for name in re.findall(r"#[mp][0-9a-f]{10}\b", html)} == set(names)


def test_a_report_needs_nothing_else(html: str) -> None:
    page = Page(html)
    sources = [value or "" for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert sources
    assert all(source.startswith(("#", "data:image/jpeg;base64,")) for source in sources)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert "http" not in html.replace(str(HOSTILE.split()[-1]), "").replace("http-equiv", "")


def test_captions_names_and_facts_are_text(html: str) -> None:
    assert "<script" not in html
    assert "<b>bold" not in html
    text = Page(html).text
    assert HOSTILE in text
    assert '"><script>v</script>' in text
    assert "Adapter <1>" in text


def test_the_worst_query_comes_first_with_what_was_found_instead(html: str) -> None:
    text = re.sub(r"\s+", " ", Page(html).text)
    worst = text[text.index("Worst queries of adapter ") :]
    similarity = example()["results"]["adapter"].similarity
    assert worst.index(HOSTILE) < 120
    assert worst.split("found first instead", 1)[1].split()[:5] == f"caption 0 of clip {30 + similarity[0].argmax()}".split()


def test_systems_stand_side_by_side_and_a_query_bank_apart(html: str) -> None:
    text = re.sub(r"\s+", " ", Page(html).text)
    table, backwards = text.split("Text → video ", 1)[1].split("Video → text ", 1)
    assert "60 captions, gallery of 30" in table
    names = ["zero-shot", "adapter", "text only not measured", "With a query bank", "adapter + QB-Norm"]
    places = [table.index(name) for name in names]
    assert places == sorted(places)
    assert "adapter + QB-Norm" not in backwards[: backwards.index("Plots")], "a bank of captions changes text → video only"
    measured = example()["results"]["adapter"]
    low, high = measured.intervals()[0]["R@1"]
    assert f"{measured.text_to_video.r1:.1f}{low:.1f} – {high:.1f}" in table


def test_equal_input_gives_equal_bytes(tmp_path: Path, html: str) -> None:
    write_report(tmp_path / "again.html", **example())
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == html


def test_a_report_of_little_is_still_a_report(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", title="Nothing", facts={}, results={"adapter": None}, pairs=[])
    assert "Nothing" in Page((tmp_path / "r.html").read_text()).text
    perfect = Evaluation.of(np.eye(3, dtype=np.float32), range(3))
    pairs = [Pair(clip, "words", str(clip)) for clip in range(3)]
    write_report(tmp_path / "r.html", title="All found", facts={}, results={"adapter": perfect}, pairs=pairs)
    text = (tmp_path / "r.html").read_text()
    assert "Worst queries" not in Page(text).text
    banked = {"zero-shot": None, "with a bank": perfect.with_query_bank(np.eye(3, dtype=np.float32))}
    write_report(tmp_path / "r.html", title="Only a bank", facts={}, results=banked, pairs=pairs, loss=[(1, 2.0)])
    text = Page((tmp_path / "r.html").read_text()).text
    assert "Text → video" in text
    assert "Video → text" not in text


def test_a_report_of_other_captions_is_refused_and_the_old_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    path.write_text("old")
    given = example()
    with pytest.raises(ValueError, match="zero-shot has 60 queries, there are 59 captions"):
        write_report(path, **(given | {"pairs": given["pairs"][1:]}))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_json_has_the_same_numbers(tmp_path: Path) -> None:
    given = {name: value for name, value in example().items() if name not in ("pairs", "thumbnails")}
    write_json(tmp_path / "r.json", **given)
    found = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert list(found["results"]) == list(given["results"])
    assert found["results"]["text only"] is None
    assert found["results"]["adapter"] == json.loads(json.dumps(given["results"]["adapter"].to_json(intervals=True)))
    assert found["loss"][0] == [1, 3.0]
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize("points", [3, 40])
def test_a_plot_is_an_svg_file_of_its_series(points: int) -> None:
    series = {name: [(2.0**x, x, x - 1.0, x + 1.0) for x in range(points)] for name in ("adapter & text", "full $x$")}
    svg = line_plot(series, "captions", "R@1, %", "Recall <over> captions", log_x=True)
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == "Recall <over> captions"
    text = "".join(root.itertext())
    assert all(word in text for word in ("adapter & text", "full $x$", "captions", "R@1, %", "Recall <over> captions"))
    assert svg == line_plot(series, "captions", "R@1, %", "Recall <over> captions", log_x=True)
    assert ("fill-opacity: 0.2" in svg) == (points == 40), "a band where error bars would be too dense"


def test_a_plot_leaves_the_settings_of_others_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    line_plot({"a": [(0, 1, 0, 2), (1, 2, 1, 3)]}, "x", "y", "t")
    assert dict(matplotlib.rcParams) == before
