"""The commands that work on files alone: raw vectors, and adapters from and to checkpoints of the paper's code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import adapters_store
from adapters_store import durable
from backbone import Backbone, load_backbone
from service.errors import PolyclipError

BATCH = 32  # frames of one forward pass


class InvalidFrames(PolyclipError):
    """The .npy file holds no frames, or none for this backbone."""

    code, hint = "invalid_frames", "mend the .npy file"


def encode(
    backbone_name: str,
    pretrained: str | None,
    adapter_file: Path | None,
    texts: list[str] | None,
    frames: Path | None,
    to: Path,
) -> tuple[tuple[int, ...], list[int]]:
    """Writes the vectors of texts or frames as float32 .npy; returns their shape and the positions of texts that were cut.

    Raises InvalidFrames, OSError, and what loading the backbone or the adapter raises.
    """
    with written(to) as write:
        pixels = read_frames(frames) if frames is not None else None
        artifact = adapters_store.unpack(adapter_file.read_bytes()) if adapter_file is not None else None
        backbone = load_backbone(backbone_name, pretrained)
        adapter = None if artifact is None else artifact.adapter(backbone.fingerprint)
        cut: list[int] = []
        with torch.inference_mode():
            if pixels is None:
                tokens = backbone.tokenize(texts or [])
                cut = [i for i, truncated in enumerate(tokens.truncated) if truncated]
                vectors = backbone.encode_text(tokens.ids, adapter)
            else:
                side = backbone.image_size
                if pixels.shape[1:] != (3, side, side):
                    shape = f"(N, 3, {side}, {side})"
                    raise InvalidFrames(f"{frames}: frames of {backbone.name} have shape {shape}, not {pixels.shape}")
                parts = (torch.from_numpy(np.array(pixels[i : i + BATCH])) for i in range(0, len(pixels), BATCH))
                vectors = torch.cat([backbone.encode_frames(part, adapter) for part in parts])
        file = BytesIO()
        np.save(file, vectors.cpu().numpy().astype(np.float32))
        write(file.getvalue())
    return tuple(vectors.shape), cut


def read_frames(path: Path) -> NDArray[Any]:
    """The frames in a .npy file, left on disk: (N, 3, H, W) with N ≥ 1, uint8 or finite float32.

    Raises InvalidFrames, and OSError for a file that cannot be opened.
    """
    try:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # a header that numpy cannot parse raises whatever its parsers raise
        raise InvalidFrames(f"{path}: not a .npy file of numbers") from error
    if not isinstance(pixels, np.ndarray):
        pixels.close()
        raise InvalidFrames(f"{path}: an archive of arrays; one array is wanted, as .npy")
    if pixels.dtype not in (np.uint8, np.float32):
        raise InvalidFrames(f"{path}: frames must be float32 or uint8, not {pixels.dtype}")
    if pixels.ndim != 4 or len(pixels) == 0 or pixels.shape[1] != 3:
        raise InvalidFrames(f"{path}: frames must have shape (N, 3, H, W), not {pixels.shape}")
    if pixels.dtype == np.float32 and not all(np.isfinite(frame).all() for frame in pixels):
        raise InvalidFrames(f"{path}: frames must be finite")
    return pixels


def convert_official(checkpoint: Path, backbone_name: str, pretrained: str | None, to: Path) -> int:
    """Writes the adapter in a checkpoint of the paper's code as an adapter file; returns the bytes written."""
    with written(to) as write:
        return write(from_checkpoint(checkpoint, lambda: load_backbone(backbone_name, pretrained)))


def export_official(file: Path, to: Path, dtype: str | None, without_vocabulary: bool = False) -> int:
    """Writes an adapter file as a checkpoint that the paper's code loads; returns the bytes written."""
    with written(to) as write:
        return write(to_checkpoint(file.read_bytes(), to, dtype, without_vocabulary))


def from_checkpoint(checkpoint: Path, backbone: Callable[[], Backbone]) -> bytes:
    """The adapter file of a checkpoint of the paper's code; the backbone is loaded once the checkpoint could be read."""
    state = adapters_store.read_state(checkpoint)
    frozen = backbone()
    shape, tensors, source_dtype = adapters_store.from_official(state, frozen.dims)
    return adapters_store.pack(shape, frozen.fingerprint, tensors, source_dtype)


def to_checkpoint(data: bytes, to: Path, dtype: str | None, without_vocabulary: bool = False) -> bytes:
    """An adapter file's bytes as a checkpoint of the paper's code: safetensors if `to` is named so, else torch's."""
    artifact = adapters_store.unpack(data)
    return adapters_store.official_file(
        artifact, dtype, as_safetensors=to.suffix == ".safetensors", without_vocabulary=without_vocabulary
    )


@contextmanager
def written(to: Path) -> Iterator[Callable[[bytes | Iterable[bytes]], int]]:
    """Yields a function that puts bytes, or chunks of them, into the file `to` in one step (`adapters_store.durable`).

    Raises OSError at once for a folder that is not there. What is there and is no file (a pipe, a device) is written into.
    """
    target = to.resolve()
    if not target.parent.is_dir():
        raise FileNotFoundError(2, "there is no such folder", str(to.parent))
    if target.is_dir():
        raise IsADirectoryError(21, "this is a folder, not a file", str(to))

    def write(data: bytes | Iterable[bytes]) -> int:
        chunks = (data,) if isinstance(data, bytes) else data
        if target.exists() and not target.is_file():
            return _put(target, chunks)
        with durable.aside(target) as part:
            return _put(part, chunks)

    yield write


def _put(path: Path, chunks: Iterable[bytes]) -> int:
    with path.open("wb") as file:
        return sum(map(file.write, chunks))
