"""`polyclip doctor`: what is installed and reachable, and how to mend what is not."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from service.settings import Settings


@dataclass(frozen=True, slots=True)
class Finding:
    what: str
    ok: bool
    detail: str


def examine(settings: Settings) -> list[Finding]:
    """Every check, in the order in which a start would need them. A data folder that is not there is not made."""
    if settings.has_data:
        return list(_findings(settings, settings))
    with TemporaryDirectory() as name:
        return list(_findings(settings, settings.model_copy(update={"data": Path(name)})))


def _findings(settings: Settings, tried: Settings) -> Iterator[Finding]:
    """`tried`: the same with a data folder that may be written to."""
    for package in ("torch", "open_clip_torch", "av", "decord", "dbos", "fastapi"):
        yield _try(package, lambda package=package: importlib.metadata.version(package))  # type: ignore[misc]
    yield _try("faiss", _faiss)
    yield _try("device", lambda: _device(settings))
    yield _try("data folder", lambda: _folder(settings))
    yield _try("database", lambda: _database(tried))
    yield _try("blobs", lambda: _blobs(tried))
    yield _try("decoders", lambda: _decoders(settings))
    yield _try("backbone", lambda: _backbone(tried))


def _try(what: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, check())
    except Exception as error:
        return Finding(what, False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _faiss() -> str:
    import faiss

    kinds = [name for name in ("faiss-cpu", "faiss-gpu") if _installed(name)]
    if len(kinds) != 1:
        raise RuntimeError(f"install exactly one of faiss-cpu and faiss-gpu, there are {kinds or 'none'}")
    return f"{kinds[0]} {faiss.__version__}"


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _device(settings: Settings) -> str:
    import torch

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("POLYCLIP_DEVICE is cuda, but torch sees no GPU: check the driver, or unset it")
    if torch.cuda.is_available() and settings.device != "cpu":
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads"


def _folder(settings: Settings) -> str:
    data = settings.data.absolute()
    folder = next(path for path in (data, *data.parents) if path.exists())
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(f"{folder} cannot be written to: {error.strerror}") from error
    free = shutil.disk_usage(folder).free / 1e9
    if free < 1:
        raise RuntimeError(f"only {free:.1f} GB are free in {folder}")
    return f"{data}, {'' if settings.has_data else 'not made yet, '}{free:.0f} GB free"


def _database(settings: Settings) -> str:
    from service.storage.storage import Storage

    storage = Storage(settings)
    storage.prepare()
    storage.close()
    return storage.database.engine.url.render_as_string(hide_password=True)


def _blobs(settings: Settings) -> str:
    from service.storage.blobs import Blobs

    blobs = Blobs(settings.blob_root, settings.scratch)
    blobs.put("doctor/probe", b"probe")
    if blobs.get("doctor/probe") != b"probe":
        raise RuntimeError("what was written is not what is read")
    blobs.delete("doctor/probe")
    return settings.blob_root


def _decoders(settings: Settings) -> str:
    import io
    import tempfile
    from pathlib import Path

    import av
    import numpy as np

    from indexer.decode import Sampling
    from indexer.sandbox import Sandbox

    memory = io.BytesIO()
    with av.open(memory, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    with tempfile.TemporaryDirectory() as name, Sandbox() as sandbox:
        (Path(name) / "probe.mp4").write_bytes(memory.getvalue())
        (Path(name) / "out").mkdir()
        facts = sandbox.decode(Path(name) / "probe.mp4", Path(name) / "out", Sampling()).facts
    return f"{facts.decoder} decodes {facts.codec} in its sandbox"


def _backbone(settings: Settings) -> str:
    from service.adapters.encoder import Encoder
    from service.storage.storage import Storage

    storage = Storage(settings)
    try:
        backbone = Encoder(storage).backbone
        return f"{backbone.name}, {backbone.parameters / 1e6:.1f} M parameters, fingerprint {backbone.fingerprint[:12]}"
    finally:
        storage.close()
