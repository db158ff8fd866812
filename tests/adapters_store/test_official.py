"""Checkpoints of the paper's released code: in and out bit for bit, and every bad one refused in one line."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import torch
from torch import Tensor

from adapters_store import InvalidAdapter, from_official, pack, read_state, to_official, unpack
from backbone import AdapterShape, TowerDims, load_backbone
from service.cli.main import main

B32 = TowerDims(768, 12, 512, 12)
DIMS = TowerDims(visual_width=64, visual_layers=2, text_width=32, text_layers=2)
FINGERPRINT = "f" * 64
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 2},
}


def released(
    r: int = 4, d_s: int = 8, dtype: torch.dtype = torch.float16, prefix: str = "clip.", dims: TowerDims = DIMS
) -> dict[str, Tensor]:
    """What the released code's CLIP has as parameters, with the presence rules of its constructor."""
    v, t, places = dims.visual_width, dims.text_width, 2 * dims.visual_layers
    shapes = {
        "visual_adapter_down_weight": (places, r, v),
        "visual_adapter_down_bias": (places, r),
        "visual_adapter_up_unique_weight": (places, v - d_s, r),
        "visual_adapter_up_unique_bias": (places, v - d_s),
        "text_adapter_down_weight": (places, r, t),
        "text_adapter_down_bias": (places, r),
    }
    if t - d_s > 0:
        shapes["text_adapter_up_unique_weight"] = (places, t - d_s, r)
        shapes["text_adapter_up_unique_bias"] = (places, t - d_s)
    if d_s > 0:
        shapes["vt_adapter_up_share_weight"] = (places, d_s, r)
        shapes["vt_adapter_up_share_bias"] = (places, d_s)
    generator = torch.Generator().manual_seed(r + d_s)
    return {prefix + name: (0.1 * torch.randn(size, generator=generator)).to(dtype) for name, size in shapes.items()}


def bare(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.rsplit(".", 1)[-1]: tensor for key, tensor in state.items()}


def assert_same(left: Any, right: dict[str, Tensor]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        assert left[name].dtype == tensor.dtype and left[name].shape == tensor.shape, name
        assert torch.equal(left[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def save(state: Any, path: Path) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A backbone of DIMS that open_clip knows by name."""
    path = tmp_path_factory.mktemp("configs") / "tiny-for-official.json"
    path.write_text(json.dumps(TINY))
    open_clip.add_model_config(path)
    assert load_backbone(path.stem, "random").dims == DIMS
    return path.stem


@pytest.fixture
def polyclip(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process, where the tiny backbone is known: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["polyclip", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return run


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("d_s", [0, 1, 8, 31, 32])
@pytest.mark.parametrize("prefix", ["", "clip.", "module.clip.", "module."])
def test_a_checkpoint_comes_back_bit_for_bit(dtype: torch.dtype, d_s: int, prefix: str) -> None:
    state = released(4, d_s, dtype, prefix)
    others = {f"{prefix}visual.proj": torch.zeros(2), f"{prefix}logit_scale": torch.tensor(float("nan"))}
    shape, tensors, source = from_official({**others, **state}, DIMS)
    assert (shape, f"torch.{source}") == (AdapterShape(DIMS, 4, d_s), str(dtype))
    assert all(torch.equal(tensors[name], bare(state)[name].float()) for name in shape.layout())
    artifact = unpack(pack(shape, FINGERPRINT, tensors, source))
    assert artifact.source_dtype == source
    assert_same(to_official(artifact), released(4, d_s, dtype))


@pytest.mark.parametrize("d_s", [0, 8, 16, 64, 512])
def test_the_paper_s_own_dimensions_come_back_bit_for_bit(d_s: int) -> None:
    state = released(16, d_s, dims=B32)
    shape, tensors, source = from_official(state, B32)
    assert_same(to_official(unpack(pack(shape, FINGERPRINT, tensors, source))), state)


def test_every_float16_number_survives() -> None:
    """Subnormal ones, both zeros and the largest too."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    numbers = numbers[torch.isfinite(numbers)]
    state = released(64, 8, dims=B32)
    weight = state["clip.visual_adapter_down_weight"]
    weight.flatten()[: len(numbers)] = numbers
    shape, tensors, source = from_official(state, B32)
    assert_same(to_official(unpack(pack(shape, FINGERPRINT, tensors, source))), state)


def test_towers_of_equal_width_keep_the_empty_rows_that_the_released_code_has() -> None:
    dims = TowerDims(32, 2, 32, 2)
    state = released(4, 32, dims=dims)
    assert state["clip.visual_adapter_up_unique_weight"].shape == (4, 0, 4)
    shape, tensors, source = from_official(state, dims)
    assert_same(to_official(unpack(pack(shape, FINGERPRINT, tensors, source))), state)


@pytest.mark.parametrize("family", ["vt_adapter_up_share", "text_adapter_up_unique"])
def test_empty_rows_may_be_there_or_not(family: str) -> None:
    d_s = 0 if family.startswith("vt") else 32
    state = released(4, d_s)
    shape, tensors, _ = from_official(state, DIMS)
    state |= {f"clip.{family}_weight": torch.zeros(4, 0, 4), f"clip.{family}_bias": torch.zeros(4, 0)}
    again, same, _ = from_official(state, DIMS)
    assert again == shape
    assert_same(same, tensors)


def test_of_several_dtypes_the_wider_is_kept() -> None:
    state = released()
    state["clip.visual_adapter_down_bias"] = torch.full((4, 4), 0.1)
    _, tensors, source = from_official(state, DIMS)
    assert source == "float32"
    assert torch.equal(tensors["visual_adapter_down_bias"], torch.full((4, 4), 0.1))


def test_a_digest_without_a_source_is_what_it_was() -> None:
    shape = AdapterShape(DIMS, 4, 8)
    tensors = {name: torch.arange(torch.Size(size).numel()).float().view(size) for name, size in shape.layout().items()}
    data = pack(shape, FINGERPRINT, tensors)
    assert unpack(data).source_dtype is None
    assert hashlib.sha256(data).hexdigest() == "d571a635f4986f6d6edc011ae9cbcb69cda13dcd07596217bb93f756408f0402"
    assert unpack(pack(shape, FINGERPRINT, tensors, "float16")).digest != unpack(data).digest
    with pytest.raises(InvalidAdapter, match="source dtype"):
        unpack(pack(shape, FINGERPRINT, tensors, "float8"))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_state_is_read_from_either_format(tmp_path: Path, suffix: str) -> None:
    assert_same(read_state(save(released(), tmp_path / f"a{suffix}")), released())


@pytest.mark.parametrize("nest", ["state_dict", "model_state_dict", "model"])
def test_a_state_is_read_from_one_level_down(tmp_path: Path, nest: str) -> None:
    path = save({"epoch": 3, nest: released(), "optimizer": {"state": [1]}}, tmp_path / "a.pt")
    assert_same(read_state(path), released())


def test_a_file_of_an_old_torch_and_one_of_another_name_are_read(tmp_path: Path) -> None:
    torch.save(released(), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert_same(read_state(tmp_path / "old.bin"), released())
    os.rename(save(released(), tmp_path / "a.safetensors"), tmp_path / "pytorch_model.bin.5")
    assert_same(read_state(tmp_path / "pytorch_model.bin.5"), released())


def changed(**tensors: Tensor | None) -> dict[str, Tensor]:
    """A good checkpoint with some tensors replaced, or taken out where they are None."""
    state = released() | {f"clip.{name}": tensor for name, tensor in tensors.items() if tensor is not None}
    return {key: tensor for key, tensor in state.items() if tensors.get(key.removeprefix("clip."), key) is not None}


NAN = torch.full((4, 4), float("nan"))
BAD_STATES: dict[str, tuple[dict[str, Tensor], str]] = {
    "clip alone": ({"clip.visual.proj": torch.zeros(2)}, "no adapter tensors"),
    "nothing": ({}, "no adapter tensors"),
    "another width": (released(dims=B32), "another backbone: vision width 768 with 12 layers and text width 512"),
    "another depth": (released(dims=TowerDims(64, 3, 32, 3)), "another backbone: vision width 64 with 3 layers"),
    "unequal depths": (
        released() | {k: v for k, v in released(dims=TowerDims(64, 3, 32, 3)).items() if "visual" in k},
        "unequal depth; the file has 3 vision and 2 text layers",
    ),
    "no down": (changed(text_adapter_down_weight=None), "missing: text_adapter_down_weight"),
    "no bias": (changed(vt_adapter_up_share_bias=None), "missing: vt_adapter_up_share_bias"),
    "no shared": (changed(vt_adapter_up_share_weight=None, vt_adapter_up_share_bias=None), "56 rows .* 0 shared"),
    "no text rows": (
        changed(text_adapter_up_unique_weight=None, text_adapter_up_unique_bias=None), "0 rows of the text tower's own and 8"
    ),
    "another rank": (changed(text_adapter_down_bias=torch.zeros(4, 5)), "contradict each other: rank 4 .* 5"),
    "another rank up": (changed(vt_adapter_up_share_weight=torch.zeros(4, 8, 5)), "contradict each other: rank 4 .* 5"),
    "rows": (changed(visual_adapter_up_unique_bias=torch.zeros(4, 55)), "contradict each other: vision rows 56 .* 55"),
    "shared places": (
        changed(vt_adapter_up_share_weight=torch.zeros(6, 8, 4), vt_adapter_up_share_bias=torch.zeros(6, 8)),
        "shared rows at 6 places, adapters at 4",
    ),
    "axes": (changed(text_adapter_down_bias=torch.zeros(4)), "1 axes, not 2"),
    "no rank": (released(r=0), "rank must be at least 1"),
    "nan": (changed(visual_adapter_down_bias=NAN), "finite: visual_adapter_down_bias"),
    "infinite": (changed(text_adapter_down_bias=NAN.nan_to_num(float("inf")).half()), "finite: text_adapter_down_bias"),
    "integers": (changed(text_adapter_down_bias=torch.zeros(4, 4, dtype=torch.int64)), "text_adapter_down_bias is int64"),
    "doubles": (changed(text_adapter_down_bias=torch.zeros(4, 4).double()), "text_adapter_down_bias is float64"),
    "sparse": (changed(text_adapter_down_bias=torch.zeros(4, 4).to_sparse()), "dense"),
    "no values": (changed(text_adapter_down_bias=torch.zeros(4, 4, device="meta")), "no values"),
    "unknown": (changed(text_adapter_pre_norm_weight=torch.zeros(4, 4)), "no adapter tensor text_adapter_pre_norm_weight"),
    "twice": (released() | released(prefix="module.clip."), "twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_bad_state_is_refused_in_one_line(case: str) -> None:
    state, words = BAD_STATES[case]
    with pytest.raises(InvalidAdapter, match=words) as caught:
        from_official(state, DIMS)
    assert "\n" not in str(caught.value)


def test_a_backbone_of_unequal_depths_takes_none() -> None:
    with pytest.raises(InvalidAdapter, match="unequal depth; the backbone has 6 vision and 4 text layers"):
        from_official(released(), TowerDims(64, 6, 32, 4))


class Touch:
    """Pickled, it makes a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def bad_files(folder: Path) -> dict[str, tuple[bytes, str]]:
    good, flat = save(released(), folder / "good.pt").read_bytes(), safetensors.torch.save(released())
    torch.save(released(), folder / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"a": Touch(folder / "executed")}, folder / "code.pt")
    torch.save(torch.nn.Linear(2, 2), folder / "module.pt")
    torch.save([torch.zeros(3)], folder / "list.pt")
    torch.save({"epoch": 3}, folder / "numbers.pt")
    unreadable = "neither safetensors nor"
    return {
        "empty": (b"", unreadable),
        "garbage": (b"these are no weights at all" * 100, unreadable),
        "zeros": (b"\0" * 4096, unreadable),
        "half a zip": (good[: len(good) // 2], unreadable),
        "nearly a zip": (good[:-4], unreadable),
        "nearly an old one": ((folder / "old.pt").read_bytes()[:-100], unreadable),
        "nearly safetensors": (flat[:-10], unreadable),
        "a large header": ((2**40).to_bytes(8, "little") + b"{", unreadable),
        "a pickle": (pickle.dumps(Touch(folder / "executed")), unreadable),
        "a zip with code": ((folder / "code.pt").read_bytes(), unreadable),
        "a module": ((folder / "module.pt").read_bytes(), unreadable),
        "a list": ((folder / "list.pt").read_bytes(), "no state dict but a list"),
        "numbers": ((folder / "numbers.pt").read_bytes(), "no tensors"),
    }


def test_a_bad_file_is_refused_in_one_line(tmp_path: Path) -> None:
    for case, (data, words) in bad_files(tmp_path).items():
        (tmp_path / "bad").write_bytes(data)
        with pytest.raises(InvalidAdapter, match=words) as caught:
            read_state(tmp_path / "bad")
        assert "\n" not in str(caught.value), case
        assert str(caught.value).startswith("bad "), case
    assert not (tmp_path / "executed").exists()
    with pytest.raises(FileNotFoundError):
        read_state(tmp_path / "missing")


def test_what_the_released_layout_cannot_hold_is_not_exported() -> None:
    for shape, words in (
        (AdapterShape(DIMS, 4, 0, "text"), "scope is text"),
        (AdapterShape(DIMS, 4, 0, "vision"), "scope is vision"),
        (AdapterShape(TowerDims(64, 3, 32, 2), 4, 8), "towers have 3 and 2"),
        (AdapterShape(TowerDims(64, 3, 32, 2), 4, 0), "towers have 3 and 2"),
    ):
        with pytest.raises(InvalidAdapter, match=words):
            to_official(unpack(pack(shape, FINGERPRINT, shape.initial(0))))


def test_values_beyond_a_dtype_are_not_made_infinite() -> None:
    shape = AdapterShape(DIMS, 4, 8)
    tensors = shape.initial(0)
    tensors["text_adapter_down_bias"][0, 0] = 1e38
    artifact = unpack(pack(shape, FINGERPRINT, tensors))
    with pytest.raises(InvalidAdapter, match=r"clip.text_adapter_down_bias .* float16"):
        to_official(artifact, torch.float16)
    assert to_official(artifact)["clip.text_adapter_down_bias"][0, 0] == torch.tensor(1e38)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("d_s", [0, 8, 32])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_come_back_bit_for_bit_on_the_command_line(
    tmp_path: Path, tiny: str, polyclip: Any, dtype: torch.dtype, d_s: int, suffix: str
) -> None:
    state = released(4, d_s, dtype)
    checkpoint = save({**state, "clip.visual.proj": torch.zeros(3)}, tmp_path / f"in{suffix}")
    adapter, back = tmp_path / "a.safetensors", tmp_path / f"back{suffix}"
    backbone = ("--backbone", tiny, "--pretrained", "random")
    assert polyclip("adapters", "import-official", checkpoint, *backbone, "--out", adapter)[0] == 0
    artifact = unpack(adapter.read_bytes())
    assert artifact.backbone == load_backbone(tiny, "random").fingerprint
    assert polyclip("adapters", "export", "--file", adapter, "--official", "--out", back)[0] == 0
    loaded = safetensors.torch.load_file(back) if suffix == ".safetensors" else torch.load(back, weights_only=True)
    assert type(loaded) is dict
    assert_same(loaded, state)
    assert polyclip("adapters", "export", "--file", adapter, "--official", "--dtype", "float32", "--out", back)[0] == 0
    assert_same(read_state(back), {name: tensor.float() for name, tensor in state.items()})
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint.name, adapter.name, back.name}, "nothing is left aside"


def test_a_collection_publishes_a_checkpoint_and_exports_it_again(tmp_path: Path, tiny: str, polyclip: Any) -> None:
    (tmp_path / "videos").mkdir()
    house = ("--collection", "films", "--data", tmp_path / "data")
    backbone = ("--backbone", tiny, "--pretrained", "random")
    assert polyclip("index", tmp_path / "videos", *house, *backbone)[0] == 0
    checkpoint = save(released(), tmp_path / "ckpt_best.pt")
    code, out, _ = polyclip("adapters", "import-official", checkpoint, *backbone, *house)
    assert code == 0 and "version 1" in out
    again = polyclip("adapters", "import-official", checkpoint, *house)
    assert again[:2] == (0, out), "the data folder knows its backbone, and the same adapter is the same version"
    other = save(released(4, 0), tmp_path / "other.safetensors")
    assert "version 2" in polyclip("adapters", "import-official", other, *house)[1]
    adapter_id = out.split(":")[0]
    manifest = json.loads(polyclip("adapters", "show", adapter_id, *house)[1])["manifest"]
    assert manifest["recipe"] == {"imported": "ckpt_best.pt", "layout": "official"}
    assert (manifest["rank"], manifest["shared"], manifest["parameters"]) == (4, 8, AdapterShape(DIMS, 4, 8).parameters)
    assert polyclip("adapters", "export", adapter_id, *house, "--official", "--out", tmp_path / "back.pt")[0] == 0
    assert_same(read_state(tmp_path / "back.pt"), released())
    assert polyclip("adapters", "export", adapter_id, *house, "--out", tmp_path / "own.safetensors")[0] == 0
    assert unpack((tmp_path / "own.safetensors").read_bytes()).source_dtype == "float16"
    code, _, told = polyclip("adapters", "import-official", tmp_path / "missing.pt", *house)
    assert code == 1 and "No such file" in told


def test_mistakes_on_the_command_line_are_one_line_and_leave_nothing(tmp_path: Path, tiny: str, polyclip: Any) -> None:
    good, wrong = save(released(), tmp_path / "good.pt"), save(released(dims=B32), tmp_path / "wrong.pt")
    (tmp_path / "bad.pt").write_bytes(b"garbage")
    shape = AdapterShape(DIMS, 4, 0, "text")
    (tmp_path / "text.safetensors").write_bytes(pack(shape, FINGERPRINT, shape.initial(0)))
    there, out = set(tmp_path.iterdir()), tmp_path / "out.safetensors"
    take = ("adapters", "import-official")
    give = ("adapters", "export", "--official", "--file")
    random = ("--backbone", tiny, "--pretrained", "random")
    for arguments, words in (
        ((*take, tmp_path / "bad.pt", *random, "--out", out), "bad.pt is neither safetensors nor"),
        ((*take, wrong, *random, "--out", out), "another backbone"),
        ((*take, good, "--backbone", "builtin", "--out", out), "unequal depth"),
        ((*take, good, "--backbone", "ViT-Q", "--out", out), "no backbone named"),
        ((*take, tmp_path / "none.pt", *random, "--out", out), "No such file"),
        ((*take, tmp_path, *random, "--out", out), "Is a directory"),
        ((*take, good, *random, "--out", tmp_path / "no" / "a"), "there is no such folder"),
        ((*take, good, *random, "--out", tmp_path), "this is a folder"),
        ((*give, tmp_path / "text.safetensors", "--out", out), "scope is text"),
        ((*give, good, "--out", out), "not an adapter file"),
        ((*give, tmp_path / "none", "--out", out), "No such file"),
    ):
        code, _, told = polyclip(*arguments)
        assert (code, len(told.strip().splitlines())) == (1, 1), (arguments, told)
        assert words in told
        assert set(tmp_path.iterdir()) == there


@pytest.mark.parametrize(
    "arguments",
    [
        ("import-official", "a.pt"),
        ("import-official", "a.pt", "--backbone", "ViT-B-32", "--out", "a", "--collection", "films"),
        ("import-official", "a.pt", "--out", "a"),
        ("export", "--out", "a"),
        ("export", "adp_1", "--out", "a"),
        ("export", "--collection", "films", "--out", "a"),
        ("export", "--file", "a", "--out", "b"),
        ("export", "adp_1", "--file", "a", "--official", "--out", "b"),
        ("export", "--file", "a", "--out", "b", "--official", "--dtype", "int8"),
        ("export", "adp_1", "--collection", "films", "--out", "b", "--dtype", "float16"),
    ],
)
def test_wrong_usage_is_status_2(polyclip: Any, arguments: tuple[str, ...]) -> None:
    assert polyclip("adapters", *arguments)[0] == 2


@pytest.mark.slow
def test_a_real_architecture_in_a_process_of_its_own(tmp_path: Path) -> None:
    state = released(8, 384, dims=TowerDims(384, 12, 384, 12))
    checkpoint, adapter = save(state, tmp_path / "in.pt"), tmp_path / "a.safetensors"
    for arguments in (
        ("import-official", checkpoint, "--backbone", "ViT-S-32", "--pretrained", "random", "--out", adapter),
        ("export", "--file", adapter, "--official", "--out", tmp_path / "back.pt"),
    ):
        command = [sys.executable, "-m", "service.cli", "adapters", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    assert_same(torch.load(tmp_path / "back.pt", weights_only=True), state)


def test_an_adapter_with_vocabulary_rows_is_exported_without_them_or_not_at_all(tmp_path: Path, polyclip: Any) -> None:
    shape = AdapterShape(DIMS, 4, 8, vocabulary=(3, 5))
    tensors = {**shape.initial(0, start="small"), "vocabulary_rows": torch.ones(2, 32)}
    file, out = tmp_path / "rich.safetensors", tmp_path / "official.safetensors"
    file.write_bytes(pack(shape, FINGERPRINT, tensors))
    export = ("adapters", "export", "--file", file, "--official", "--out", out)
    status, _, told = polyclip(*export)
    assert status == 1 and "2: export it without them (--without-vocabulary)" in told and not out.exists()
    assert polyclip(*export, "--without-vocabulary")[0] == 0
    without = to_official(unpack(pack(AdapterShape(DIMS, 4, 8), FINGERPRINT, tensors)))
    assert_same(dict(read_state(out)), without)
