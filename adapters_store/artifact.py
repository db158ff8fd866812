"""An adapter on disk: one safetensors file named by its own sha256, and a manifest beside it.

The file alone says for which backbone it was made and of which shape it is, so its digest names everything that can
change an answer. The manifest tells where it came from: recipe, metrics, parent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from adapters_store import durable
from backbone import Adapter, AdapterShape, TowerDims

FORMAT = "polyclip-adapter/1"
MAX_BYTES = 512 * 1024 * 1024
SOURCE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class InvalidAdapter(ValueError):
    """The bytes are not an adapter of ours; the message says why, in one line."""


class DamagedAdapter(InvalidAdapter):
    """The file of a published version is gone, or is not what its digest names."""


class AdapterMismatch(ValueError):
    """The adapter was made for another backbone."""


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
    parent: str | None = None
    created_at: str | None = None
    format: str = FORMAT

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def pack(
    shape: AdapterShape, backbone: str, tensors: Mapping[str, Tensor], source_dtype: str | None = None
) -> bytes:
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
    return _canonical(safetensors.torch.save(values, metadata))


def unpack(data: bytes) -> Artifact:
    """Reads and checks a safetensors file from anywhere. Raises InvalidAdapter."""
    if len(data) > MAX_BYTES:
        raise InvalidAdapter(f"an adapter file may have {MAX_BYTES} bytes, this one has {len(data)}")
    try:
        tensors = safetensors.torch.load(data)
        header = _header(data)
        about = json.loads(header["__metadata__"]["adapter"])
        dims = TowerDims(*(int(about[k]) for k in ("visual_width", "visual_layers", "text_width", "text_layers")))
        shape = AdapterShape(dims, int(about["rank"]), int(about["shared"]), about["scope"])
        backbone = str(about["backbone"])
        source_dtype = header["__metadata__"].get("source_dtype")
        if source_dtype is not None and source_dtype not in SOURCE_DTYPES:
            raise ValueError(f"unknown source dtype {source_dtype!r}")
        shape.assemble(tensors)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InvalidAdapter(f"not an adapter file of polyclip: {_one_line(error)}") from error
    if any(tensor.dtype != torch.float32 for tensor in tensors.values()):
        raise InvalidAdapter("adapter tensors must be float32")
    if not all(bool(tensor.sum().isfinite() or tensor.isfinite().all()) for tensor in tensors.values()):
        raise InvalidAdapter("adapter tensors must be finite")
    return Artifact(hashlib.sha256(data).hexdigest(), backbone, shape, tensors, source_dtype)


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
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length])  # type: ignore[no-any-return]


def _canonical(data: bytes) -> bytes:
    """The same file with its header's keys sorted: safetensors writes metadata in no fixed order."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(_header(data), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _one_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
