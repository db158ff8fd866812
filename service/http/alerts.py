"""Alerts: standing queries of a collection, and their events as a list and as a stream."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Header, Request, Response
from fastapi.concurrency import run_in_threadpool

from service import net
from service.alerts import alert_rows
from service.alerts.alert_rows import Alert, Event
from service.alerts.deliver import secret_of
from service.http import paging
from service.http.answers_alerts import AlertEventPage, AlertOut, AlertPage, NewAlertOut
from service.http.auth import PROBLEMS, Anyone, CanWrite, IdempotencyKey, InServices, KeyFirst, Services, collection_of
from service.http.collections import PageLimit, listing
from service.http.schemas import NewAlert
from service.http.streams import RETRY_SECONDS, EventStream, check_streams, last_told
from service.search.question import EmptyText
from service.storage import idempotency, keys
from service.storage.keys import Caller, InvalidKey
from service.storage.rows import NotFound
from service.storage.tenant_rows import Tenant

router = APIRouter(route_class=KeyFirst, prefix="/collections/{name}/alerts", tags=["alerts"], responses=PROBLEMS)
POLL_SECONDS = 0.5
QUIET_SECONDS = 15.0  # then a comment tells that the connection lives
AT_ONCE = 100  # events that are read at once


@router.post("", name="create_alert", status_code=201, response_model=NewAlertOut)
def create(name: str, body: NewAlert, tenant: CanWrite, services: InServices, key: IdempotencyKey = None) -> dict[str, Any]:
    """A standing query: every video that becomes ready from now on is compared with it; matches are events.

    With `webhook`, each event is sent there, signed with the secret that is shown here and never again.
    """
    settings, text = services.storage.settings, " ".join(body.text.split())
    if not text:
        raise EmptyText("the text is empty")
    if body.webhook is not None:
        net.checked_url(body.webhook, settings.private_urls)

    def add() -> dict[str, Any]:
        collection = collection_of(connection, tenant, name).id
        what = (text, body.name, body.min_score, body.webhook)
        return _show(alert_rows.add_alert(connection, tenant.id, collection, *what, settings.alerts))

    with services.storage.database.write() as connection:
        made = idempotency.once(connection, tenant.id, key, idempotency.request_hash("alerts", name, body.model_dump()), add)
        return {**made, "secret": secret_of(connection, made["id"]) if body.webhook is not None else None}


@router.get("", name="list_alerts", response_model=AlertPage)
def list_all(
    name: str, tenant: CanWrite, services: InServices, page_limit: PageLimit = 10, page_token: str | None = None
) -> dict[str, Any]:
    """The collection's alerts, newest first."""
    with services.storage.database.read() as connection:
        collection = collection_of(connection, tenant, name).id
        page = alert_rows.list_alerts(connection, tenant.id, collection, page_limit, paging.decode("id", page_token))
        return listing([_show(row) for row in page.rows], page)


@router.get("/{alert_id}", name="get_alert", response_model=AlertOut)
def get(name: str, alert_id: str, tenant: CanWrite, services: InServices) -> dict[str, Any]:
    """An alert, and how many events it has had."""
    return _show(_alert(services, tenant, name, alert_id))


@router.delete("/{alert_id}", name="delete_alert", status_code=204)
def delete(name: str, alert_id: str, tenant: CanWrite, services: InServices) -> Response:
    """The alert is gone with its events; what waits to be delivered is not."""
    with services.storage.database.write() as connection:
        collection = collection_of(connection, tenant, name).id
        alert_rows.delete_alert(connection, tenant.id, collection, alert_id)
    return Response(status_code=204)


@router.get(
    "/{alert_id}/events",
    name="list_alert_events",
    response_model=AlertEventPage,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def events(
    name: str,
    alert_id: str,
    request: Request,
    tenant: CanWrite,
    who: Anyone,
    services: InServices,
    page_limit: PageLimit = 10,
    page_token: str | None = None,
    last: Annotated[str | None, Header(alias="Last-Event-ID")] = None,
    accept: Annotated[str | None, Header()] = None,
) -> Any:
    """The alert's events, newest first; or with `Accept: text/event-stream` a stream: those so far, then each new one.

    An event's id in the stream is its number. With `Last-Event-ID` only what is newer is told.
    """
    alert = await run_in_threadpool(_alert, services, tenant, name, alert_id)
    if "text/event-stream" not in (accept or "").lower():
        return await run_in_threadpool(_page, services, tenant, alert, page_limit, paging.decode("id", page_token))
    check_streams(services, who)
    return EventStream(_stream(request, services, tenant, who, name, alert_id, last_told(last) or 0), services, who)


async def _stream(
    request: Request, services: Services, tenant: Tenant, who: Caller, name: str, alert_id: str, told: int
) -> AsyncIterator[str]:
    def look() -> list[Event]:
        keys.check_still_valid(services.storage.database, who)
        with services.storage.database.read() as connection:
            collection = collection_of(connection, tenant, name).id
            alert_rows.alert(connection, tenant.id, collection, alert_id)
            return alert_rows.events_after(connection, tenant.id, alert_id, told, AT_ONCE)

    quiet_since = time.monotonic()
    yield f"retry: {1000 * RETRY_SECONDS}\n\n"
    while True:
        try:
            found = await to_thread.run_sync(look)
        except (NotFound, InvalidKey):  # gone, or no longer this client's to see
            return
        for event in found:
            told, quiet_since = event.number, time.monotonic()
            yield f"id: {told}\nevent: match\ndata: {json.dumps(_event(event))}\n\n"
        if time.monotonic() - quiet_since > QUIET_SECONDS:
            quiet_since = time.monotonic()
            yield ": still here\n\n"
        if request.app.state.draining.is_set():
            return
        if len(found) < AT_ONCE:
            await asyncio.sleep(POLL_SECONDS)


def _alert(services: Services, tenant: Tenant, name: str, alert_id: str) -> Alert:
    with services.storage.database.read() as connection:
        return alert_rows.alert(connection, tenant.id, collection_of(connection, tenant, name).id, alert_id)


def _page(services: Services, tenant: Tenant, alert: Alert, limit: int, after: str | None) -> dict[str, Any]:
    with services.storage.database.read() as connection:
        page = alert_rows.list_events(connection, tenant.id, alert.id, limit, after)
        return listing([_event(row) for row in page.rows], page)


def _show(alert: Alert) -> dict[str, Any]:
    return {
        "id": alert.id,
        "name": alert.name,
        "text": alert.text,
        "min_score": alert.min_score,
        "webhook": alert.webhook,
        "events": alert.events,
        "created_at": alert.created_at,
    }


def _event(event: Event) -> dict[str, Any]:
    return {
        "id": event.id,
        "number": event.number,
        "alert_id": event.alert_id,
        "video_id": event.video_id,
        "start": event.start,
        "end": event.end,
        "score": event.score,
        "generation": event.generation_id,
        "delivery": event.delivery,
        "error": event.error,
        "created_at": event.created_at,
        "delivered_at": event.delivered_at,
    }
