"""Collections."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from sqlalchemy import Connection

from service.adapters import backbones
from service.http import paging
from service.http.answers import CollectionOut, CollectionPage, GenerationPage
from service.http.auth import PROBLEMS, CanSearch, CanWrite, IdempotencyKey, InServices, KeyFirst, collection_of
from service.http.schemas import ChangedCollection, NewCollection
from service.settings import settings_json
from service.storage import collection_rows, generation_rows, idempotency, rows
from service.storage.collection_rows import Collection
from service.storage.tenant_rows import Tenant
from service.upkeep.delete import delete_collection
from service.videos import video_rows

router = APIRouter(route_class=KeyFirst, prefix="/collections", tags=["collections"], responses=PROBLEMS)
PageLimit = Annotated[int, Query(ge=1, le=50)]


@router.post("", name="create_collection", status_code=201, response_model=CollectionOut)
def create(body: NewCollection, tenant: CanWrite, services: InServices, key: IdempotencyKey = None) -> dict[str, Any]:
    """A new, empty collection: searchable at once, with the frozen backbone."""
    hashed = idempotency.request_hash("collections", body.model_dump())
    backbone = services.encoder.backbone.fingerprint

    def add() -> dict[str, Any]:
        made = collection_rows.create_collection(connection, tenant, body.name, settings_json(body.settings), backbone)
        return show(connection, tenant, made)

    with services.storage.database.write() as connection:
        return idempotency.once(connection, tenant.id, key, hashed, add)


@router.get("", name="list_collections", response_model=CollectionPage)
def list_all(
    tenant: CanSearch, services: InServices, page_limit: PageLimit = 10, page_token: str | None = None
) -> dict[str, Any]:
    """The tenant's collections, newest first."""
    with services.storage.database.read() as connection:
        page = collection_rows.list_collections(connection, tenant.id, page_limit, paging.decode("id", page_token))
        return listing([show(connection, tenant, row) for row in page.rows], page)


@router.get("/{name}", name="get_collection", response_model=CollectionOut)
def get(name: str, tenant: CanSearch, services: InServices) -> dict[str, Any]:
    """Counts, settings, active adapter and generation. Whoever looks is about to search: the adapter is fetched."""
    with services.storage.database.read() as connection:
        collection, generation = collection_rows.active_generation(connection, tenant.id, name)
        shown = show(connection, tenant, collection)
    services.encoder.prefetch(generation)
    return shown


@router.patch("/{name}", name="change_collection", response_model=CollectionOut)
def change(name: str, body: ChangedCollection, tenant: CanWrite, services: InServices) -> dict[str, Any]:
    """Changes the settings that are sent; videos that come later follow them."""
    with services.storage.database.write() as connection:
        collection = collection_of(connection, tenant, name)
        settings = {**collection.settings, **settings_json(body.settings)}
        collection_rows.change_collection(connection, tenant.id, collection.id, settings)
        return show(connection, tenant, collection_of(connection, tenant, name))


@router.delete("/{name}", name="delete_collection", status_code=204)
def delete(name: str, tenant: CanWrite, services: InServices) -> Response:
    """The collection is gone at once; its files and vectors follow in the background."""
    with services.storage.database.write() as connection:
        collection = collection_of(connection, tenant, name)
        task = delete_collection(connection, tenant.id, collection.id)
    services.jobs.enqueue(task)
    return Response(status_code=204)


@router.get("/{name}/generations", name="list_generations", response_model=GenerationPage)
def generations(
    name: str, tenant: CanSearch, services: InServices, page_limit: PageLimit = 10, page_token: str | None = None
) -> dict[str, Any]:
    """What the collection can be switched to, newest first: at once, where no video is missing."""
    with services.storage.database.read() as connection:
        collection = collection_of(connection, tenant, name)
        after = paging.decode("id", page_token)
        page = generation_rows.list_generations(connection, tenant.id, collection.id, page_limit, after)
        shown = []
        for row in page.rows:
            held, missing = generation_rows.holdings(connection, tenant.id, collection.id, row.vector_set)
            shown.append({
                "id": row.id, "adapter_id": row.adapter_id, "backbone": row.backbone, "state": row.state, "videos": held,
                "missing": missing, "created_at": row.created_at, "activated_at": row.activated_at,
                "retired_at": row.retired_at,
            })  # fmt: skip
        return listing(shown, page)


def show(connection: Connection, tenant: Tenant, collection: Collection) -> dict[str, Any]:
    generation = generation_rows.generation(connection, tenant.id, collection.active_generation_id)
    by_status = collection_rows.counts(connection, tenant.id, collection.id)
    return {
        "id": collection.id,
        "name": collection.name,
        "settings": dict(collection.settings),
        "videos": {"total": sum(by_status.values()), **by_status},
        "captioned_videos": video_rows.captioned_videos(connection, tenant.id, collection.id),
        "active_adapter": generation.adapter_id,
        "active_generation": generation.id,
        "backbone": backbones.described(connection, generation.backbone),
        "created_at": collection.created_at,
    }


def listing(data: list[dict[str, Any]], page: rows.Page) -> dict[str, Any]:
    """The shape of every list."""
    return {"data": data, "page_info": {"next_page_token": paging.encode("id", page.after), "total_results": page.total}}
