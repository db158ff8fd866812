"""Where captioned videos come from: a published data set on disk, a JSONL of files, or a JSONL of cached frames."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from backbone import Form
from training.corpora import Corpus, cache_frames, load_corpus
from training.dataset import CACHED_FRAMES, Dataset, load_dataset
from training.progress import Tell


@dataclass(frozen=True, slots=True)
class Source:
    """Either `dataset`, a JSONL of cached frames, or the published data set `data` below `root` (jsonl: the file itself)."""

    dataset: Path | None = None
    data: str | None = None
    root: Path | None = None
    variant: str | None = None
    cache: Path | None = None  # of decoded frames; None: beside the data
    allow_missing: bool = False

    def corpus(self) -> Corpus | None:
        """The published data set, read and checked. Raises InvalidCorpus."""
        if self.data is None or self.root is None:
            return None
        return load_corpus(self.data, self.root, variant=self.variant, allow_missing=self.allow_missing)

    def load(
        self,
        corpus: Corpus | None,
        scratch: Path,
        form: Form | int,
        report: Tell,
        decode: bool = True,
    ) -> Dataset:
        """The captioned videos with their pixels; a published data set's videos are decoded once, into its cache.

        `decode` False: another rank has done that already. Raises InvalidCorpus, InvalidDataset, DamagedFrames, OSError.
        """
        if corpus is None:
            assert self.dataset is not None
            return load_dataset(self.dataset, scratch, form, CACHED_FRAMES, decode)
        assert self.root is not None
        listing = scratch / "dataset.jsonl"
        if decode:
            written = cache_frames(
                corpus,
                self.cache or (self.root if self.root.is_dir() else self.root.parent) / "frames",
                workers=os.cpu_count() or 1,
                allow_missing=self.allow_missing,
                side=form if isinstance(form, int) else form.side,
                progress=report,
            )
            shutil.copyfile(written, listing)
        return load_dataset(listing, scratch, form, corpus.frames, decode)
