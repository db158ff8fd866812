"""A cache of the frame vectors that rescoring reads, bounded by bytes. A row never changes: what is kept never goes stale."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from service.storage import segment_rows
from service.storage.database import Database


class FrameVectors:
    """Rows by sequence number, least recently used first out; safe to use from several threads."""

    def __init__(self, database: Database, capacity: int) -> None:
        self._database = database
        self._capacity = capacity
        self.bytes = 0
        self._rows: OrderedDict[tuple[str, int], bytes] = OrderedDict()  # by vector set and sequence number
        self._lock = threading.Lock()

    def get(self, tenant: str, vector_set: str, seqs: Sequence[int]) -> dict[int, bytes]:
        """The frames (F, D) float16 of the segments that are there. The vector set is the tenant's own."""
        found: dict[int, bytes] = {}
        with self._lock:
            for seq in seqs:
                if (row := self._rows.get((vector_set, seq))) is not None:
                    found[seq] = row
                    self._rows.move_to_end((vector_set, seq))
        missing = [seq for seq in seqs if seq not in found]
        if missing:
            with self._database.read() as connection:
                read = segment_rows.frame_vectors(connection, tenant, vector_set, missing)
            found |= read
            self._keep(vector_set, read)
        return found

    def _keep(self, vector_set: str, rows: dict[int, bytes]) -> None:
        with self._lock:
            for seq, row in rows.items():
                if (vector_set, seq) not in self._rows:
                    self._rows[vector_set, seq] = row
                    self.bytes += len(row)
            while self.bytes > self._capacity:
                self.bytes -= len(self._rows.popitem(last=False)[1])
