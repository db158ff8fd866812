"""Texts become the ids that open_clip gives them, in time that grows with their length, and no word is kept for ever."""

from __future__ import annotations

import sys
from typing import Any

import open_clip
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbone import load_backbone
from backbone.tokenizer import bounded

PLAIN, BOUNDED = open_clip.SimpleTokenizer(), bounded(open_clip.SimpleTokenizer())


PIECES = st.lists(st.sampled_from(["aaaa", "dog", "ß", "🐕", "7"])).map("".join)
ODD = ["", "<start_of_text> a dog <end_of_text>", "it's 1,000 red-hot PANS", "x" * 400, "ab" * 300 + " cd"]


@given(st.text(max_size=60) | st.text("abcdefgh' ", max_size=60) | PIECES)
def test_ids_are_open_clips(text: str) -> None:
    assert BOUNDED.encode(text) == PLAIN.encode(text)


@pytest.mark.parametrize("text", ODD)
def test_ids_of_odd_texts_are_open_clips(text: str) -> None:
    assert BOUNDED.encode(text) == PLAIN.encode(text)


def test_no_text_is_merged_by_open_clips_quadratic_loop_nor_kept_in_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def quadratic(word: Any) -> None:
        raise AssertionError("the pairs of the whole word are looked at for each merge")

    monkeypatch.setattr(sys.modules["open_clip.tokenizer"], "get_pairs", quadratic)
    for name in ("builtin", "ViT-B-32"):
        backbone = load_backbone(name, None if name == "builtin" else "random")
        before = dict(backbone._tokenizer.cache)
        tokens = backbone.tokenize(["x" * 10_000, "a dog runs"])
        assert tokens.truncated == (True, False)
        assert backbone._tokenizer.cache == before
