"""Tasks: the public face of the jobs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, insert, select, update

from service.catalog.rows import NotFound, Page, page, record
from service.records import new_id, now, tasks


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
    created_at: str
    started_at: str | None
    finished_at: str | None


def add_task(connection: Connection, tenant: str, collection: str | None, kind: str, request: Mapping[str, Any]) -> Task:
    task = Task(
        new_id("task"), tenant, collection, kind, "queued", 0.0, "", dict(request), None, None, False, now(), None, None
    )
    connection.execute(insert(tasks).values(**{name: getattr(task, name) for name in Task.__dataclass_fields__}))
    return task


def task(connection: Connection, tenant: str, task_id: str) -> Task:
    mine = and_(tasks.c.tenant_id == tenant, tasks.c.id == task_id)
    row = connection.execute(select(tasks).where(mine)).mappings().first()
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
    """Changes a task that has not ended."""
    mine = and_(tasks.c.tenant_id == tenant, tasks.c.id == task_id, tasks.c.status.in_(("queued", "running")))
    connection.execute(update(tasks).where(mine).values(**values))


def start_task(connection: Connection, tenant: str, task_id: str) -> None:
    set_task(connection, tenant, task_id, status="running", started_at=now())


def end_task(connection: Connection, tenant: str, task_id: str, status: str, **values: Any) -> None:
    progress = {"progress": 1.0} if status == "succeeded" else {}
    set_task(connection, tenant, task_id, status=status, finished_at=now(), **progress, **values)


def open_tasks(connection: Connection) -> list[Task]:
    """Every tenant's tasks that have not ended: for the sweep of the job engine alone."""
    query = select(tasks).where(tasks.c.status.in_(("queued", "running"))).order_by(tasks.c.id)
    return [record(Task, row) for row in connection.execute(query).mappings()]
