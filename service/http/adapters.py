"""Adapters of a collection: train, import, look at, activate, evaluate."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import Connection

import adapters_store
from service.adapters import adapter_rows
from service.adapters.adapter_rows import AdapterVersion
from service.adapters.backbones import asked_for, check_usable, fingerprint_of
from service.adapters.encoder import Encoder
from service.adapters.publish import publish
from service.adapters.train import check_captions, check_recipe
from service.http import document, paging, uploads
from service.http.answers import AdapterDetail, AdapterImportOut, AdapterPage, QueuedOut
from service.http.auth import PROBLEMS, CanAdmin, CanSearch, IdempotencyKey, InServices, KeyFirst, Services, collection_of
from service.http.collections import listing
from service.http.schemas import ActivateRequest, EvaluateRequest, TrainRequest
from service.jobs import task_rows
from service.jobs.task_rows import Task
from service.storage import generation_rows, idempotency
from service.storage.blobs import adapter_key
from service.storage.collection_rows import Collection
from service.storage.tables import now
from service.storage.tenant_rows import Tenant
from service.upkeep.delete import delete_adapter
from training.recipe import InvalidRecipe

router = APIRouter(route_class=KeyFirst, tags=["adapters"], responses=PROBLEMS)


@router.post("/admin/collections/{name}/adapters", name="train_adapter", status_code=202, response_model=QueuedOut)
def train(
    name: str, tenant: CanAdmin, services: InServices, body: TrainRequest | None = None, key: IdempotencyKey = None
) -> dict[str, Any]:
    """Trains an adapter from the collection's captions and, if its validation R@1 is no worse, activates it."""
    body = body or TrainRequest()
    recipe = {**body.recipe, **({"scope": body.scope} if body.scope else {})}
    with services.storage.database.read() as connection:
        collection = collection_of(connection, tenant, name)
        backbone = generation_rows.active_of(connection, tenant.id, collection.id).backbone
    checked = check_recipe(services.storage, services.encoder.of(backbone), recipe)
    if body.text_first and checked.scope != "both":
        raise InvalidRecipe(f"text_first goes with the scope both, not {checked.scope}")

    def add(connection: Connection, collection: Collection) -> Task:
        check_captions(connection, tenant.id, collection.id)
        request = {"recipe": recipe, "activate": body.activate, "text_first": body.text_first}
        return task_rows.add_task(connection, tenant.id, collection.id, "train_adapter", request)

    return _queue(services, tenant, name, key, ["train", body.model_dump()], add)


@router.post(
    "/admin/collections/{name}/adapters/import",
    name="import_adapter",
    status_code=202,
    response_model=AdapterImportOut,
    openapi_extra=document.form("an adapter, safetensors"),
)
async def import_adapter(name: str, request: Request, tenant: CanAdmin, services: InServices) -> dict[str, Any]:
    """Publishes an adapter file (multipart part `file`, safetensors) as the collection's next version."""
    settings = services.storage.settings
    received = await uploads.receive(request, settings.scratch, adapters_store.artifact.MAX_BYTES, video=False)

    def take_in() -> dict[str, Any]:
        data = received.path.read_bytes()
        manifest = adapters_store.describe(data, created_at=now(), recipe={"imported": received.filename})
        with services.storage.database.read() as connection:
            collection = collection_of(connection, tenant, name)
        version = publish(services.storage, services.encoder, tenant.id, collection.id, data, manifest)
        with services.storage.database.write() as connection:
            asked, result = {"digest": version.digest}, {"adapter_id": version.id}
            task = task_rows.add_done(connection, tenant.id, collection.id, "import_adapter", asked, result=result)
        return {"task_id": task.id, "adapter_id": version.id}

    try:
        return await to_thread.run_sync(take_in, limiter=services.receiving)
    finally:
        received.path.unlink(missing_ok=True)


@router.post("/admin/collections/{name}/activate", name="activate_adapter", status_code=202, response_model=QueuedOut)
def activate(
    name: str, body: ActivateRequest, tenant: CanAdmin, services: InServices, key: IdempotencyKey = None
) -> dict[str, Any]:
    """Switches a collection to an adapter, back to its frozen backbone, or to another backbone, without a gap in its searches.

    An adapter brings the backbone that it was trained on. All videos are embedded by another backbone first.
    """
    load: Callable[[], Future[Encoder]] | None = None  # in this process too, while the worker embeds

    def add(connection: Connection, collection: Collection) -> Task:
        nonlocal load
        request: dict[str, Any] = {"adapter_id": body.adapter_id}
        if body.backbone is not None:
            choice = asked_for(connection, services.storage.settings, body.backbone.name, body.backbone.pretrained)
            check_usable(connection, fingerprint_of(connection, choice))
            request["backbone"], load = choice.to_json(), partial(services.encoder.load, choice)
        if body.adapter_id is not None:
            manifest = adapter_rows.adapter(connection, tenant.id, collection.id, body.adapter_id).manifest
            check_usable(connection, manifest["backbone"])
            load = partial(services.encoder.request_encoder, manifest["backbone"])
        return task_rows.add_task(connection, tenant.id, collection.id, "activate", request)

    answer = _queue(services, tenant, name, key, ["activate", body.model_dump()], add)
    if load is not None:
        load().add_done_callback(lambda done: done.exception())  # the task will tell
    return answer


@router.post("/admin/collections/{name}/evaluate", name="evaluate_collection", status_code=202, response_model=QueuedOut)
def evaluate(name: str, tenant: CanAdmin, services: InServices, body: EvaluateRequest | None = None) -> dict[str, Any]:
    """Recall of the collection's own captions, as its searches stand now."""
    body = body or EvaluateRequest()

    def add(connection: Connection, collection: Collection) -> Task:
        return task_rows.add_task(connection, tenant.id, collection.id, "evaluate", {"split": body.split})

    return _queue(services, tenant, name, None, ["evaluate"], add)


@router.get("/collections/{name}/adapters", name="list_adapters", response_model=AdapterPage)
def list_all(
    name: str,
    tenant: CanSearch,
    services: InServices,
    page_limit: Annotated[int, Query(ge=1, le=50)] = 10,
    page_token: str | None = None,
) -> dict[str, Any]:
    """The collection's adapters, newest first."""
    with services.storage.database.read() as connection:
        collection = collection_of(connection, tenant, name)
        page = adapter_rows.list_adapters(connection, tenant.id, collection.id, page_limit, paging.decode("id", page_token))
        active = generation_rows.generation(connection, tenant.id, collection.active_generation_id).adapter_id
        return listing([_summary(services, row, active) for row in page.rows], page)


@router.get("/collections/{name}/adapters/{adapter_id}", name="get_adapter", response_model=AdapterDetail)
def get(name: str, adapter_id: str, tenant: CanSearch, services: InServices) -> dict[str, Any]:
    """Manifest, metrics and loss curve."""
    with services.storage.database.read() as connection:
        collection = collection_of(connection, tenant, name)
        version = adapter_rows.adapter(connection, tenant.id, collection.id, adapter_id)
        active = generation_rows.generation(connection, tenant.id, collection.active_generation_id).adapter_id
    return {**_summary(services, version, active), "manifest": dict(version.manifest)}


@router.get(
    "/collections/{name}/adapters/{adapter_id}/weights",
    name="download_adapter",
    response_class=Response,
    responses=document.download("application/octet-stream"),
)
def weights(name: str, adapter_id: str, tenant: CanSearch, services: InServices) -> Response:
    """The safetensors file."""
    with services.storage.database.read() as connection:
        collection = collection_of(connection, tenant, name)
        version = adapter_rows.adapter(connection, tenant.id, collection.id, adapter_id)
    data = services.storage.blobs.get(adapter_key(collection.id, version.digest))
    disposition = f'attachment; filename="{name}-{version.version}.safetensors"'
    return Response(data, media_type="application/octet-stream", headers={"Content-Disposition": disposition})


@router.delete("/collections/{name}/adapters/{adapter_id}", name="delete_adapter", status_code=204)
def delete(name: str, adapter_id: str, tenant: CanAdmin, services: InServices) -> Response:
    """The adapter is gone at once, its file and vectors follow in the background. Not the one that searches use."""
    with services.storage.database.write() as connection:
        collection = collection_of(connection, tenant, name)
        task = delete_adapter(connection, tenant.id, collection.id, adapter_id)
    services.jobs.enqueue(task)
    return Response(status_code=204)


def _queue(
    services: Services,
    tenant: Tenant,
    name: str,
    key: str | None,
    parts: list[Any],
    add: Callable[[Connection, Collection], Task],
) -> dict[str, Any]:
    """Adds a task for a collection and enqueues it; answers again what an idempotency key was answered before."""
    task: Task | None = None

    def act() -> dict[str, Any]:
        nonlocal task
        task = add(connection, collection_of(connection, tenant, name))
        return {"task_id": task.id}

    with services.storage.database.write() as connection:
        answer = idempotency.once(connection, tenant.id, key, idempotency.request_hash(name, *parts), act)
    if task is not None:
        services.jobs.enqueue(task)
    return answer


def _summary(services: Services, version: AdapterVersion, active: str | None) -> dict[str, Any]:
    """`residency`: where this process has it: active, inactive, loading or offloaded."""
    metrics = version.manifest.get("metrics", {})
    return {
        "id": version.id,
        "version": version.version,
        "digest": version.digest,
        "active": version.id == active,
        "residency": services.encoder.residency_of(version.digest),
        "scope": version.manifest["scope"],
        "parameters": version.manifest["parameters"],
        "metrics": {side: metrics[side] for side in ("before", "after") if side in metrics},
        "created_at": version.created_at,
    }
