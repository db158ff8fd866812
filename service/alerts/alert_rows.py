"""Alerts (standing queries) and their events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Select, and_, delete, func, insert, select, update

from service.errors import PolyclipError
from service.jobs import task_rows
from service.jobs.task_rows import Task
from service.storage import idempotency
from service.storage.collection_rows import lock_collection
from service.storage.rows import NotFound, Page, page, record
from service.storage.tables import OPEN, alert_events, alerts, new_id, now, tasks, tenants, videos


class TooManyAlerts(PolyclipError):
    """The tenant has as many alerts as one may have."""

    code, status, hint = "too_many_alerts", 409, "delete one, or raise POLYCLIP_ALERTS"


@dataclass(frozen=True, slots=True)
class Alert:
    """A text with which newly ready videos are compared; `min_score` None: every one is an event. `events`: how many so far."""

    id: str
    tenant_id: str
    collection_id: str
    name: str | None
    text: str
    min_score: float | None
    webhook: str | None
    events: int
    encoder: str | None
    vector: bytes | None
    failing_event: str | None
    failing_until: str | None
    created_at: str


@dataclass(frozen=True, slots=True)
class Event:
    """A video that an alert has met, at its best segment; `number` counts the alert's. `delivery` of the webhook: pending,
    delivered or failed, None without one."""

    id: str
    tenant_id: str
    alert_id: str
    video_id: str
    number: int
    start: float
    end: float
    score: float
    generation_id: str
    delivery: str | None
    error: Mapping[str, Any] | None
    task_id: str | None
    created_at: str
    delivered_at: str | None


@dataclass(frozen=True, slots=True)
class Match:
    """An alert and the segment of a video that meets it best."""

    alert: Alert
    start: float
    end: float
    score: float


def add_alert(
    connection: Connection,
    tenant: str,
    collection: str,
    text: str,
    name: str | None,
    min_score: float | None,
    webhook: str | None,
    most: int,
) -> Alert:
    """Raises NotFound for a deleted collection, TooManyAlerts where the tenant has `most`."""
    connection.execute(select(tenants.c.id).where(tenants.c.id == tenant).with_for_update(key_share=True))  # they are counted
    if lock_collection(connection, tenant, collection) is None:
        raise NotFound("collection", collection)
    count = connection.scalar(select(func.count()).select_from(alerts).where(alerts.c.tenant_id == tenant)) or 0
    if count >= most:
        raise TooManyAlerts(f"a tenant may have {most} alerts")
    made = Alert(new_id("alr"), tenant, collection, name, text, min_score, webhook, 0, None, None, None, None, now())
    connection.execute(insert(alerts).values(**asdict(made)))
    return made


def alert(connection: Connection, tenant: str, collection: str, alert_id: str) -> Alert:
    row = connection.execute(select(alerts).where(_mine(tenant, collection), alerts.c.id == alert_id)).mappings().first()
    if row is None:
        raise NotFound("alert", alert_id)
    return record(Alert, row)


def list_alerts(connection: Connection, tenant: str, collection: str, limit: int, after: str | None) -> Page:
    return page(connection, select(alerts).where(_mine(tenant, collection)), Alert, alerts.c.id, limit, after)


def alerts_of(connection: Connection, tenant: str, collection: str, until: str) -> list[Alert]:
    """Those that stood at the time `until`."""
    query = select(alerts).where(_mine(tenant, collection), alerts.c.created_at <= until).order_by(alerts.c.id)
    return [record(Alert, row) for row in connection.execute(query).mappings()]


def delete_alert(connection: Connection, tenant: str, collection: str, alert_id: str) -> None:
    """The alert with its events, and the tasks that deliver them. Raises NotFound."""
    lock_collection(connection, tenant, collection)
    alert(connection, tenant, collection, alert_id)
    theirs = select(alert_events.c.task_id).where(alert_events.c.alert_id == alert_id, alert_events.c.task_id.is_not(None))
    task_rows.cancel_tasks(connection, tenant, tasks.c.id.in_(theirs))
    ended = and_(tasks.c.tenant_id == tenant, tasks.c.id.in_(theirs), tasks.c.status.not_in(OPEN))
    connection.execute(delete(tasks).where(ended))
    connection.execute(delete(alert_events).where(alert_events.c.alert_id == alert_id))
    connection.execute(delete(alerts).where(alerts.c.id == alert_id))
    idempotency.forget_object(connection, tenant, alert_id)


def notice(connection: Connection, tenant: str, collection: str, video: str) -> Task | None:
    """In the transaction that calls a video ready: the task that compares it with the collection's alerts, if it has any.

    The caller hands it to its queue; a sweep finds it otherwise.
    """
    if connection.scalar(select(alerts.c.id).where(_mine(tenant, collection)).limit(1)) is None:
        return None
    return task_rows.add_task(connection, tenant, collection, "match_alerts", {"video_id": video})


def keep_vectors(connection: Connection, tenant: str, encoder: str, vectors: Mapping[str, bytes]) -> None:
    """The text vectors of alerts by id, for the next video."""
    for alert_id, vector in sorted(vectors.items()):
        mine = and_(alerts.c.tenant_id == tenant, alerts.c.id == alert_id)
        connection.execute(update(alerts).where(mine).values(encoder=encoder, vector=vector))


def add_events(
    connection: Connection, tenant: str, collection: str, generation: str, video: str, matches: Sequence[Match]
) -> tuple[int, list[Task]]:
    """An event for each match that has none yet: how many, and the tasks that deliver them.

    Nothing where collection, video or alert are gone. The lock on the collection lets no event of the same video come between,
    and that on the alert's row no greater number become visible before a smaller one.
    """
    alive = and_(videos.c.tenant_id == tenant, videos.c.id == video, videos.c.deleted_at.is_(None))
    if lock_collection(connection, tenant, collection) is None:
        return 0, []
    if connection.scalar(select(videos.c.id).where(alive)) is None:
        return 0, []
    known = set(connection.scalars(select(alert_events.c.alert_id).where(alert_events.c.video_id == video)))
    count, deliveries = 0, []
    for match in sorted(matches, key=lambda match: match.alert.id):
        mine = and_(_mine(tenant, collection), alerts.c.id == match.alert.id)
        if match.alert.id in known:
            continue
        if not connection.execute(update(alerts).where(mine).values(events=alerts.c.events + 1)).rowcount:
            continue
        number = connection.scalar(select(alerts.c.events).where(mine))
        event, task = new_id("evt"), None
        if match.alert.webhook is not None:
            asked = {"event_id": event, "alert_id": match.alert.id}
            task = task_rows.add_task(connection, tenant, collection, "deliver_event", asked)
            deliveries.append(task)
        connection.execute(
            insert(alert_events).values(
                id=event,
                tenant_id=tenant,
                alert_id=match.alert.id,
                video_id=video,
                number=number,
                start=match.start,
                end=match.end,
                score=match.score,
                generation_id=generation,
                delivery=None if task is None else "pending",
                task_id=None if task is None else task.id,
                created_at=now(),
            )
        )
        count += 1
    return count, deliveries


def event(connection: Connection, tenant: str, event_id: str) -> Event:
    query = _events(tenant).where(alert_events.c.id == event_id)
    row = connection.execute(query).mappings().first()
    if row is None:
        raise NotFound("event", event_id)
    return record(Event, row)


def list_events(connection: Connection, tenant: str, alert_id: str, limit: int, after: str | None) -> Page:
    """Newest first; nothing of deleted videos."""
    query = _events(tenant).where(alert_events.c.alert_id == alert_id)
    return page(connection, query, Event, alert_events.c.id, limit, after)


def events_after(connection: Connection, tenant: str, alert_id: str, number: int, limit: int) -> list[Event]:
    """Those that became visible after the one of this number, in order."""
    query = _events(tenant).where(alert_events.c.alert_id == alert_id, alert_events.c.number > number)
    rows = connection.execute(query.order_by(alert_events.c.number).limit(limit)).mappings()
    return [record(Event, row) for row in rows]


def set_delivery(
    connection: Connection, tenant: str, event_id: str, delivery: str, error: Mapping[str, Any] | None = None
) -> None:
    """`delivered` or `failed`; what has been delivered stays so."""
    mine = and_(alert_events.c.tenant_id == tenant, alert_events.c.id == event_id, alert_events.c.delivery != "delivered")
    values = {"delivered_at": now()} if delivery == "delivered" else {}
    connection.execute(update(alert_events).where(mine).values(delivery=delivery, error=error, **values))


def set_failing(connection: Connection, tenant: str, alert_id: str, event: str | None, until: str | None) -> None:
    """The event that the alert's webhook did not take, for which the others wait; None: no longer."""
    mine = and_(alerts.c.tenant_id == tenant, alerts.c.id == alert_id)
    connection.execute(update(alerts).where(mine).values(failing_event=event, failing_until=until))


def forget_events(connection: Connection, before: str) -> int:
    """Removes every tenant's events of before this time whose delivery does not wait: for the sweep alone."""
    open_tasks = select(tasks.c.id).where(tasks.c.status.in_(OPEN))
    ended = and_(
        alert_events.c.created_at < before,
        alert_events.c.task_id.is_(None) | alert_events.c.task_id.not_in(open_tasks),
    )
    return connection.execute(delete(alert_events).where(ended)).rowcount


def _mine(tenant: str, collection: str) -> Any:
    return and_(alerts.c.tenant_id == tenant, alerts.c.collection_id == collection)


def _events(tenant: str) -> Select[Any]:
    alive = and_(alert_events.c.tenant_id == tenant, videos.c.deleted_at.is_(None))
    return select(alert_events).join(videos, videos.c.id == alert_events.c.video_id).where(alive)
