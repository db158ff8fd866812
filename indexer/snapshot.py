"""A view on disk: one file, written aside and renamed, that is read back only if every byte of it is as it was written.

The database stays the truth. A file that is torn, damaged, of another format or of another set of vectors raises BadSnapshot,
and the view is rebuilt from its rows. Whether the rows have gone on from where the file ends is for the reader to see.

Layout: MAGIC, the SHA-256 of all that follows, the length of the facts (8 bytes), the facts (JSON), then the arrays one after
the other. FAISS trusts the bytes it is given, so nothing is handed to it before the checksum has been verified.

What is deleted stays in a view, filtered out, but does not get into its file. `remove` is for files that were written before.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from indexer.index import ROW, Dump, IndexView, faiss

MAGIC = b"polyclip view 1\n"
DIGEST = len(MAGIC), len(MAGIC) + 32
PARTS = {"rows": ROW, "alive": np.dtype(np.bool_), "index": np.dtype(np.uint8)}


class BadSnapshot(ValueError):
    """The file is not a whole snapshot of what it was asked for."""


def write(path: Path, view: IndexView, facts: Mapping[str, str], follow: Callable[[], None] = lambda: None) -> int:
    """Writes the view to `path` in one step; returns its bytes. `facts` say what it is a view of. Raises OSError.

    `follow` brings the view up to date when the file has been begun: what is deleted later meets the file in `remove`, and it
    does not come to be.
    """
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with aside.open("wb") as file:
            follow()
            parts = _parts(_without_dead(view.dump()), view.dim, facts)
            digest = hashlib.sha256()
            for part in parts:
                digest.update(part)
            for part in (MAGIC, digest.digest(), *parts):
                file.write(part)
            size = file.tell()
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return size


def remove(path: Path) -> None:
    """Removes the file, and those that are being written: first these, or one could take the file's place afterwards."""
    for aside in path.parent.glob(f"{path.name}.*.part"):
        aside.unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _parts(dump: Dump, dim: int, facts: Mapping[str, str]) -> list[bytes | memoryview]:
    arrays = [np.ascontiguousarray(getattr(dump, name)).view(np.uint8).data for name in PARTS]
    state = {"names": list(dump.names), "tip": dump.tip, "tally": dump.tally, "trained": dump.trained}
    header = {"facts": {**facts, "dim": dim}, "state": state, "bytes": [len(array) for array in arrays]}
    told = json.dumps(header).encode()
    return [len(told).to_bytes(8, "little"), told, *arrays]


def _without_dead(dump: Dump) -> Dump:
    """With zeros for the vectors of deleted segments, and no names for videos that have no others."""
    dead = ~dump.alive
    if not dead.any():
        return dump
    index = faiss.deserialize_index(dump.index)
    if dump.trained:
        for number in range(index.nlist):
            size = index.invlists.list_size(number)
            codes = faiss.rev_swig_ptr(index.invlists.get_codes(number), size * index.code_size).reshape(size, -1)
            codes[dead[faiss.rev_swig_ptr(index.invlists.get_ids(number), size)]] = 0
    else:
        faiss.rev_swig_ptr(index.codes.data(), index.codes.size()).reshape(len(dead), -1)[dead] = 0
    living = set(dump.rows["video"][dump.alive].tolist())
    names = [name if number in living else "" for number, name in enumerate(dump.names)]
    return replace(dump, index=faiss.serialize_index(index), names=names)


def read(path: Path, dim: int, facts: Mapping[str, str]) -> IndexView | None:
    """The view in the file, as it was when it was written; None if there is no file. Raises BadSnapshot."""
    try:
        data = memoryview(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadSnapshot(f"{path.name}: {error}") from error
    first, last = DIGEST
    if data[:first] != MAGIC:
        raise BadSnapshot(f"{path.name}: not a snapshot of this format")
    if hashlib.sha256(data[last:]).digest() != data[first:last]:
        raise BadSnapshot(f"{path.name}: its checksum is wrong")
    try:
        start = last + 8 + int.from_bytes(data[last : last + 8], "little")
        header = json.loads(bytes(data[last + 8 : start]))
        state = header["state"]
        for (name, kind), size in zip(PARTS.items(), header["bytes"], strict=True):
            state[name] = np.frombuffer(data[start : start + size], kind)
            start += size
        if header["facts"] != {**facts, "dim": dim}:
            raise ValueError(f"it is of {header['facts']}")
        state["tip"], state["tally"] = tuple(state["tip"]), tuple(state["tally"])
        return IndexView.load(Dump(**state), dim)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:  # whole, but not what was asked for
        raise BadSnapshot(f"{path.name}: {error}") from error
