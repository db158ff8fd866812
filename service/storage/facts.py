"""Facts about the installation, and the workers that have been seen."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, delete, select

from service.storage.rows import upsert
from service.storage.tables import house, now, workers


def fact(connection: Connection, key: str) -> Any:
    return connection.scalar(select(house.c.value).where(house.c.key == key))


def facts_named(connection: Connection, beginning: str) -> list[Any]:
    """The values of all facts whose keys begin so."""
    return list(connection.scalars(select(house.c.value).where(house.c.key.startswith(beginning)).order_by(house.c.key)))


def set_fact(connection: Connection, key: str, value: Any) -> None:
    upsert(connection, house, key=key, value=value)


def keep_fact(connection: Connection, key: str, value: Any) -> Any:
    """Writes a fact where there is none; returns the one that is there now, whoever has written it."""
    upsert(connection, house, keep=True, key=key, value=value)
    return fact(connection, key)


def worker_seen(connection: Connection, worker: str) -> None:
    upsert(connection, workers, id=worker, seen_at=now())


def worker_gone(connection: Connection, worker: str) -> None:
    connection.execute(delete(workers).where(workers.c.id == worker))


def living_workers(connection: Connection, seconds: float, lock: bool = False) -> set[str]:
    """Workers seen within so many seconds; with `lock`, their rows are locked until the end of this transaction.

    A sign of life from the future is none: the clock has been set back since, and a living worker has given another.
    """
    query = select(workers.c.id).where(workers.c.seen_at.between(now(-seconds), now(seconds))).order_by(workers.c.id)
    return set(connection.scalars(query.with_for_update() if lock else query))
