import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

import adapters_store
from adapters_store import AdapterMismatch, InvalidAdapter, describe, pack, read, unpack, write
from backbone import AdapterShape, TowerDims

DIMS = TowerDims(192, 6, 128, 4)
SHAPE = AdapterShape(DIMS, rank=4, shared=8)
FINGERPRINT = "f" * 64


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
