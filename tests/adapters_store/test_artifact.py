import json
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

import adapters_store
from adapters_store import AdapterMismatch, Fit, InvalidAdapter, RankTooLarge, describe, pack, read, unpack, write
from backbone import VOCABULARY_ROWS, AdapterShape, TowerDims

DIMS = TowerDims(192, 6, 128, 4)
SHAPE = AdapterShape(DIMS, rank=4, shared=8)
FINGERPRINT = "f" * 64
TOKENS = 1000


def packed(seed: int = 0, shape: AdapterShape = SHAPE) -> bytes:
    return pack(shape, FINGERPRINT, shape.initial(seed))


def test_equal_tensors_give_equal_bytes_and_one_digest() -> None:
    assert packed() == packed()
    assert unpack(packed()).digest != unpack(packed(seed=1)).digest


SHAPES = [SHAPE, AdapterShape(DIMS, 2, 0), AdapterShape(DIMS, 3, 128), AdapterShape(DIMS, 2, 0, "text")]


@pytest.mark.parametrize("shape", SHAPES)
def test_what_was_packed_is_what_is_unpacked(shape: AdapterShape) -> None:
    tensors = shape.initial(5)
    artifact = unpack(pack(shape, FINGERPRINT, tensors))
    assert artifact.shape == shape
    assert artifact.backbone == FINGERPRINT
    assert all(torch.equal(artifact.tensors[name], tensor) for name, tensor in tensors.items())


def test_the_digest_covers_the_backbone_too() -> None:
    assert unpack(pack(SHAPE, "a" * 64, SHAPE.initial(0))).digest != unpack(packed()).digest


def test_an_adapter_of_another_backbone_is_refused_in_words() -> None:
    with pytest.raises(AdapterMismatch, match="was trained on backbone ffffffffffff"):
        unpack(packed()).adapter("0" * 64)


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x00" * 64, b"\xff" * 4096, packed()[:-10], packed()[:100]])
def test_garbage_is_refused_in_one_line(data: bytes) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        unpack(data)
    assert "\n" not in str(caught.value)


def test_foreign_safetensors_is_refused() -> None:
    with pytest.raises(InvalidAdapter):
        unpack(safetensors.torch.save({"weight": torch.zeros(3)}))


def test_a_tensor_that_is_not_finite_is_refused() -> None:
    tensors = SHAPE.initial(0)
    tensors["vt_adapter_up_share_bias"][0, 0] = float("nan")
    with pytest.raises(InvalidAdapter, match="finite"):
        unpack(pack(SHAPE, FINGERPRINT, tensors))


def test_a_missing_tensor_and_a_wrong_shape_are_refused() -> None:
    metadata = {"adapter": json.dumps({"backbone": "x", "rank": 4, "shared": 8, "scope": "both", "visual_width": 192,
                                       "visual_layers": 6, "text_width": 128, "text_layers": 4})}  # fmt: skip
    tensors = SHAPE.initial(0)
    tensors.pop("text_adapter_down_bias")
    with pytest.raises(InvalidAdapter, match="text_adapter_down_bias"):
        unpack(safetensors.torch.save(tensors, metadata))
    tensors["text_adapter_down_bias"] = torch.zeros(1, 1)
    with pytest.raises(InvalidAdapter, match="text_adapter_down_bias"):
        unpack(safetensors.torch.save(tensors, metadata))


def test_published_files_belong_together(tmp_path: Path) -> None:
    data = packed()
    manifest = describe(data, recipe={"rank": 4}, metrics={"after": {}}, parent=None)
    write(tmp_path, data, manifest)
    assert read(tmp_path) == (data, manifest)
    assert manifest.parameters == SHAPE.parameters
    assert not list(tmp_path.glob("*.part"))
    (tmp_path / "adapter.safetensors").write_bytes(packed(seed=1))
    with pytest.raises(InvalidAdapter, match="another adapter"):
        read(tmp_path)


def test_a_file_over_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters_store.artifact, "MAX_BYTES", 100)
    with pytest.raises(InvalidAdapter, match="100 bytes"):
        unpack(packed())


def claiming(**claims: object) -> bytes:
    """An adapter file of a few hundred bytes, without tensors, that claims to be larger than it is."""
    dims = {"visual_width": 192, "visual_layers": 6, "text_width": 128, "text_layers": 4}
    about = {"backbone": FINGERPRINT, "rank": 4, "shared": 8, "scope": "both", **dims, **claims}
    header = json.dumps({"__metadata__": {"format": "polyclip-adapter/1", "adapter": json.dumps(about)}}).encode()
    return len(header).to_bytes(8, "little") + header


NUMBERS = ("visual_width", "visual_layers", "text_width", "text_layers", "rank", "shared")


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [10**9, 10**30, -1, 4.5, 4.0, float("inf"), float("nan"), "4", True, None, [4]])
def test_a_number_of_the_header_is_believed_within_the_limits_only(
    name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def layout(shape: AdapterShape) -> None:
        raise AssertionError(f"the tensors of {shape} were listed")

    monkeypatch.setattr(AdapterShape, "layout", layout)
    with pytest.raises(InvalidAdapter, match=name):
        unpack(claiming(**{name: value}))


def test_claims_are_compared_with_the_tensors_before_one_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors.torch, "load", lambda data: pytest.fail("tensors were built"))
    with pytest.raises(InvalidAdapter, match="missing"):
        unpack(claiming(visual_layers=1000, text_layers=1000, rank=60_000))
    with pytest.raises(InvalidAdapter, match="header"):
        unpack((1 << 20).to_bytes(8, "little") + b"{" * (1 << 20))


def test_an_adapter_that_comes_in_fits_the_backbone_and_the_largest_rank() -> None:
    fit = Fit(FINGERPRINT, DIMS, TOKENS, rank=4)
    assert unpack(packed(), fit).shape == SHAPE
    with pytest.raises(RankTooLarge, match="rank 4, the largest that is taken here is 3"):
        unpack(packed(), Fit(FINGERPRINT, DIMS, TOKENS, rank=3))
    with pytest.raises(AdapterMismatch, match="towers"):
        unpack(packed(), Fit(FINGERPRINT, TowerDims(192, 6, 128, 5), TOKENS, rank=4))
    with pytest.raises(AdapterMismatch, match="backbone"):
        unpack(packed(), Fit("0" * 64, DIMS, TOKENS, rank=4))


@pytest.mark.parametrize("value", [3e38, -3e38, 2e4])
def test_weights_that_would_leave_the_range_of_floats_do_not_come_in(value: float) -> None:
    tensors = SHAPE.initial(0)
    tensors["text_adapter_down_weight"][0, 0, 0] = value
    with pytest.raises(InvalidAdapter, match="text_adapter_down_weight"):
        unpack(pack(SHAPE, FINGERPRINT, tensors), Fit(FINGERPRINT, DIMS, TOKENS, rank=4))


RICH = AdapterShape(DIMS, rank=4, shared=8, vocabulary=(7, 9, 400))


def with_rows(**changed: torch.Tensor) -> bytes:
    """The file of an adapter with vocabulary rows, whose tensors are as given."""
    data = packed(shape=RICH)
    with safetensors.safe_open(_saved(data), "pt") as file:
        about = file.metadata()
    return safetensors.torch.save({**safetensors.torch.load(data), **changed}, about)


def _saved(data: bytes) -> str:
    path = Path(tempfile.mkdtemp()) / "adapter.safetensors"
    path.write_bytes(data)
    return str(path)


def test_vocabulary_rows_are_packed_with_their_tokens() -> None:
    tensors = {**RICH.initial(1), "vocabulary_rows": torch.randn(3, 128)}
    data = pack(RICH, FINGERPRINT, tensors)
    artifact = unpack(data, Fit(FINGERPRINT, DIMS, TOKENS, rank=4))
    assert artifact.shape == RICH and torch.equal(artifact.tensors["vocabulary_rows"], tensors["vocabulary_rows"])
    assert unpack(with_rows()).shape == RICH
    manifest = describe(data, words=["kilo"])
    assert (manifest.vocabulary, manifest.words, manifest.parameters) == (3, ["kilo"], SHAPE.parameters + 3 * 128)


LONG = VOCABULARY_ROWS + 1


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"vocabulary_ids": torch.tensor([7, 7, 9], dtype=torch.int32)}, "ascending"),
        ({"vocabulary_ids": torch.tensor([9, 7, 11], dtype=torch.int32)}, "ascending"),
        ({"vocabulary_ids": torch.tensor([-1, 7, 11], dtype=torch.int32)}, "not negative"),
        ({"vocabulary_ids": torch.tensor([7, 9, TOKENS], dtype=torch.int32)}, f"token {TOKENS}, the backbone knows {TOKENS}"),
        ({"vocabulary_ids": torch.tensor([7, 9, 11])}, "int32"),
        ({"vocabulary_ids": torch.tensor([[7, 9, 11]], dtype=torch.int32)}, "int32"),
        ({"vocabulary_ids": torch.tensor([7, 9], dtype=torch.int32)}, r"shape \(3, 128\), not \(2, 128\)"),
        ({"vocabulary_rows": torch.zeros(3, 127)}, r"shape \(3, 127\), not \(3, 128\)"),
        ({"vocabulary_rows": torch.full((3, 128), torch.nan)}, "finite"),
        ({"vocabulary_rows": torch.full((3, 128), 2e4)}, "vocabulary_rows"),
        (
            {"vocabulary_ids": torch.arange(LONG, dtype=torch.int32), "vocabulary_rows": torch.zeros(LONG, 128)},
            f"1 to {VOCABULARY_ROWS} vocabulary rows, this one has {LONG}",
        ),
    ],
)
def test_vocabulary_rows_that_do_not_fit_are_refused_in_one_line(tensors: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(InvalidAdapter, match=words) as caught:
        unpack(with_rows(**tensors), Fit(FINGERPRINT, DIMS, TOKENS, rank=4))
    assert "\n" not in str(caught.value)


def test_rows_without_tokens_are_refused() -> None:
    data = safetensors.torch.load(with_rows())
    for missing in ("vocabulary_ids", "vocabulary_rows"):
        kept = {name: tensor for name, tensor in data.items() if name != missing}
        with safetensors.safe_open(_saved(with_rows()), "pt") as file:
            broken = safetensors.torch.save(kept, file.metadata())
        with pytest.raises(InvalidAdapter, match="vocabulary_rows"):
            unpack(broken)
