"""What a process computes with: its threads, its precision, and that neither decides what is found."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from backbone import Graphs
from service.adapters.encoder import Encoder
from service.cli.parts import Parts
from service.settings import Settings


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def vector(encoder: Encoder) -> NDArray[np.float32]:
    tokens = encoder.backbone.tokenize(["two red balls in the snow"]).ids
    return encoder.texts.submit((tokens[0], None)).result()


@pytest.mark.parametrize("wanted", [1, 2])
def test_the_threads_of_a_forward_are_those_that_were_set(tmp_path: Path, threads: int, wanted: int) -> None:
    parts = Parts.over(Settings(data=tmp_path, device="cpu", threads=wanted))
    seen: list[int] = []
    encode = parts.encoder.backbone.encode_text
    parts.encoder.backbone.encode_text = lambda *a, **k: seen.append(torch.get_num_threads()) or encode(*a, **k)  # type: ignore
    vector(parts.encoder)
    parts.close()
    assert seen == [wanted], "in the batcher's thread, before its first forward"


def test_threads_that_wait_give_their_core_away() -> None:
    """It must be said before torch is loaded."""
    story = """
import os, sys
from service.cli import main
main.app = lambda: print(os.environ["GOMP_SPINCOUNT"], "torch" in sys.modules)
main.main()
"""
    found = subprocess.run([sys.executable, "-c", story], capture_output=True, text=True, env={}, check=True)
    assert found.stdout.split() == ["10000", "False"]


def test_another_precision_searches_the_same_data(tmp_path: Path) -> None:
    vectors, dtypes = [], []
    for precision in ("float32", "bfloat16"):
        parts = Parts.over(Settings(data=tmp_path, device="cpu", precision=precision))
        vectors.append(vector(parts.encoder))  # the second would raise OtherBackbone
        dtypes.append(parts.encoder.residency.stack._memory.dtype)
        parts.close()
    assert dtypes == [torch.float32, torch.bfloat16]
    assert 0 < np.linalg.norm(vectors[1] - vectors[0]) < 1e-2 * np.linalg.norm(vectors[0])


def test_on_a_gpu_every_size_is_captured_before_the_first_query(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts.over(Settings(data=tmp_path, device="cpu", batch_texts=2, batch_frames=1))
    graphs = Graphs(parts.encoder.backbone, parts.encoder.residency.stack, 2, 1)
    monkeypatch.setattr(Encoder, "_encoder", graphs)  # as on a GPU
    parts.encoder.warm()
    known = dict(graphs._captured)
    assert len(known) == 2 * 5 + 1
    assert np.isfinite(vector(parts.encoder)).all() and graphs._captured == known
    parts.close()
