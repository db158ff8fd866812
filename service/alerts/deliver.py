"""Signed calls of webhooks, one an event; what cannot be delivered is tried again by the job engine."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection

from service.alerts import alert_rows
from service.alerts.alert_rows import Alert, Event
from service.jobs import outward
from service.jobs.kinds import JobFailed
from service.jobs.run import LONGEST_WAIT
from service.jobs.task_rows import Task
from service.net import InvalidUrl, PrivateAddress
from service.storage import collection_rows, facts
from service.storage.rows import NotFound
from service.storage.storage import Storage
from service.storage.tables import now

SECONDS = 10.0  # that a call may take in all
WAIT_SECONDS = 1.5 * LONGEST_WAIT  # for which an alert's other events wait for one that failed: until it is tried again


def secret_of(connection: Connection, alert_id: str) -> str:
    """What an alert's calls are signed with: derived, so that no row and no list holds it."""
    house = facts.fact(connection, "signing_secret")
    derived = hmac.digest(str(house).encode(), f"webhook {alert_id}".encode(), "sha256")
    return "whsec_" + base64.urlsafe_b64encode(derived).decode().rstrip("=")


def signature(secret: str, moment: int, body: bytes) -> str:
    """`X-Polyclip-Signature`: HMAC-SHA256 of the time in Unix seconds, a dot and the body."""
    signed = hmac.new(secret.encode(), f"{moment}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={moment},v1={signed}"


def deliver_event(storage: Storage, task: Task) -> dict[str, Any]:
    """Calls the webhook of an event's alert; returns the task's result. Nothing where event or alert are gone.

    Raises JobFailed, to be tried again, unless the answer is a 2xx; not again for an address that is not allowed. A crash
    between the call and its being written down makes a second call: the event's id tells.
    """
    tenant, collection = task.tenant_id, str(task.collection_id)
    try:
        with storage.database.read() as connection:
            alert = alert_rows.alert(connection, tenant, collection, task.request["alert_id"])
            event = alert_rows.event(connection, tenant, task.request["event_id"])
            name = collection_rows.collection_name(connection, tenant, collection)
            secret = secret_of(connection, alert.id)
    except NotFound:
        return {"delivered": False}
    if event.delivery == "delivered" or alert.webhook is None:
        return {"delivered": True}
    if alert.failing_event not in (None, event.id) and now() < str(alert.failing_until) <= now(WAIT_SECONDS):
        raise JobFailed("webhook_failed", "the webhook does not take an earlier event: this one waits for it", may_pass=True)
    body = json.dumps(told(event, alert, name)).encode()
    headers = {
        "Content-Type": "application/json",
        "X-Polyclip-Event": event.id,
        "X-Polyclip-Signature": signature(secret, int(time.time()), body),
    }
    try:
        status = outward.post(alert.webhook, headers, body, SECONDS, storage.settings.private_urls)
    except (InvalidUrl, PrivateAddress) as error:
        raise JobFailed(error.code, str(error)) from error
    except outward.FetchFailed as error:
        _failing(storage, event)
        raise JobFailed("webhook_failed", f"the webhook failed: {error}"[:300], may_pass=True) from error
    if not 200 <= status < 300:
        _failing(storage, event)
        raise JobFailed("webhook_failed", f"the webhook answered {status}", may_pass=True)
    with storage.database.write() as connection:
        alert_rows.set_delivery(connection, tenant, event.id, "delivered")
        alert_rows.set_failing(connection, tenant, alert.id, None, None)
    return {"delivered": True, "status": status}


def failed(connection: Connection, task: Task, error: Mapping[str, str]) -> None:
    """In the transaction that ends a delivery's task without success."""
    alert_rows.set_delivery(connection, task.tenant_id, task.request["event_id"], "failed", error)
    alert_rows.set_failing(connection, task.tenant_id, task.request["alert_id"], None, None)


def told(event: Event, alert: Alert, collection: str) -> dict[str, Any]:
    """The body of a call."""
    return {
        "type": "alert.matched",
        "event_id": event.id,
        "number": event.number,
        "collection": collection,
        "alert": {"id": alert.id, "name": alert.name, "text": alert.text, "min_score": alert.min_score},
        "video_id": event.video_id,
        "start": event.start,
        "end": event.end,
        "score": event.score,
        "created_at": event.created_at,
    }


def _failing(storage: Storage, event: Event) -> None:
    with storage.database.write() as connection:
        alert_rows.set_failing(connection, event.tenant_id, event.alert_id, event.id, now(WAIT_SECONDS))
