"""The FAISS view of a vector set: rows of the database followed by sequence number.

A view holds the pooled vector of every live segment and can be thrown away and rebuilt at any time. It begins flat: exact,
in float16 as the rows are. One that grows large is made approximate aside (inverted lists of 8-bit vectors), while searches
and appends go on. Deleted segments stay in it, filtered out, until it is rebuilt. It never sees torch.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray

faiss: Any = _faiss  # its stubs know other names and arguments
TOMBSTONE = -1
ROW = np.dtype([("seq", "<i8"), ("start", "<f8"), ("end", "<f8"), ("video", "<i4"), ("ordinal", "<i4")])

# Measured on one thread (`python -m bench index_sizes`, docs/benchmarks.md): a flat scan of 50,000 × 512 takes 2 ms and one of
# 200,000 takes 6; 128 of 900 lists take 1.4 ms there and find 97 % of the same 200 candidates. HNSW searches in 1.1 ms, but
# takes 26 s to build where the lists take 6, and cannot be searched through for few allowed rows.
LARGE = 50_000 * 512  # numbers in a flat view above which it is made approximate
PROBES = 128  # lists that a search without filter reads
TRAINING = 64  # vectors for each list
SPARE = 0.5  # of the range of the sample, on both sides, for what comes later and is otherwise: costs 0.3 % of recall
DEAD, FEW_DEAD = 1 / 3, 1024  # a view is rebuilt when more than this share of its rows, and more than a few, are dead
OUTGROWN = 2.0  # … or when it has this many times the rows that its lists were made for
CHUNK = 4096  # rows that are copied at once from the flat index to the approximate one: appends wait so long, 50 ms


class StaleView(ValueError):
    """The table is not the one that this view has followed: the set was dropped and filled anew, or the database restored."""


class Segment(NamedTuple):
    """A stretch of a video in seconds; `ordinal` counts the video's segments from 0."""

    video_id: str
    ordinal: int
    start: float
    end: float


class Candidate(NamedTuple):
    """A segment that the first stage found; `score` is the cosine of the pooled vector, in 8 bits where it is approximate."""

    seq: int
    segment: Segment
    score: float


@dataclass(frozen=True, slots=True)
class Dump:
    """All that a view is, in arrays and plain values; row i of `rows` and `alive` is vector i of the index."""

    index: NDArray[np.uint8]  # as FAISS writes it
    rows: NDArray[Any]  # of ROW; `video` is a position in `names`
    alive: NDArray[np.bool_]
    names: Sequence[str]
    tip: tuple[int, str]
    tally: tuple[int, int, str]
    trained: int


class IndexView:
    """Inner-product search over pooled vectors; safe to use from several threads.

    `tip`: sequence number and video of the last row that has been applied. `tally`: how many rows the table holds up to
    there, the sum of their sequence numbers, and the greatest video id among them, if the table is the one that was followed.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.tip = (0, "")
        self.tally = (0, 0, "")
        self.changes = 0  # rows applied
        self._index = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        self._trained = 0  # rows that the lists were made for; 0: flat
        self._rows = np.empty(0, ROW)  # grows by doubling; the index knows how many count
        self._alive = np.empty(0, np.bool_)
        self._names: list[str] = []
        self._numbers: dict[str, int] = {}  # video with live segments → its position in `_names`
        self._live = 0
        self._changing = threading.Lock()  # held, before the other, by one who changes the view or needs it unchanged
        self._lock = threading.Lock()  # held while the index is searched or changed

    def __len__(self) -> int:
        """Number of live segments."""
        return self._live

    @property
    def videos(self) -> int:
        """Number of videos with live segments."""
        return len(self._numbers)

    @property
    def approximate(self) -> bool:
        return self._trained > 0

    @property
    def bytes(self) -> int:
        """Memory of the vectors and of the bookkeeping; of FAISS's and Python's objects roughly."""
        vectors = self._index.ntotal * (self.dim + 8 if self.approximate else 2 * self.dim)
        lists = 4 * self.dim * self._index.nlist if self.approximate else 0
        return int(vectors + lists + len(self._rows) * (ROW.itemsize + 1) + len(self._names) * 200 + 4096)

    @property
    def due(self) -> Literal["settle", "rebuild"] | None:
        """`settle`: grown large, it should be made approximate. `rebuild`: another view should be made from the rows."""
        total = self._index.ntotal
        if total - self._live > max(FEW_DEAD, DEAD * total) or (self.approximate and total > OUTGROWN * self._trained):
            return "rebuild"
        return "settle" if not self.approximate and self._live * self.dim > LARGE else None

    def apply(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Follows rows of the table `segments` in order; rows seen before are passed over.

        Rows of one vector set must become visible in the order of their sequence numbers, and the segments of a video
        together: `segment_rows.add_segments` sees to both. Raises StaleView for a video that is here already.
        """
        fresh = [row for row in rows if row["seq"] > self.tip[0]]
        if not fresh:
            return
        use_one_thread()
        with self._changing, self._lock:
            batch: list[Mapping[str, Any]] = []
            for row in fresh:
                if row["seq"] <= self.tip[0]:  # another thread was first
                    continue
                if row["ordinal"] == TOMBSTONE:
                    self._append(batch)
                    self._bury(row)
                    batch = []
                else:
                    batch.append(row)
            self._append(batch)

    def search(
        self, query: NDArray[np.float32], k: int, videos: set[str] | None = None, without: Collection[str] = ()
    ) -> list[Candidate]:
        """The k live segments nearest to `query` (D,), best first; with `videos`, only of these, and of none in `without`.

        An approximate view reads the more lists the fewer rows are allowed, in the end all: a small allowed set is searched
        exactly, but for the 8 bits, and k are found where there are k.
        """
        use_one_thread()
        norm = float(np.linalg.norm(query))
        with self._lock:
            total = int(self._index.ntotal)
            rows, wanted = self._rows[:total], self._alive[:total]
            allowed = self._live
            if videos is not None or without:
                chosen = np.full(len(self._names), videos is None)
                chosen[[self._numbers[video] for video in videos or () if video in self._numbers]] = True
                chosen[[self._numbers[video] for video in without if video in self._numbers]] = False
                wanted = wanted & chosen[rows["video"]]
                allowed = int(np.count_nonzero(wanted))
            if not allowed or not norm:
                return []
            bits = np.packbits(wanted, bitorder="little")
            selector = faiss.IDSelectorBitmap(bits) if allowed < total else None
            unit, k = (query / norm)[None].astype(np.float32), min(k, allowed)
            if self.approximate:
                probes = min(self._index.nlist, math.ceil(PROBES * total / allowed))
                params = faiss.SearchParametersIVF(nprobe=probes, sel=selector)
                scores, found = self._index.search(unit, k, params=params)
                if found[0, -1] < 0:  # fewer than k in the lists that were read
                    params = faiss.SearchParametersIVF(nprobe=self._index.nlist, sel=selector)
                    scores, found = self._index.search(unit, k, params=params)
            else:
                scores, found = self._index.search(unit, k, params=faiss.SearchParameters(sel=selector))
            hits = rows[found[0][found[0] >= 0]].tolist()
            return [
                Candidate(seq, Segment(self._names[video], ordinal, start, end), score)
                for (seq, start, end, video, ordinal), score in zip(hits, scores[0].tolist(), strict=False)
            ]

    def settle(self) -> None:
        """Makes a flat view approximate. Takes seconds (9 for 200,000 × 512); searches and appends go on meanwhile."""
        use_one_thread()
        with self._changing:
            live = np.flatnonzero(self._alive[: self._index.ntotal])
            lists = round(2 * math.sqrt(len(live)))
            sample = np.random.default_rng(0).choice(live, min(len(live), TRAINING * lists), replace=False)
            vectors = self._index.reconstruct_batch(sample)
        quantizer, kind = faiss.IndexFlatIP(self.dim), faiss.ScalarQuantizer.QT_8bit
        index = faiss.IndexIVFScalarQuantizer(quantizer, self.dim, lists, kind, faiss.METRIC_INNER_PRODUCT)
        index.cp.niter = 8
        index.sq.rangestat_arg = SPARE
        index.train(vectors)
        while not self.approximate:
            with self._changing:
                left = self._index.ntotal - index.ntotal
                index.add(self._index.reconstruct_n(index.ntotal, min(left, CHUNK)))
                if left <= CHUNK:
                    with self._lock:
                        self._index, self._trained = index, int(index.ntotal)

    def dump(self) -> Dump:
        """A copy; searches go on meanwhile, appends wait."""
        with self._changing:
            total = self._index.ntotal
            rows, alive = self._rows[:total].copy(), self._alive[:total].copy()
            index = faiss.serialize_index(self._index)
            return Dump(index, rows, alive, list(self._names), self.tip, self.tally, self._trained)

    @classmethod
    def load(cls, dump: Dump, dim: int) -> IndexView:
        """The view that was dumped. FAISS trusts what it reads: `dump.index` must be the bytes that it wrote.

        Raises ValueError where the parts do not fit each other or `dim`.
        """
        view = cls(dim)
        view._index, kind = faiss.deserialize_index(dump.index), type(view._index)
        view._trained = dump.trained
        if (view._index.d, view._index.ntotal, len(dump.alive)) != (dim, len(dump.rows), len(dump.rows)):
            raise ValueError("its index has another size than its rows")
        if not isinstance(view._index, faiss.IndexIVFScalarQuantizer if view.approximate else kind):
            raise ValueError(f"its index is a {type(view._index).__name__}")
        view._rows, view._alive, view._names = dump.rows.copy(), dump.alive.copy(), list(dump.names)
        view._live = int(np.count_nonzero(dump.alive))
        view._numbers = {view._names[number]: number for number in np.unique(dump.rows["video"][dump.alive]).tolist()}
        view.tip, view.tally = dump.tip, dump.tally
        return view

    def _append(self, batch: Sequence[Mapping[str, Any]]) -> None:
        if not batch:
            return
        numbers = []
        for row in batch:
            video = row["video_id"]
            if not self._names or self._names[-1] != video or video not in self._numbers:
                if video in self._numbers:
                    raise StaleView(f"segments of {video} are here already")
                self._numbers[video] = len(self._names)
                self._names.append(video)
            numbers.append(len(self._names) - 1)
        block = np.empty(len(batch), ROW)
        block["video"] = numbers
        for name in ("seq", "start", "end", "ordinal"):
            block[name] = [row[name] for row in batch]
        vectors = np.frombuffer(b"".join(row["pooled"] for row in batch), np.float16).reshape(len(batch), self.dim)
        first, last = int(self._index.ntotal), int(self._index.ntotal) + len(batch)
        if last > len(self._rows):
            room = max(2 * len(self._rows), last) - len(self._rows)
            self._rows = np.concatenate([self._rows, np.empty(room, ROW)])
            self._alive = np.concatenate([self._alive, np.zeros(room, np.bool_)])
        self._index.add(vectors.astype(np.float32))
        self._rows[first:last], self._alive[first:last] = block, True
        self._live += len(batch)
        self.changes += len(batch)
        self._seen(batch[-1], len(batch), int(block["seq"].sum()), max(row["video_id"] for row in batch))

    def _bury(self, row: Mapping[str, Any]) -> None:
        number = self._numbers.pop(row["video_id"], None)
        there = self._rows["video"][: self._index.ntotal] == number if number is not None else []
        dead = np.flatnonzero(there)
        self._alive[dead] = False
        self._live -= len(dead)
        self.changes += 1
        self._seen(row, 1 - len(dead), row["seq"] - int(self._rows["seq"][dead].sum()), row["video_id"])

    def _seen(self, row: Mapping[str, Any], count: int, seqs: int, video: str) -> None:
        self.tip = (row["seq"], row["video_id"])
        self.tally = (self.tally[0] + count, self.tally[1] + seqs, max(self.tally[2], video))


def use_one_thread() -> None:
    """For FAISS on the calling thread: a scan reads memory, which a second thread does not do faster (42 ms to 73 for a
    flat search of 200,000 × 512 in float32). OpenMP keeps this setting for each thread apart.
    """
    faiss.omp_set_num_threads(1)
