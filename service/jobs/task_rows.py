"""Tasks: the public face of the jobs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, case, delete, func, insert, select, update
from structlog.contextvars import get_contextvars

from service.storage.rows import NotFound, Page, page, record
from service.storage.tables import OPEN, new_id, now, tasks


@dataclass(frozen=True, slots=True)
class Task:
    id: str
    tenant_id: str
    collection_id: str | None
    kind: str
    status: str
    progress: float
    message: str
    request: Mapping[str, Any]
    error: Mapping[str, Any] | None
    result: Mapping[str, Any] | None
    cancel_requested: bool
    attempts: int
    revision: int
    created_at: str
    started_at: str | None
    finished_at: str | None

    @property
    def request_id(self) -> str | None:
        """Of the HTTP request that asked for the task, or for the task that made it."""
        return self.request.get("request_id")


def add_task(
    connection: Connection, tenant: str, collection: str | None, kind: str, request: Mapping[str, Any], **values: Any
) -> Task:
    """A task that waits, or with `values` of its other columns one that is further on."""
    asked_by = {name: value for name, value in get_contextvars().items() if name == "request_id"}
    request = {**request, **asked_by}
    task = Task(
        new_id("task"), tenant, collection, kind, "queued", 0.0, "", request, None, None, False, 0, 0, now(), None, None
    )
    task = replace(task, **values)
    connection.execute(insert(tasks).values(**{name: getattr(task, name) for name in Task.__dataclass_fields__}))
    return task


def task(connection: Connection, tenant: str, task_id: str) -> Task:
    return _one(connection, select(tasks).where(tasks.c.tenant_id == tenant, tasks.c.id == task_id), task_id)


def lock_task(connection: Connection, tenant: str, task_id: str) -> Task:
    """The task, which nobody else changes until the end of this transaction."""
    query = select(tasks).where(tasks.c.tenant_id == tenant, tasks.c.id == task_id)
    return _one(connection, query.with_for_update(), task_id)


def _one(connection: Connection, query: Select[Any], task_id: str) -> Task:
    row = connection.execute(query).mappings().first()
    if row is None:
        raise NotFound("task", task_id)
    return record(Task, row)


def list_tasks(
    connection: Connection, tenant: str, collection: str | None, status: str | None, limit: int, after: str | None
) -> Page:
    query = select(tasks).where(tasks.c.tenant_id == tenant)
    if collection is not None:
        query = query.where(tasks.c.collection_id == collection)
    if status is not None:
        query = query.where(tasks.c.status == status)
    return page(connection, query, Task, tasks.c.id, limit, after)


def set_task(connection: Connection, tenant: str, task_id: str, **values: Any) -> None:
    """Changes a task that has not ended. Each change gives its row the next revision."""
    mine = and_(tasks.c.tenant_id == tenant, tasks.c.id == task_id, tasks.c.status.in_(OPEN))
    connection.execute(update(tasks).where(mine).values(revision=tasks.c.revision + 1, **values))


def start_task(connection: Connection, tenant: str, task_id: str, attempts: int = 0) -> None:
    """`attempts`: how many starts are to be counted for it."""
    counted = {"attempts": tasks.c.attempts + attempts} if attempts else {}
    since = func.coalesce(tasks.c.started_at, _not_before(tasks.c.created_at))
    set_task(connection, tenant, task_id, status="running", started_at=since, **counted)


def stop_task(connection: Connection, tenant: str, task_id: str, message: str, attempts: int) -> None:
    """Back into the queue: the starts that count for it are `attempts` now."""
    set_task(connection, tenant, task_id, status="queued", message=message, attempts=attempts)


def add_done(
    connection: Connection, tenant: str, collection: str, kind: str, request: Mapping[str, Any], **values: Any
) -> Task:
    """The record of what has been done at once."""
    stamp = now()
    done = {"status": "succeeded", "progress": 1.0, "created_at": stamp, "finished_at": stamp}
    return add_task(connection, tenant, collection, kind, request, **done, **values)


def end_task(connection: Connection, tenant: str, task_id: str, status: str, **values: Any) -> None:
    progress = {"progress": 1.0} if status == "succeeded" else {}
    ended = _not_before(func.coalesce(tasks.c.started_at, tasks.c.created_at))
    set_task(connection, tenant, task_id, status=status, finished_at=ended, **progress, **values)


def _not_before(earlier: ColumnElement[str]) -> ColumnElement[str]:
    """The time, but for a clock that has been set back since `earlier`."""
    return case((earlier > now(), earlier), else_=now())


def cancel_tasks(connection: Connection, tenant: str, which: ColumnElement[bool]) -> None:
    """Of the tenant's tasks `which`, purges excepted: those that wait end cancelled, those that run are asked to stop."""
    mine = and_(tasks.c.tenant_id == tenant, tasks.c.kind != "purge", which)
    asked = update(tasks).values(cancel_requested=True, revision=tasks.c.revision + 1)
    ended = _not_before(func.coalesce(tasks.c.started_at, tasks.c.created_at))
    connection.execute(asked.where(mine, tasks.c.status == "queued").values(status="cancelled", finished_at=ended))
    connection.execute(asked.where(mine, tasks.c.status == "running"))


def open_tasks(connection: Connection, *which: ColumnElement[bool]) -> list[Task]:
    """Every tenant's tasks that have not ended: for sweeps alone."""
    query = select(tasks).where(tasks.c.status.in_(OPEN), *which).order_by(tasks.c.id)
    return [record(Task, row) for row in connection.execute(query).mappings()]


def forget_tasks(connection: Connection, before: str) -> int:
    """Removes every tenant's tasks that ended before this time."""
    return connection.execute(delete(tasks).where(tasks.c.status.not_in(OPEN), tasks.c.finished_at < before)).rowcount
