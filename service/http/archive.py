"""A collection as one file: out as a stream, in as a task."""

from __future__ import annotations

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from starlette.responses import StreamingResponse

from service.http import document, uploads
from service.http.answers import CollectionImportOut
from service.http.auth import PROBLEMS, CanAdmin, IdempotencyKey, InServices, KeyFirst, Services
from service.http.middleware import BodyTooLarge
from service.http.uploads import Upload
from service.jobs import task_rows
from service.jobs.task_rows import Task
from service.storage import idempotency, tenant_rows
from service.storage.blobs import archive_key
from service.storage.tables import new_id
from service.upkeep import export_collection, import_collection
from service.videos.incoming import FileTooLarge

router = APIRouter(route_class=KeyFirst, prefix="/admin/collections", tags=["archives"], responses=PROBLEMS)
_TAR, _BODY = document.download("application/x-tar"), document.form("an archive that an export gave")


@router.get(
    "/{name}/export",
    name="export_collection",
    response_class=StreamingResponse,
    responses=_TAR,
)
def export(
    name: str,
    tenant: CanAdmin,
    services: InServices,
    videos: Annotated[bool, Query(description="the uploaded files too")] = True,
    generations: Annotated[bool, Query(description="the vectors of retired generations too")] = False,
) -> StreamingResponse:
    """The collection as a tar: vectors, adapters, frames, metadata, captions, checksums. One without its end is torn."""
    out = export_collection.Export(services.storage, tenant.id, name, videos, generations)
    headers = {"Content-Disposition": f'attachment; filename="{name}.tar"'}
    return StreamingResponse(out.chunks(), media_type="application/x-tar", headers=headers)


@router.post(
    "/import",
    name="import_collection",
    status_code=202,
    response_model=CollectionImportOut,
    openapi_extra=_BODY,
)
async def import_archive(
    request: Request,
    tenant: CanAdmin,
    services: InServices,
    collection: Annotated[str | None, Query(description="the new collection's name; default: the archive's")] = None,
    re_embed: Annotated[bool, Query(description="take in an archive of another backbone, without adapters")] = False,
    key: IdempotencyKey = None,
) -> dict[str, Any]:
    """A new collection from an archive (multipart part `file`): all of it or nothing, as the task tells."""
    settings = services.storage.settings
    try:
        received = await uploads.receive(request, settings.scratch, settings.max_archive_bytes, video=False)
    except FileTooLarge as error:
        raise BodyTooLarge(str(error)) from error
    wish = {"collection": collection, "re_embed": re_embed, "tenant": tenant.name}
    try:
        return await to_thread.run_sync(_queue, services, tenant, received, wish, key, limiter=services.receiving)
    finally:
        received.path.unlink(missing_ok=True)


def _queue(
    services: Services, tenant: tenant_rows.Tenant, received: Upload, wish: dict[str, Any], key: str | None
) -> dict[str, Any]:
    """What can be refused is refused now; then the archive is stored, then its task."""
    database, blobs = services.storage.database, services.storage.blobs
    hashed = idempotency.request_hash("import", wish, received.sha256)
    with database.read() as connection:
        if (earlier := idempotency.earlier_answer(connection, tenant.id, key, hashed)) is not None:
            return earlier  # type: ignore[no-any-return]
    name = import_collection.look(services.storage, tenant, received.path, wish["collection"], wish["re_embed"])
    stored = archive_key(new_id("arc"))
    task: Task | None = None

    def add() -> dict[str, Any]:
        nonlocal task
        request = {**wish, "collection": name, "archive": stored}
        task = task_rows.add_task(connection, tenant.id, None, "import_collection", request)
        return {"task_id": task.id, "collection": name}

    blobs.put_file(stored, received.path)
    try:
        with database.write() as connection:
            answer = idempotency.once(connection, tenant.id, key, hashed, add)
    finally:
        if task is None:
            blobs.delete(stored)
    if task is not None:
        services.jobs.enqueue(task)
    return answer
