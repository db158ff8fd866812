"""Tasks: the public face of the jobs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Query
from starlette.responses import StreamingResponse

from service import catalog, paging
from service.catalog import Task
from service.routes.access import PROBLEMS, CanWrite, House, InHouse, collection_of
from service.routes.collections import listing

router = APIRouter(prefix="/tasks", tags=["tasks"], responses=PROBLEMS)
Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
CANCELLABLE = ("train_adapter", "activate", "evaluate")
ENDED = ("succeeded", "failed", "cancelled")
POLL_SECONDS = 0.5


class TaskNotCancellable(ValueError):
    """A task of this kind runs to its end."""


@router.get("")
def list_all(
    tenant: CanWrite,
    house: InHouse,
    collection: str | None = None,
    status: Status | None = None,
    page_limit: Annotated[int, Query(ge=1, le=50)] = 10,
    page_token: str | None = None,
) -> dict[str, Any]:
    """The tenant's tasks, newest first."""
    with house.runtime.database.read() as connection:
        only = collection_of(connection, tenant, collection).id if collection is not None else None
        page = catalog.list_tasks(connection, tenant.id, only, status, page_limit, paging.decode("id", page_token))
        return listing([show(task) for task in page.rows], page)


@router.get("/{task_id}")
def get(task_id: str, tenant: CanWrite, house: InHouse) -> dict[str, Any]:
    """Status, progress from 0 to 1, and the result or the error."""
    return show(_task(house, tenant.id, task_id))


@router.post("/{task_id}/cancel")
def cancel(task_id: str, tenant: CanWrite, house: InHouse) -> dict[str, Any]:
    """A waiting task ends at once; a running one at its next step."""
    with house.runtime.database.write() as connection:
        task = catalog.task(connection, tenant.id, task_id)
        if task.kind not in CANCELLABLE and task.status not in ENDED:
            raise TaskNotCancellable(f"a task of kind {task.kind} runs to its end; to stop indexing a video, delete the video")
        catalog.set_task(connection, tenant.id, task_id, cancel_requested=True)
        if task.status == "queued":
            catalog.end_task(connection, tenant.id, task_id, "cancelled")
        return show(catalog.task(connection, tenant.id, task_id))


@router.get("/{task_id}/events")
async def events(task_id: str, tenant: CanWrite, house: InHouse) -> StreamingResponse:
    """Server-sent events: the task after every change, until it ends."""
    first = await to_thread.run_sync(_task, house, tenant.id, task_id)

    async def stream() -> AsyncIterator[str]:
        task, shown, number = first, None, 0
        while True:
            state = show(task)
            if state != shown:
                shown, number = state, number + 1
                yield f"id: {number}\nevent: task\ndata: {json.dumps(state)}\n\n"
            if task.status in ENDED:
                return
            await asyncio.sleep(POLL_SECONDS)
            task = await to_thread.run_sync(_task, house, tenant.id, task_id)

    return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def show(task: Task) -> dict[str, Any]:
    return {
        "id": task.id,
        "kind": task.kind,
        "status": task.status,
        "progress": task.progress,
        "message": task.message,
        "error": task.error,
        "created_at": task.created_at,
        "started_at": task.started_at,
        "finished_at": task.finished_at,
        "result": task.result,
    }


def _task(house: House, tenant: str, task_id: str) -> Task:
    with house.runtime.database.read() as connection:
        return catalog.task(connection, tenant, task_id)
