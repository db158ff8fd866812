"""Facts about the installation, and the workers that have been seen."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, delete, func, insert, select

from service.records import house, now, workers


def fact(connection: Connection, key: str) -> Any:
    return connection.scalar(select(house.c.value).where(house.c.key == key))


def set_fact(connection: Connection, key: str, value: Any) -> None:
    connection.execute(delete(house).where(house.c.key == key))
    connection.execute(insert(house).values(key=key, value=value))


def worker_seen(connection: Connection, worker: str) -> None:
    connection.execute(delete(workers).where(workers.c.id == worker))
    connection.execute(insert(workers).values(id=worker, seen_at=now()))


def last_heartbeat(connection: Connection) -> str | None:
    return connection.scalar(select(func.max(workers.c.seen_at)))  # type: ignore[no-any-return]
