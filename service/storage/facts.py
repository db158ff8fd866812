"""Facts about the installation, and the workers that have been seen."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from service.storage.tables import house, now, workers


def fact(connection: Connection, key: str) -> Any:
    return connection.scalar(select(house.c.value).where(house.c.key == key))


def set_fact(connection: Connection, key: str, value: Any) -> None:
    connection.execute(delete(house).where(house.c.key == key))
    connection.execute(insert(house).values(key=key, value=value))


def worker_seen(connection: Connection, worker: str) -> None:
    if not connection.execute(update(workers).where(workers.c.id == worker).values(seen_at=now())).rowcount:
        connection.execute(insert(workers).values(id=worker, seen_at=now()))


def worker_gone(connection: Connection, worker: str) -> None:
    connection.execute(delete(workers).where(workers.c.id == worker))


def living_workers(connection: Connection, seconds: float, lock: bool = False) -> set[str]:
    """Workers seen within so many seconds; with `lock`, their rows are locked until the end of this transaction.

    A sign of life from the future is none: the clock has been set back since, and a living worker has given another.
    """
    query = select(workers.c.id).where(workers.c.seen_at.between(now(-seconds), now(seconds))).order_by(workers.c.id)
    return set(connection.scalars(query.with_for_update() if lock else query))
