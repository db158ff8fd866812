"""An adapter on disk: one safetensors file named by its own sha256, and a manifest beside it.

The file alone says for which backbone it was made and of which shape it is, so its digest names everything that can
change an answer. The manifest tells where it came from: recipe, metrics, parent.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from adapters_store import durable
from backbone import VOCABULARY_ROWS, Adapter, AdapterShape, TowerDims

FORMAT = "polyclip-adapter/1"
IDS = "vocabulary_ids"  # int32, ascending: the token id of each of the tensor `vocabulary_rows`
MAX_BYTES = 512 * 1024 * 1024
MAX_HEADER = 64 * 1024  # bytes; that of an adapter has about two thousand
MAX_LAYERS, MAX_WIDTH = 1024, 65536  # of a tower; no backbone comes near
MAX_WEIGHT = 1e4  # of what comes from outside; below it no sum of a layer leaves float32's range
SOURCE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class InvalidAdapter(ValueError):
    """The bytes are not an adapter of ours; the message says why, in one line."""


class DamagedAdapter(InvalidAdapter):
    """The file of a published version is gone, or is not what its digest names."""


class RankTooLarge(InvalidAdapter):
    """The adapter's rank is above the largest that the settings allow: it would slow down all searches."""


class AdapterMismatch(ValueError):
    """The adapter was made for another backbone."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What an adapter that comes in has to fit: the backbone, its number of token ids, and the largest rank that is taken."""

    fingerprint: str
    dims: TowerDims
    tokens: int
    rank: int


@dataclass(frozen=True, slots=True)
class Artifact:
    """An adapter's tensors in the released layout (float32), with what it was made for."""

    digest: str  # sha256 of the file, hex
    backbone: str  # fingerprint
    shape: AdapterShape
    tensors: Mapping[str, Tensor]
    source_dtype: str | None = None  # of the checkpoint that it was imported from; None: trained here

    def adapter(self, fingerprint: str) -> Adapter:
        """The fused form, for the backbone of this fingerprint. Raises AdapterMismatch for another one."""
        if fingerprint != self.backbone:
            raise AdapterMismatch(
                f"adapter {self.digest[:12]} was trained on backbone {self.backbone[:12]}; this one is {fingerprint[:12]}"
            )
        return self.shape.assemble(self.tensors)


@dataclass(frozen=True, slots=True)
class Manifest:
    """Where an adapter came from. `metrics` holds `before`, `after` and `curve`; `parent` is the digest that it replaced."""

    digest: str
    backbone: str
    rank: int
    shared: int
    scope: str
    parameters: int
    size: int  # bytes of the safetensors file
    recipe: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)  # videos and pairs of each split
    vocabulary: int = 0  # rows
    words: list[str] = field(default_factory=list)  # that have a row, the most frequent first; not all of many
    parent: str | None = None
    created_at: str | None = None
    format: str = FORMAT

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def pack(shape: AdapterShape, backbone: str, tensors: Mapping[str, Tensor], source_dtype: str | None = None) -> bytes:
    """The safetensors file of an adapter for the backbone of this fingerprint; equal input gives equal bytes.

    `source_dtype`, one of SOURCE_DTYPES, is the precision that an export writes again; the file holds float32 in any case.
    """
    metadata = {
        "format": FORMAT,
        "adapter": json.dumps(
            {"backbone": backbone, "rank": shape.rank, "shared": shape.shared, "scope": shape.scope, **asdict(shape.dims)},
            sort_keys=True,
        ),
    }
    if source_dtype is not None:
        metadata["source_dtype"] = source_dtype
    values = {name: tensors[name].detach().float().cpu().contiguous() for name in shape.layout()}
    if shape.vocabulary:
        values[IDS] = torch.tensor(shape.vocabulary, dtype=torch.int32)
    return _canonical(safetensors.torch.save(values, metadata))


def unpack(data: bytes, fit: Fit | None = None) -> Artifact:
    """Reads and checks a safetensors file from anywhere: what its header claims is compared with the limits, with the sizes
    of its tensors and with `fit` before any tensor is built. Raises InvalidAdapter; AdapterMismatch for another backbone.
    """
    if len(data) > MAX_BYTES:
        raise InvalidAdapter(f"an adapter file may have {MAX_BYTES} bytes, this one has {len(data)}")
    try:
        header = _header(data)
        facts = header.pop("__metadata__")
        about = json.loads(facts["adapter"])
        widths, layers = (MAX_WIDTH, MAX_WIDTH), (MAX_LAYERS, MAX_LAYERS)
        limits = zip(("visual_width", "text_width", "visual_layers", "text_layers"), widths + layers, strict=True)
        dims = TowerDims(**{name: _number(about, name, 1, most) for name, most in limits})
        shape = AdapterShape(dims, _number(about, "rank", 1, MAX_WIDTH), _number(about, "shared", 0, MAX_WIDTH), about["scope"])
        backbone, source_dtype = about["backbone"], facts.get("source_dtype")
        if not isinstance(backbone, str):
            raise ValueError("the backbone is not named")
        if source_dtype is not None and source_dtype not in SOURCE_DTYPES:
            raise ValueError(f"unknown source dtype {source_dtype!r}")
        if fit is not None:
            _check_fit(fit, backbone, shape)
        if (ids := header.pop(IDS, None)) is not None:
            shape = replace(shape, vocabulary=tuple(range(_count(ids))))
        shape.check({name: tuple(tensor["shape"]) for name, tensor in header.items()})
        if any(tensor["dtype"] != "F32" for tensor in header.values()):
            raise ValueError("adapter tensors must be float32")
        tensors = safetensors.torch.load(data)
        if ids is not None:
            shape = replace(shape, vocabulary=tuple(tensors.pop(IDS).tolist()))
        if shape.vocabulary and fit is not None and shape.vocabulary[-1] >= fit.tokens:
            raise ValueError(f"a vocabulary row is of token {shape.vocabulary[-1]}, the backbone knows {fit.tokens}")
        shape.check({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    except (AdapterMismatch, RankTooLarge):
        raise
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InvalidAdapter(f"not an adapter file of polyclip: {_one_line(error)}") from error
    for name, tensor in tensors.items():
        check_values(name, tensor, math.inf if fit is None else MAX_WEIGHT)
    return Artifact(hashlib.sha256(data).hexdigest(), backbone, shape, tensors, source_dtype)


def check_values(name: str, tensor: Tensor, most: float) -> None:
    """Raises InvalidAdapter for a tensor with a value that is not finite, or beyond ±`most`."""
    if not tensor.numel():
        return
    low, high = (value.item() for value in tensor.aminmax())  # NaN if there is one
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InvalidAdapter(f"adapter tensors must be finite: {name} is not")
    if max(-low, high) > most:
        raise InvalidAdapter(f"adapter tensor {name} has a value of {max(-low, high):.3g}: more than {most:g} is no weight")


def describe(file: bytes, /, **facts: Any) -> Manifest:
    """The manifest of a packed adapter; `facts` are the fields that the file itself does not tell."""
    artifact = unpack(file)
    shape = artifact.shape
    return Manifest(
        digest=artifact.digest,
        backbone=artifact.backbone,
        rank=shape.rank,
        shared=shape.shared,
        scope=shape.scope,
        vocabulary=len(shape.vocabulary),
        parameters=shape.parameters,
        size=len(file),
        **facts,
    )


def write(folder: Path, data: bytes, manifest: Manifest) -> Path:
    """Publishes both files in `folder` as `adapter.safetensors` and `manifest.json`, the manifest last; fsynced."""
    durable.make_folder(folder)
    path = folder / "adapter.safetensors"
    durable.write(path, data)
    durable.write(folder / "manifest.json", json.dumps(manifest.to_json(), indent=2, sort_keys=True).encode())
    return path


def read(folder: Path) -> tuple[bytes, Manifest]:
    """What `write` published. Raises InvalidAdapter if the two files do not belong together."""
    data = (folder / "adapter.safetensors").read_bytes()
    manifest = Manifest(**json.loads((folder / "manifest.json").read_text()))
    if hashlib.sha256(data).hexdigest() != manifest.digest:
        raise InvalidAdapter(f"{folder}: the manifest describes another adapter file")
    return data, manifest


def _header(data: bytes) -> dict[str, Any]:
    """Raises ValueError."""
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER:
        raise ValueError(f"the header may have {MAX_HEADER} bytes, it claims {length}")
    header = json.loads(data[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    return header


def _number(about: Mapping[str, Any], name: str, least: int, most: int) -> int:
    value = about[name]
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number between {least} and {most}, not {value!r:.40}")
    return value


def _count(ids: Mapping[str, Any]) -> int:
    """How many vocabulary rows a file says that it has. Raises ValueError."""
    if ids["dtype"] != "I32" or len(ids["shape"]) != 1:
        raise ValueError(f"{IDS} must be a list of int32")
    if not 1 <= ids["shape"][0] <= VOCABULARY_ROWS:
        raise ValueError(f"an adapter has 1 to {VOCABULARY_ROWS} vocabulary rows, this one has {ids['shape'][0]}")
    return int(ids["shape"][0])


def _check_fit(fit: Fit, backbone: str, shape: AdapterShape) -> None:
    if backbone != fit.fingerprint:
        raise AdapterMismatch(f"the adapter was trained on backbone {backbone[:12]}; this one is {fit.fingerprint[:12]}")
    if shape.dims != fit.dims:
        raise AdapterMismatch(f"the adapter names this backbone, but its towers are {shape.dims}, not {fit.dims}")
    if shape.rank > fit.rank:
        raise RankTooLarge(f"the adapter has rank {shape.rank}, the largest that is taken here is {fit.rank}")


def _canonical(data: bytes) -> bytes:
    """The same file with its header's keys sorted: safetensors writes metadata in no fixed order."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(_header(data), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _one_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
