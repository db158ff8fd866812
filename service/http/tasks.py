"""Tasks: the public face of the jobs."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Header, Query, Request, Response
from sqlalchemy import Connection
from starlette.responses import StreamingResponse

from service.errors import PolyclipError
from service.http import paging
from service.http.answers import TaskOut, TaskPage, TaskStatus
from service.http.auth import PROBLEMS, Anyone, CanWrite, InServices, KeyFirst, Services, collection_of
from service.http.collections import listing
from service.http.streams import RETRY_SECONDS, EventStream, check_streams, last_told
from service.jobs import task_rows
from service.jobs.kinds import CANCELLED
from service.jobs.task_rows import Task
from service.storage import collection_rows, keys
from service.storage.keys import InvalidKey
from service.storage.rows import NotFound
from service.storage.tables import OPEN
from service.videos import video_rows

router = APIRouter(route_class=KeyFirst, prefix="/tasks", tags=["tasks"], responses=PROBLEMS)
CANCELLABLE = ("index_video", "fetch_video", "train_adapter", "activate", "evaluate", "import_collection")
POLL_SECONDS = 0.5
QUIET_SECONDS = 15.0  # then a comment tells the client, and whatever stands between, that the connection lives


class TaskNotCancellable(PolyclipError):
    """A task of this kind runs to its end."""

    code, status, hint = "task_not_cancellable", 409, "wait for its end"


@router.get("", name="list_tasks", response_model=TaskPage)
def list_all(
    tenant: CanWrite,
    services: InServices,
    collection: str | None = None,
    status: TaskStatus | None = None,
    page_limit: Annotated[int, Query(ge=1, le=50)] = 10,
    page_token: str | None = None,
) -> dict[str, Any]:
    """The tenant's tasks, newest first."""
    with services.storage.database.read() as connection:
        only = collection_of(connection, tenant, collection).id if collection is not None else None
        page = task_rows.list_tasks(connection, tenant.id, only, status, page_limit, paging.decode("id", page_token))
        return listing(shown(connection, tenant.id, page.rows), page)


@router.get("/{task_id}", name="get_task", response_model=TaskOut)
def get(task_id: str, tenant: CanWrite, services: InServices) -> dict[str, Any]:
    """Status, progress from 0 to 1, the seconds that are left at the pace so far, and the result or the error."""
    return _show(services, _task(services, tenant.id, task_id))


@router.post("/{task_id}/cancel", name="cancel_task", response_model=TaskOut)
def cancel(task_id: str, tenant: CanWrite, services: InServices) -> dict[str, Any]:
    """A waiting task ends at once; a running one when it next reports, unless it ends before. The video of a cancelled indexing
    task ends `failed` with the code `cancelled`; it may be uploaded again.
    """
    with services.storage.database.write() as connection:
        task = task_rows.task(connection, tenant.id, task_id)
        if task.kind == "index_video":
            video_rows.lock_video(connection, tenant.id, task.request["video_id"])
        task = task_rows.lock_task(connection, tenant.id, task_id)
        if task.kind not in CANCELLABLE and task.status in OPEN:
            raise TaskNotCancellable(f"a task of kind {task.kind} runs to its end")
        task_rows.set_task(connection, tenant.id, task_id, cancel_requested=True)
        if task.status == "queued":
            if task.kind == "index_video":
                video_rows.set_video(connection, tenant.id, task.request["video_id"], status="failed", error=CANCELLED)
            task_rows.end_task(connection, tenant.id, task_id, "cancelled")
        return shown(connection, tenant.id, [task_rows.task(connection, tenant.id, task_id)])[0]


@router.get(
    "/{task_id}/events",
    name="follow_task",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
        204: {"description": "the end of the task has been told before"},
    },
)
async def events(
    task_id: str,
    request: Request,
    tenant: CanWrite,
    who: Anyone,
    services: InServices,
    last: Annotated[str | None, Header(alias="Last-Event-ID")] = None,
) -> Response:
    """Server-sent events: the task as it stands and after every change, until it ends.

    An event's id is the revision of the task. A client that comes back with `Last-Event-ID` is told what is newer; one that has
    seen the end gets 204, after which an `EventSource` does not come back.
    """
    first = await to_thread.run_sync(_task, services, tenant.id, task_id)
    before = last_told(last)
    told = -1 if before is None else before
    if first.revision <= told and first.status not in OPEN:
        return Response(status_code=204)

    check_streams(services, who)

    async def stream() -> AsyncIterator[str]:
        task, shown, quiet_since = first, told, time.monotonic()
        yield f"retry: {1000 * RETRY_SECONDS}\n\n"
        while True:
            if task.revision > shown:
                shown, quiet_since = task.revision, time.monotonic()
                yield f"id: {shown}\nevent: task\ndata: {json.dumps(await to_thread.run_sync(_show, services, task))}\n\n"
            elif time.monotonic() - quiet_since > QUIET_SECONDS:
                quiet_since = time.monotonic()
                yield ": still here\n\n"
            if task.status not in OPEN or request.app.state.draining.is_set():
                return
            await asyncio.sleep(POLL_SECONDS)
            try:
                await to_thread.run_sync(keys.check_still_valid, services.storage.database, who)
                task = await to_thread.run_sync(_task, services, tenant.id, task_id)
            except (NotFound, InvalidKey):  # gone with its tenant, or no longer this client's to see
                return

    return EventStream(stream(), services, who)


def shown(connection: Connection, tenant: str, of: Sequence[Task]) -> list[dict[str, Any]]:
    names = collection_rows.collection_names(
        connection, tenant, [task.collection_id for task in of if task.collection_id is not None]
    )
    return [show(task, names.get(task.collection_id or "", task.request.get("collection"))) for task in of]


def _show(services: Services, task: Task) -> dict[str, Any]:
    with services.storage.database.read() as connection:
        return shown(connection, task.tenant_id, [task])[0]


def show(task: Task, collection: str | None) -> dict[str, Any]:
    """`collection`: the name of the task's collection, as it is or was; that of an import, as it will be."""
    return {
        "id": task.id,
        "collection": collection,
        "kind": task.kind,
        "status": task.status,
        "progress": task.progress,
        "eta_seconds": _eta(task),
        "message": task.message,
        "error": task.error,
        "request_id": task.request_id,
        "created_at": task.created_at,
        "started_at": task.started_at,
        "finished_at": task.finished_at,
        "result": task.result,
    }


def _eta(task: Task) -> float | None:
    """Seconds until the end, if the rest goes as fast as what was done since the first start; None while that is nothing."""
    if task.status != "running" or task.started_at is None or not 0 < task.progress < 1:
        return None
    elapsed = (datetime.now(UTC) - datetime.fromisoformat(task.started_at)).total_seconds()
    return round(max(0.0, elapsed) * (1 - task.progress) / task.progress, 1)


def _task(services: Services, tenant: str, task_id: str) -> Task:
    with services.storage.database.read() as connection:
        return task_rows.task(connection, tenant, task_id)
