"""Rows of several texts that are asked at once: handed to a batcher as one, so that one forward encodes them all."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

from backbone.batcher import Batcher, Ticket


class _Waiting(NamedTuple):
    row: Any
    given: asyncio.Future[Ticket[Any]]


class Together:
    """What coroutines of one event loop submit in the same turn of it, or those that they start then in the next, goes to the
    batcher together; all are one tenant's.
    """

    def __init__(self) -> None:
        self._waiting: dict[Batcher[Any, Any], list[_Waiting]] = {}

    async def submit(self, batcher: Batcher[Any, Any], row: Any, group: str, deadline: float) -> Ticket[Any]:
        """`Batcher.submit`, after the other coroutines that are ready have come as far. Raises what that does."""
        loop = asyncio.get_running_loop()
        waiting = self._waiting.setdefault(batcher, [])
        if not waiting:
            loop.call_soon(loop.call_soon, self._hand_in, batcher, waiting, group, deadline)  # the next turn but one
        mine = _Waiting(row, loop.create_future())
        waiting.append(mine)
        try:
            return await mine.given
        except asyncio.CancelledError:
            if mine.given.done() and not mine.given.cancelled() and mine.given.exception() is None:
                mine.given.result().cancel()
            raise

    def _hand_in(self, batcher: Batcher[Any, Any], waiting: Sequence[_Waiting], group: str, deadline: float) -> None:
        del self._waiting[batcher]
        wanted = [each for each in waiting if not each.given.done()]
        try:
            tickets = batcher.submit_all([each.row for each in wanted], group=group, deadline=deadline)
        except Exception as error:
            for each in wanted:
                each.given.set_exception(error)
            return
        for each, ticket in zip(wanted, tickets, strict=True):
            each.given.set_result(ticket)
