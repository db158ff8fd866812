"""Checkpoints of the paper's released code (LeapLabTHU/Cross-Modal-Adapter): read and written bit for bit.

That code keeps every adapter of both towers in ten tensors, most often in float16, inside the whole model's state dict,
where they bear the prefix `clip.`. It drops the text tower's own rows where all of them are shared, keeps the vision
tower's even where there are none, and has no shared tensor where nothing is shared.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from adapters_store.artifact import SOURCE_DTYPES, Artifact, InvalidAdapter, check_values
from backbone import AdapterShape, TowerDims

MAX_STATE_HEADER = 16 * 1024 * 1024  # bytes of a safetensors header: a whole model's has some hundred thousand
PREFIX = "clip."
WRAPPERS = ("module.", PREFIX)
NESTS = ("state_dict", "model_state_dict", "model")
AXES = {
    "visual_adapter_down_weight": ("vision places", "rank", "vision width"),
    "visual_adapter_down_bias": ("vision places", "rank"),
    "visual_adapter_up_unique_weight": ("vision places", "vision rows", "rank"),
    "visual_adapter_up_unique_bias": ("vision places", "vision rows"),
    "text_adapter_down_weight": ("text places", "rank", "text width"),
    "text_adapter_down_bias": ("text places", "rank"),
    "text_adapter_up_unique_weight": ("text places", "text rows", "rank"),
    "text_adapter_up_unique_bias": ("text places", "text rows"),
    "vt_adapter_up_share_weight": ("shared places", "shared rows", "rank"),
    "vt_adapter_up_share_bias": ("shared places", "shared rows"),
}
"""What each axis of each released tensor counts; a place is an adapter, two of them to a layer."""
FAMILIES = tuple({name.split("_up_")[0].split("_down_")[0] + "_" for name in AXES})  # "visual_adapter_" and so on


def from_official(state: Mapping[str, Tensor], dims: TowerDims) -> tuple[AdapterShape, dict[str, Tensor], str]:
    """The adapter in a state dict of the released layout, for a backbone of these dimensions.

    Returns its shape, its tensors in float32 (the values of narrower floats are kept exactly) and the name of the dtype
    that they came in; of several, the one that holds them all. Keys may bear the prefixes `clip.` and `module.`; what is
    not an adapter's is ignored. Raises InvalidAdapter with a one-line reason.
    """
    found = _adapter_tensors(state)
    sizes = _sizes(found)
    for tower in ("vision", "text"):
        if sizes[f"{tower} rows"] + sizes["shared rows"] != sizes[f"{tower} width"]:
            raise InvalidAdapter(
                f"the shapes contradict each other: {sizes[f'{tower} rows']} rows of the {tower} tower's own and "
                f"{sizes['shared rows']} shared ones do not make its width of {sizes[f'{tower} width']}"
            )
    for vision, text, what in (
        (sizes["vision places"] / 2, sizes["text places"] / 2, "the file"),
        (dims.visual_layers, dims.text_layers, "the backbone"),
    ):
        if vision != text:
            raise InvalidAdapter(
                f"the released code has no towers of unequal depth; {what} has {vision:g} vision and {text:g} text layers"
            )
    if sizes["shared rows"] and sizes["shared places"] != sizes["vision places"]:
        raise InvalidAdapter(
            f"the shapes contradict each other: shared rows at {sizes['shared places']} places, "
            f"adapters at {sizes['vision places']}"
        )
    made_for = (sizes["vision width"], sizes["vision places"] / 2, sizes["text width"], sizes["text places"] / 2)
    if made_for != (dims.visual_width, dims.visual_layers, dims.text_width, dims.text_layers):
        raise InvalidAdapter(
            "the adapter is for another backbone: vision width {} with {:g} layers and text width {} with {:g} layers; "
            "this one has {} with {} and {} with {}".format(
                *made_for, dims.visual_width, dims.visual_layers, dims.text_width, dims.text_layers
            )
        )
    if sizes["rank"] > max(dims.visual_width, dims.text_width):  # a file's tensor may claim more values than it holds
        raise InvalidAdapter(f"a rank of {sizes['rank']} is wider than both towers")
    try:
        shape = AdapterShape(dims, sizes["rank"], sizes["shared rows"])
    except ValueError as error:
        raise InvalidAdapter(str(error)) from error
    source = torch.float32
    if len(dtypes := {tensor.dtype for tensor in found.values()}) == 1:
        source = dtypes.pop()
    tensors = {name: _copy(found[name], torch.float32) for name in shape.layout()}
    for name, tensor in tensors.items():
        check_values(name, tensor, torch.finfo(torch.float16).max)  # the released code computes in float16
    return shape, tensors, _name(source)


def to_official(artifact: Artifact, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The state dict that the released code loads, with the prefix `clip.`.

    `dtype` None is the one that the adapter was imported in, float32 for one that was trained here. Raises InvalidAdapter
    for what the released layout cannot hold: one tower only, towers of unequal depth, values beyond the dtype's range,
    vocabulary rows.
    """
    shape = artifact.shape
    if shape.scope != "both":
        raise InvalidAdapter(f"the released layout holds adapters of both towers; this one's scope is {shape.scope}")
    if shape.vocabulary:
        raise InvalidAdapter(
            f"the released layout has no vocabulary rows, this adapter has {len(shape.vocabulary)}: export it without them"
            " (--without-vocabulary), which finds its words worse"
        )
    if shape.dims.visual_layers != shape.dims.text_layers:
        raise InvalidAdapter(
            f"the released layout pairs layer with layer; this adapter's towers have {shape.dims.visual_layers} "
            f"and {shape.dims.text_layers}"
        )
    dtype = dtype or SOURCE_DTYPES[artifact.source_dtype or "float32"]
    state = {PREFIX + name: _copy(tensor, dtype) for name, tensor in artifact.tensors.items()}
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidAdapter(f"{name} has values beyond the range of {_name(dtype)}: export it as float32")
    if shape.shared == shape.dims.visual_width:
        places = 2 * shape.dims.visual_layers
        state[f"{PREFIX}visual_adapter_up_unique_weight"] = torch.empty(places, 0, shape.rank, dtype=dtype)
        state[f"{PREFIX}visual_adapter_up_unique_bias"] = torch.empty(places, 0, dtype=dtype)
    return state


def official_file(
    artifact: Artifact, dtype: str | None = None, *, as_safetensors: bool = False, without_vocabulary: bool = False
) -> bytes:
    """`to_official` as a file's bytes: what `torch.save` makes of a plain dict, or safetensors. Raises InvalidAdapter.

    `without_vocabulary` leaves out vocabulary rows, which it would refuse.
    """
    if without_vocabulary:
        kept = {name: tensor for name, tensor in artifact.tensors.items() if name != "vocabulary_rows"}
        artifact = replace(artifact, shape=replace(artifact.shape, vocabulary=()), tensors=kept)
    state = to_official(artifact, SOURCE_DTYPES[dtype] if dtype is not None else None)
    if as_safetensors:
        return safetensors.torch.save(state)
    memory = BytesIO()
    torch.save(state, memory)
    return memory.getvalue()


def read_state(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint, by name: safetensors, or what `torch.load` reads without running code; on the CPU.

    A state dict may lie one level down, under `state_dict`, `model_state_dict` or `model`. Raises OSError for a file
    that cannot be opened and InvalidAdapter, in one line, for one that is no state dict.
    """
    with path.open("rb") as file:
        start = file.read(9)
    try:
        if start[8:] == b"{" and int.from_bytes(start[:8], "little") > MAX_STATE_HEADER:
            raise ValueError("such a header is no checkpoint's")
        loaded: Any = safetensors.torch.load_file(path) if start[8:] == b"{" else _torch_load(path)
    except Exception as error:  # what torch and safetensors raise on a foreign file is not documented
        raise InvalidAdapter(
            f"{path.name} is neither safetensors nor tensors of torch.save: damaged, or with objects whose code is never run"
        ) from error
    if not isinstance(loaded, Mapping):
        raise InvalidAdapter(f"{path.name} holds no state dict but a {type(loaded).__name__}")
    inner = next((loaded[key] for key in NESTS if isinstance(loaded.get(key), Mapping)), None)
    state: dict[str, Tensor] = {}
    for part in (loaded, inner or {}):
        state |= {key: value for key, value in part.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not state:
        raise InvalidAdapter(f"{path.name} holds no tensors")
    return state


def _torch_load(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):  # files of torch before 1.6 cannot be mapped
                raise
            return torch.load(path, map_location="cpu", weights_only=True)


def _adapter_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The released tensors in a state dict by bare name. Raises InvalidAdapter for none, a strange one, or one too few."""
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = key
        while name.startswith(WRAPPERS):
            name = name.split(".", 1)[1]
        if not name.startswith(FAMILIES):
            continue
        if name not in AXES:
            raise InvalidAdapter(f"the released code has no adapter tensor {name}")
        if name in found:
            raise InvalidAdapter(f"the file holds {name} twice, under two prefixes")
        if tensor.layout != torch.strided or tensor.is_nested or tensor.dtype not in SOURCE_DTYPES.values():
            raise InvalidAdapter(f"adapter tensors must be dense float32, float16 or bfloat16: {name} is {_name(tensor.dtype)}")
        if tensor.is_meta:
            raise InvalidAdapter(f"adapter tensor {name} has no values")
        found[name] = tensor
    if not found:
        raise InvalidAdapter("there are no adapter tensors of the released code in the file")
    needed = {name for name in AXES if "_down_" in name}
    needed |= {f"{name.rsplit('_', 1)[0]}_{kind}" for name in found for kind in ("weight", "bias")}
    if missing := sorted(needed - found.keys()):
        raise InvalidAdapter(f"adapter tensors missing: {', '.join(missing)}")
    return found


def _sizes(found: Mapping[str, Tensor]) -> dict[str, int]:
    """Length of each kind of axis, 0 where no tensor has it. Raises InvalidAdapter where two tensors disagree."""
    sizes: dict[str, int] = {}
    told_by: dict[str, str] = {}
    for name, axes in AXES.items():
        if name not in found:
            continue
        shape = tuple(found[name].shape)
        if len(shape) != len(axes):
            raise InvalidAdapter(f"adapter tensor {name} has {len(shape)} axes, not {len(axes)}")
        for axis, size in zip(axes, shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise InvalidAdapter(
                    f"the shapes contradict each other: {axis} {sizes[axis]} in {told_by[axis]}, {size} in {name} {shape}"
                )
            told_by.setdefault(axis, name)
    return {axis: sizes.get(axis, 0) for axes in AXES.values() for axis in axes}


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy that is independent of a mapped file."""
    return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
