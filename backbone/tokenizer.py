"""From texts to token ids: open_clip's byte-pair tokenizer, and those that lie in a folder.

open_clip merges the pairs of a word in time that grows with the square of its length, and keeps every word for ever. Here the
package `tokenizers` merges them: the time grows with the length and the words kept are bounded; the ids are the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import get_clean_fn
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor

FILES = "tokenizer.json", "tokenizer_config.json"  # as the package transformers saves a tokenizer
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


class FolderTokenizer:
    """A tokenizer saved by the package transformers, with open_clip's cleaning before it; ids are filled up on the right.

    Raises ValueError or OSError where the folder holds none, or one of more ids than `vocabulary`.
    """

    def __init__(self, folder: Path, context_length: int, vocabulary: int, clean: str = "whitespace") -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / FILES[0]))
        except Exception as error:  # the package raises no other kind
            raise ValueError(f"{FILES[0]}: {error}") from error
        config = json.loads((folder / FILES[1]).read_text())
        if config.get("padding_side", "right") != "right":
            raise ValueError(f"{FILES[1]} fills up on the left")
        if (size := self._tokenizer.get_vocab_size()) > vocabulary:
            raise ValueError(f"{size} ids, the text tower knows {vocabulary}")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._clean, self._length = get_clean_fn(clean), context_length
        plain, whole = (self._tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
        first = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        self._start, self._end = whole[:first], whole[first + len(plain) :]
        for flag, own in (("add_bos_token", self._start), ("add_eos_token", self._end)):
            if config.get(flag, bool(own)) != bool(own):  # the versions of transformers differ in which file they believe
                raise ValueError(f"{FILES[0]} and {FILES[1]} disagree on {flag}")
        self.pad = self._id(config, "pad_token")
        self.specials = len(self._start) + len(self._end)

    def _id(self, config: dict[str, Any], kind: str) -> int:
        token = config.get(kind)
        found = self._tokenizer.token_to_id(str(token["content"] if isinstance(token, dict) else token))
        if found is None:
            raise ValueError(f"{FILES[1]} names no {kind} of {FILES[0]}")
        return found

    def encode(self, text: str) -> list[int]:
        """The text's own ids."""
        return list(self._tokenizer.encode(self._clean(text), add_special_tokens=False).ids)

    def __call__(self, texts: Sequence[str], context_length: int | None = None) -> Tensor:
        """(texts, context_length) int64."""
        length = context_length or self._length
        ids = torch.full((len(texts), length), self.pad, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            own = self._start + self.encode(text)[: length - self.specials] + self._end
            row[: len(own)] = torch.tensor(own)
        return ids
