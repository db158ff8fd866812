"""open_clip's byte-pair tokenizer, with the pairs of a word merged by the package `tokenizers`.

open_clip takes time that grows with the square of a word's length, and keeps every word for ever. Here the time grows with the
length and the words kept are bounded; the ids are the same.
"""

from __future__ import annotations

from typing import Any

import open_clip
from tokenizers.models import BPE

KEPT_WORDS = 10_000  # of at most 256 bytes each: longer ones are not kept


def bounded(tokenizer: Any) -> Any:
    """The tokenizer, changed so if it is open_clip's own; one of another kind as it is."""
    if not isinstance(tokenizer, open_clip.SimpleTokenizer):
        return tokenizer
    special = dict(tokenizer.cache)  # the start and end tokens, written out
    pairs = BPE(tokenizer.encoder, list(tokenizer.bpe_ranks), end_of_word_suffix="</w>", cache_capacity=KEPT_WORDS)

    def merge(word: str) -> str:
        """The parts of a word, which stand in the vocabulary, with blanks between."""
        return special.get(word) or " ".join(part.value for part in pairs.tokenize(word))

    tokenizer.bpe = merge
    return tokenizer
