"""Adapter artifacts: immutable versions named by their sha256, manifests, and the ones resident on the device."""

from adapters_store.artifact import (
    AdapterMismatch,
    Artifact,
    DamagedAdapter,
    Fit,
    InvalidAdapter,
    Manifest,
    RankTooLarge,
    describe,
    pack,
    read,
    unpack,
    write,
)
from adapters_store.lease import Counters, Lease, LeaseTimeout, slots_of
from adapters_store.official import from_official, official_file, read_state, to_official
from adapters_store.pins import PinsExhausted
from adapters_store.residency import Residency

__all__ = [
    "AdapterMismatch",
    "Artifact",
    "Counters",
    "DamagedAdapter",
    "Fit",
    "InvalidAdapter",
    "Lease",
    "LeaseTimeout",
    "Manifest",
    "PinsExhausted",
    "RankTooLarge",
    "Residency",
    "describe",
    "from_official",
    "official_file",
    "pack",
    "read",
    "read_state",
    "slots_of",
    "to_official",
    "unpack",
    "write",
]
