"""The index views that a process holds open: opened at first use, kept up to date, evicted by bytes, saved beside.

The rows are the truth. A view comes from its snapshot and the rows since, if the snapshot can be trusted, or else from all
rows; every search first reads what is new. One thread, off the path of searches, writes snapshots, makes large views
approximate and rebuilds worn ones.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import structlog
from sqlalchemy import Connection

from indexer import snapshot
from indexer.index import TOMBSTONE, IndexView, StaleView
from indexer.snapshot import BadSnapshot
from service.adapters.encoder import Encoder
from service.storage import segment_rows
from service.storage.generation_rows import Generation
from service.storage.storage import Storage

log = structlog.get_logger()

TAIL = 4096  # rows read at once
WORTH = 2000  # rows whose reading takes longer than a snapshot's
RETRY_SECONDS = 60.0  # after which a view is tended again where that has failed
SHARE = 1 / 8  # of a view's rows: when so many are new, its snapshot is written again
PART_SECONDS = 3600.0  # a half-written file so old is nobody's any more
CLOSE_SECONDS = 5.0


class Key(NamedTuple):
    """What a view is of."""

    tenant: str
    vector_set: str
    backbone: str


@dataclass(slots=True)
class _Opened:
    view: IndexView
    bytes: int = 0  # as counted among all
    saved: int = 0  # the view's `changes` when it was last saved
    waits: bool = False  # for the thread that saves and settles
    not_before: float = 0.0  # monotonic; after a failure


class Views:
    """Safe to use from several threads. `bytes` is the memory of all open views."""

    def __init__(self, storage: Storage, encoder: Encoder) -> None:
        self._storage, self._encoder = storage, encoder
        self._folder = storage.settings.snapshots
        self.bytes = 0
        self._views: OrderedDict[Key, _Opened] = OrderedDict()  # least recently used first
        self._opening: dict[Key, Future[_Opened]] = {}
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closing = False
        if self._folder.is_dir():
            self.beside(self._prune)

    def __len__(self) -> int:
        return len(self._views)

    def view(self, tenant: str, generation: Generation) -> IndexView:
        """The view of the generation's vectors, with every row that was there when it was asked for."""
        key = Key(tenant, generation.vector_set, generation.backbone)
        opened = self._get(key)
        try:
            view = self._followed(key, opened.view)
        except StaleView as error:
            log.warning("view_stale", vector_set=key.vector_set, reason=str(error))
            self._drop(key, opened)
            opened = self._get(key)
            view = self._followed(key, opened.view)
        self._count(key, opened)
        return view

    def beside(self, job: Callable[[], None]) -> None:
        """Has the views' own thread do this, after what it was given before."""
        self._jobs.put(job)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="views", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """What is being written is ended; the rest is left, the rows hold all."""
        self._closing = True
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(CLOSE_SECONDS)

    # --- opening, following, evicting: on the searches' threads

    def _get(self, key: Key) -> _Opened:
        """The open view; searches that open the same one at once open it once."""
        with self._lock:
            if key in self._views:
                self._views.move_to_end(key)
                return self._views[key]
            first = key not in self._opening
            future = self._opening.setdefault(key, Future())
        if first:
            try:
                opened = self._open(key)
                with self._lock:
                    self._views[key] = opened
                future.set_result(opened)
            except BaseException as error:
                future.set_exception(error)
            finally:
                del self._opening[key]
        return future.result()

    def _open(self, key: Key) -> _Opened:
        path = self._path(key)
        try:
            view = snapshot.read(path, self._dim(key), key._asdict())
            if view is not None:
                with self._storage.database.read() as connection:
                    _check(connection, key, view)
                with suppress(OSError):
                    os.utime(path)  # the least recently used go first
                return _Opened(view)
        except (BadSnapshot, StaleView) as error:
            log.warning("snapshot_not_trusted", vector_set=key.vector_set, reason=str(error))
        return _Opened(self._from_rows(key))

    def _from_rows(self, key: Key) -> IndexView:
        return self._followed(key, IndexView(self._dim(key)))

    def _dim(self, key: Key) -> int:
        return self._encoder.of(key.backbone).backbone.embed_dim

    def _followed(self, key: Key, view: IndexView) -> IndexView:
        with self._storage.database.read() as connection:
            _follow(connection, key, view)
        return view

    def _count(self, key: Key, opened: _Opened) -> None:
        """Counts the bytes of a view that was used, evicts others if they are too many, and sees what is to do beside."""
        with self._lock:
            if self._views.get(key) is opened:
                size = opened.view.bytes
                self.bytes += size - opened.bytes
                opened.bytes = size
                if opened.view.due is not None or _unsaved(opened) >= SHARE * len(opened.view):
                    self._tend_later(key, opened)
            while self.bytes > self._storage.settings.view_bytes and len(self._views) > 1:
                oldest, evicted = self._views.popitem(last=False)
                self.bytes -= evicted.bytes
                self._tend_later(oldest, evicted)

    def _drop(self, key: Key, opened: _Opened) -> None:
        with self._lock:
            if self._views.get(key) is opened:
                del self._views[key]
                self.bytes -= opened.bytes

    # --- saving and mending: beside

    def _tend_later(self, key: Key, opened: _Opened) -> None:
        if (
            not opened.waits
            and time.monotonic() >= opened.not_before
            and (opened.view.due is not None or _unsaved(opened) >= WORTH)
        ):
            opened.waits = True
            self.beside(lambda: self._tend(key, opened))

    def _tend(self, key: Key, opened: _Opened) -> None:
        """Saves a view and does what is due; if that fails, the next search after `RETRY_SECONDS` has it tried again."""
        try:
            self._save_and_settle(key, opened)
            self._prune()
        except BaseException:
            opened.not_before = time.monotonic() + RETRY_SECONDS
            raise
        finally:
            opened.waits = False

    def _save_and_settle(self, key: Key, opened: _Opened) -> None:
        if _unsaved(opened) >= WORTH:
            self._save(key, opened)
        due = opened.view.due
        if due is not None and self._views.get(key) is opened and not self._closing:
            view = opened.view if due == "settle" else self._from_rows(key)
            if view.due == "settle":
                view.settle()
            opened.view = view
            if len(view) >= WORTH:
                self._save(key, opened)

    def _save(self, key: Key, opened: _Opened) -> None:
        started, changes = time.monotonic(), opened.view.changes
        if self._storage.settings.snapshot_bytes:
            path = self._path(key)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                size = snapshot.write(path, opened.view, key._asdict(), lambda: self._still_searched(key, opened.view))
            except (OSError, StaleView) as error:  # a full disk, what was deleted meanwhile: the view does without
                log.warning("snapshot_not_written", vector_set=key.vector_set, reason=str(error))
            else:
                seconds = round(time.monotonic() - started, 3)
                log.info("snapshot_written", vector_set=key.vector_set, segments=len(opened.view), bytes=size, seconds=seconds)
        opened.saved = changes

    def _still_searched(self, key: Key, view: IndexView) -> None:
        """Follows the rows. Raises StaleView where no search uses them any more: they are deleted, or will be."""
        with self._storage.database.read() as connection:
            if key.vector_set not in segment_rows.searched_sets(connection, key.tenant):
                raise StaleView("no search uses it")
            _follow(connection, key, view)

    def _prune(self) -> None:
        """Removes snapshots of vectors that no search uses any more, and the least recently used beyond the bound."""
        kept = []
        for path in self._folder.glob("*/*"):
            with suppress(FileNotFoundError):
                status = path.stat()
                if path.suffix == ".part":
                    if time.time() - status.st_mtime > PART_SECONDS:
                        path.unlink()
                else:
                    kept.append((status.st_mtime, status.st_size, path))
        wanted: dict[str, set[str]] = {}
        with self._storage.database.read() as connection:
            for tenant in {path.parent.name for _, _, path in kept}:
                wanted[tenant] = segment_rows.searched_sets(connection, tenant)
        room = self._storage.settings.snapshot_bytes
        for _, size, path in sorted(kept, reverse=True):
            room -= size if path.stem in wanted[path.parent.name] else 0
            if room < 0 or path.stem not in wanted[path.parent.name]:
                path.unlink(missing_ok=True)
        for folder in self._folder.glob("*"):
            with suppress(OSError):
                folder.rmdir()  # if it is empty

    def _path(self, key: Key) -> Path:
        return _snapshot(self._storage, key.tenant, key.vector_set)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                log.exception("view_not_tended")


def forget(storage: Storage, tenant: str, vector_sets: Iterable[str]) -> None:
    """Removes the snapshots of these vector sets, which hold vectors that have been marked as deleted in a transaction before.

    One that another process writes at the same time does not come to be, or is without them.
    """
    for vector_set in vector_sets:
        snapshot.remove(_snapshot(storage, tenant, vector_set))


def _snapshot(storage: Storage, tenant: str, vector_set: str) -> Path:
    return storage.settings.snapshots / tenant / f"{vector_set}.view"


def _unsaved(opened: _Opened) -> int:
    """Rows applied since the view was saved, or opened from its snapshot."""
    return opened.view.changes - opened.saved


def _follow(connection: Connection, key: Key, view: IndexView) -> None:
    """Applies the rows after the view's last one, which is read again as a witness: it stands in the table until its video
    is deleted, and then a tombstone stands behind it. Raises StaleView where neither is there.
    """
    while True:
        seq, video = view.tip
        rows = segment_rows.segments_after(connection, key.tenant, key.vector_set, seq - 1, TAIL)
        if seq and not any(r["video_id"] == video and (r["seq"] == seq or r["ordinal"] == TOMBSTONE) for r in rows):
            raise StaleView(f"row {seq} of the table is not that of {video}")
        view.apply(rows)
        if len(rows) < TAIL:
            return


def _check(connection: Connection, key: Key, view: IndexView) -> None:
    """Follows, and holds what the view has counted against the table. Raises StaleView where they differ.

    A database that was restored gives its sequence numbers again: other videos get them, and ids of videos never come again.
    """
    _follow(connection, key, view)
    while (held := segment_rows.tally(connection, key.tenant, key.vector_set))[0] != view.tip[0]:
        _follow(connection, key, view)
    if held[1:] != view.tally:
        raise StaleView(f"the table holds {held[1:]}, not {view.tally}")
