"""Which videos of a collection a filter lets through: asked of the database, for a few of them or for all."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable

from sqlalchemy.exc import DBAPIError

from backbone.batcher import DeadlinePassed
from indexer.index import Candidate, IndexView
from service.search import filter_sql
from service.search.filters import Filter
from service.search.question import Vector
from service.storage.database import Database
from service.videos import video_rows

FIRST = 4  # times as many segments as are wanted that are asked after first
LEAST_SHARE = 0.05  # of those that must have been let through, for more to be looked at instead of all videos


class Allowed:
    """The verdicts of one search's filter on videos of the tenant's own collection.

    Raises DeadlinePassed, and ends, when `given_up` is set or `seconds` have gone by.
    """

    def __init__(
        self, database: Database, tenant: str, collection: str, where: Filter, given_up: threading.Event, seconds: float
    ) -> None:
        self._database, self._tenant, self._collection, self._where = database, tenant, collection, where
        self._given_up, self._deadline = given_up, time.monotonic() + seconds
        self._clauses = filter_sql.compiled(where, database.engine.dialect.name)
        self._known: dict[str, bool] = {}
        self._all: set[str] | None = None

    def among(self, videos: Collection[str]) -> set[str]:
        """Those of these videos that are let through; each is asked after once."""
        if self._all is not None:
            return self._all.intersection(videos)
        if fresh := [video for video in videos if video not in self._known]:
            passed = self._asked(fresh)
            self._known |= {video: video in passed for video in fresh}
        return {video for video in videos if self._known[video]}

    def all(self) -> set[str]:
        """Every ready video of the collection that is let through."""
        if self._all is None:
            self._all = self._asked(None)
        return self._all

    def _ended(self) -> bool:
        return self._given_up.is_set() or time.monotonic() > self._deadline

    def _asked(self, ids: Iterable[str] | None) -> set[str]:
        if self._ended():
            raise DeadlinePassed("the filter took too long")
        try:
            with self._database.read_until(self._ended, self._deadline - time.monotonic()) as connection:
                mine = (connection, self._tenant, self._collection)
                told = video_rows.filtered(*mine, self._clauses.may, None if self._clauses.exact else self._clauses.sure, ids)
                passed = {video for video, sure in told if sure}
                if unsure := [video for video, sure in told if not sure]:
                    names = self._where.metadata
                    values = video_rows.filterable(*mine, names, unsure)
                    passed |= {video for video, each in values if self._where.matches(each)}
                return passed
        except DBAPIError as error:
            if self._ended():
                raise DeadlinePassed("the filter took too long") from error
            raise


def nearest(view: IndexView, query: Vector, k: int, allowed: Allowed | None, without: Collection[str] = ()) -> list[Candidate]:
    """The k segments nearest to `query` of videos that a filter lets through and that are not in `without`, best first; fewer
    only where there are no more.

    What is nearest anyway is asked after first, which is quick where the filter lets many through; where it lets few, all
    of them are looked for and the index is searched among these.
    """
    if allowed is None:
        return view.search(query, k, without=without)
    wide = FIRST * k
    while wide <= max(len(view) // 4, FIRST * k):
        found = view.search(query, wide, without=without)
        passed = allowed.among({candidate.segment.video_id for candidate in found})
        held = [candidate for candidate in found if candidate.segment.video_id in passed]
        if len(held) >= k or len(found) < wide:
            return held[:k]
        if len(held) < LEAST_SHARE * len(found):
            break
        wide = int(1.5 * k * len(found) / len(held))
    return view.search(query, k, allowed.all(), without)
