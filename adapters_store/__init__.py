"""Adapter artifacts: immutable versions named by their sha256, manifests, and the ones resident on the device."""

from adapters_store.artifact import (
    AdapterMismatch,
    Artifact,
    InvalidAdapter,
    Manifest,
    describe,
    pack,
    read,
    unpack,
    write,
)
from adapters_store.residency import ResidentAdapters

__all__ = [
    "AdapterMismatch",
    "Artifact",
    "InvalidAdapter",
    "Manifest",
    "ResidentAdapters",
    "describe",
    "pack",
    "read",
    "unpack",
    "write",
]
