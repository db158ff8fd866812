"""Exceptions that a user of the command line can mend, as one line each."""

from __future__ import annotations

import os


def explain(error: Exception) -> str | None:
    """The line, or None for what is our own fault and deserves its traceback."""
    from pydantic import ValidationError
    from sqlalchemy.exc import OperationalError

    from adapters_store import AdapterMismatch, InvalidAdapter
    from backbone import BackboneNotFound, UnsupportedBackbone
    from demo.run import DemoFailed
    from indexer.frames import DamagedFrames
    from service.adapters.encoder import OtherBackbone
    from service.adapters.train import TooFewCaptions, TrainingFailed
    from service.cli.files import InvalidFrames
    from service.cli.local import InvalidCaptions, NoDataFolder
    from service.cli.serve import AlreadyServed
    from service.search.query import EmptyText
    from service.storage.blobs import BlobMissing
    from service.storage.database import InvalidText
    from service.storage.rows import AlreadyExists, InvalidName, NotFound, QuotaExceeded
    from service.upkeep.archive import InvalidArchive
    from service.upkeep.import_collection import ArchiveOfOtherBackbone
    from training.dataset import InvalidDataset
    from training.published import InvalidCorpus
    from training.recipe import InvalidRecipe

    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"setting POLYCLIP_{str(first['loc'][0]).upper()}: {first['msg']}" if first["loc"] else first["msg"]
    if isinstance(error, OperationalError):
        return f"the database does not answer: {error.orig}"
    if isinstance(error, OSError):
        where = f": {os.fspath(error.filename)}" if error.filename else ""
        return f"{error.strerror or error}{where}"
    ours = (
        AdapterMismatch, InvalidAdapter, BackboneNotFound, UnsupportedBackbone, BlobMissing, AlreadyExists, InvalidName,
        NotFound, QuotaExceeded, DemoFailed, TooFewCaptions, TrainingFailed, InvalidCaptions, InvalidFrames, OtherBackbone,
        EmptyText, InvalidRecipe, InvalidDataset, InvalidCorpus, DamagedFrames, InvalidArchive, ArchiveOfOtherBackbone,
        NoDataFolder, AlreadyServed, InvalidText,
    )  # fmt: skip
    return " ".join(str(error).split()) if isinstance(error, ours) else None
