"""`polyclip encode`: the backbone's own vectors in a file, and every bad input one line."""

import os
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import adapters_store
from backbone import Adapter, AdapterShape, Backbone, load_backbone
from service.cli.main import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def encode(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`polyclip encode` in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["polyclip", "encode", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return run


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("builtin")


def an_adapter(backbone: Backbone, fingerprint: str) -> bytes:
    shape, generator = AdapterShape(backbone.dims), torch.Generator().manual_seed(0)
    tensors = {name: 0.2 * torch.randn(size, generator=generator) for name, size in shape.layout().items()}
    return adapters_store.pack(shape, fingerprint, tensors)


@pytest.fixture(scope="module")
def files(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encode")
    (folder / "own.safetensors").write_bytes(an_adapter(backbone, backbone.fingerprint))
    (folder / "other.safetensors").write_bytes(an_adapter(backbone, "0" * 64))
    (folder / "garbage.safetensors").write_bytes(b"garbage")
    rng = np.random.default_rng(0)
    bytes_ = rng.integers(0, 256, (35, 3, 64, 64), dtype=np.uint8)  # more than one batch
    floats = rng.standard_normal((3, 3, 64, 64)).astype(np.float32)
    infinite = floats.copy()
    infinite[1, 0, 0, 0] = np.inf
    arrays: dict[str, Any] = {
        "uint8": bytes_, "float32": floats, "fortran": np.asfortranarray(floats), "infinite": infinite,
        "float64": floats.astype(np.float64), "float16": floats.astype(np.float16), "big_endian": floats.astype(">f4"),
        "int64": bytes_.astype(np.int64), "words": np.array(["a"]), "one": floats[0], "none": floats[:0],
        "channels_last": floats.transpose(0, 2, 3, 1), "large": np.zeros((1, 3, 224, 224), np.float32),
        "number": np.float32(1), "objects": np.array([{}], dtype=object),
    }  # fmt: skip
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=name == "objects")
    np.savez(folder / "archive.npz", a=floats)
    good = (folder / "float32.npy").read_bytes()
    (folder / "cut.npy").write_bytes(good[:-1000])
    (folder / "head.npy").write_bytes(good[:20])
    (folder / "empty.npy").write_bytes(b"")
    (folder / "text.npy").write_bytes(b"no numbers")
    (folder / "header.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00(((((((((((((((\n")
    return folder


@pytest.mark.parametrize("adapted", [False, True])
def test_the_vectors_are_the_backbone_s(encode: Run, backbone: Backbone, files: Path, tmp_path: Path, adapted: bool) -> None:
    adapter: Adapter | None = None
    option: tuple[object, ...] = ()
    if adapted:
        adapter = adapters_store.unpack((files / "own.safetensors").read_bytes()).adapter(backbone.fingerprint)
        option = ("--adapter", files / "own.safetensors")
    texts = ["a red ball", "", "snow"]
    code, out, told = encode(*(part for text in texts for part in ("--text", text)), *option, "--out", tmp_path / "vectors")
    assert (code, out.strip(), told) == (0, f"{tmp_path / 'vectors'}: 3 vectors of 128", "")
    vectors = np.load(tmp_path / "vectors")
    assert vectors.dtype == np.float32
    with torch.inference_mode():
        np.testing.assert_allclose(vectors, backbone.encode_text(backbone.tokenize(texts).ids, adapter), atol=1e-5)
        for name in ("uint8", "float32", "fortran"):
            assert encode("--frames", files / f"{name}.npy", *option, "--out", tmp_path / "v.npy")[0] == 0
            expected = backbone.encode_frames(torch.from_numpy(np.load(files / f"{name}.npy")), adapter)
            np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, atol=1e-5)


def test_a_text_that_is_cut_is_told(encode: Run, backbone: Backbone, tmp_path: Path) -> None:
    long = "snow " * 100
    code, _, told = encode("--text", "snow", "--text", long, "--out", tmp_path / "v.npy")
    assert code == 0
    assert told.strip() == "note: text 2 is too long for the backbone; its end was cut off"
    with torch.inference_mode():
        expected = backbone.encode_text(backbone.tokenize(["snow", long]).ids)
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ("float64", "must be float32 or uint8, not float64"),
        ("float16", "not float16"),
        ("big_endian", "not >f4"),
        ("int64", "not int64"),
        ("words", "not <U1"),
        ("one", "(N, 3, H, W), not (3, 64, 64)"),
        ("none", "(N, 3, H, W), not (0, 3, 64, 64)"),
        ("channels_last", "(N, 3, H, W), not (3, 64, 64, 3)"),
        ("number", "(N, 3, H, W), not ()"),
        ("large", "(N, 3, 64, 64), not (1, 3, 224, 224)"),
        ("infinite", "must be finite"),
        ("objects", "not a .npy file of numbers"),
        ("cut", "not a .npy file of numbers"),
        ("head", "not a .npy file of numbers"),
        ("empty", "not a .npy file of numbers"),
        ("text", "not a .npy file of numbers"),
        ("header", "not a .npy file of numbers"),
        ("archive.npz", "one array is wanted"),
        ("missing", "No such file or directory"),
    ],
)
def test_bad_frames_are_one_line(encode: Run, files: Path, tmp_path: Path, frames: str, words: str) -> None:
    path = files / (frames if "." in frames else f"{frames}.npy")
    code, _, told = encode("--frames", path, "--out", tmp_path / "v.npy")
    assert code == 1
    assert words in told and str(path) in told and len(told.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--adapter", "{files}/other.safetensors"), "was trained on backbone 000000000000"),
        (("--adapter", "{files}/garbage.safetensors"), "not an adapter file of polyclip"),
        (("--adapter", "{files}/missing.safetensors"), "No such file or directory"),
        (("--adapter", "{files}"), "Is a directory"),
        (("--backbone", "ViT-Q-1"), "no backbone named 'ViT-Q-1'"),
        (("--backbone", "ViT-B-32"), "needs --pretrained"),
        (("--backbone", "RN50", "--pretrained", "random"), "no plain residual blocks"),
        (("--out", "{files}/none/v.npy"), "there is no such folder"),
        (("--out", "{files}"), "this is a folder, not a file"),
    ],
)
def test_other_mistakes_are_one_line(encode: Run, files: Path, tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    code, _, told = encode("--text", "snow", "--out", tmp_path / "v.npy", *(o.format(files=files) for o in options))
    assert code == 1
    assert words in told and len(told.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [("--out", "v.npy"), ("--text", "a"), ("--text", "a", "--frames", "f.npy", "--out", "v.npy")],
)
def test_wrong_usage_is_status_2(encode: Run, arguments: tuple[str, ...]) -> None:
    assert encode(*arguments)[0] == 2


def test_what_is_there_is_replaced_and_a_link_stays_one(encode: Run, tmp_path: Path) -> None:
    (tmp_path / "v.npy").write_bytes(b"old")
    (tmp_path / "link.npy").symlink_to("v.npy")
    assert encode("--text", "snow", "--out", tmp_path / "link.npy")[0] == 0
    assert (tmp_path / "link.npy").is_symlink()
    assert np.load(tmp_path / "v.npy").shape == (1, 128)
    assert {path.name for path in tmp_path.iterdir()} == {"v.npy", "link.npy"}


def test_a_pipe_is_written_into_and_stays_one(encode: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDWR)
    try:
        assert encode("--text", "snow", "--out", tmp_path / "pipe")[0] == 0
        assert np.load(BytesIO(os.read(reader, 1 << 16))).shape == (1, 128)
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
