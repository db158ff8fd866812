"""Evaluation of a backbone, with and without an adapter, on a split of captioned videos: figures and report."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import adapters_store
from backbone import TEMPERATURE, Adapter, load_backbone
from training.dataset import InvalidDataset
from training.evaluation import Evaluation, evaluate
from training.progress import Tell
from training.report import write_json, write_report
from training.source import Source

SHARE = 0.2  # of the training videos, where the data set names none for validation


def assess(
    source: Source,
    split: str,
    backbone_name: str,
    pretrained: str | None,
    adapter: Path | None,
    device: str,
    query_bank: bool,
    report: Path | None,
    tell: Tell,
) -> dict[str, dict[str, Any]]:
    """Metrics of each system by name: the frozen backbone, the adapter, and each with a query bank of training captions.

    `report`: the HTML file to write, with the same figures as JSON beside it. Raises InvalidCorpus, InvalidDataset,
    InvalidAdapter, AdapterMismatch, BackboneNotFound, OSError.
    """
    corpus = source.corpus()
    backbone = load_backbone(backbone_name, pretrained, device)
    systems: dict[str, Adapter | None] = {"frozen backbone": None}
    if adapter is not None:
        artifact = adapters_store.unpack(adapter.read_bytes())
        systems[f"adapter {artifact.digest[:12]}"] = artifact.adapter(backbone.fingerprint).to(backbone.device)
    with TemporaryDirectory() as folder:
        dataset = source.load(corpus, Path(folder), backbone.form, tell)
        splits = dataset.split(SHARE)
        pairs = {"train": splits.train, "validation": splits.validation, "test": splits.test}[split]
        if not pairs:
            raise InvalidDataset(f"the split {split!r} is empty")
        words = None if corpus is None else corpus.words
        results: dict[str, Evaluation] = {}
        bank = [pair.text for pair in splits.train] if query_bank else []
        for name, system in systems.items():
            found = evaluate(backbone, system, dataset.clips, pairs, TEMPERATURE, words=words, bank=bank)
            results |= {name: found} | ({f"{name}, query bank": found.with_query_bank()} if bank else {})
        if report is not None:
            about = {"backbone": backbone.name, "split": split, "data": source.data or str(source.dataset), "words": words}
            told: dict[str, Any] = {"title": "Evaluation", "facts": about, "results": results}
            write_report(report, pairs=pairs, thumbnails=dataset.thumbnail, **told)
            write_json(report.with_suffix(".json"), **told)
    return {name: found.to_json(intervals=True) for name, found in results.items()}
