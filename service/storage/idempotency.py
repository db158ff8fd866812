"""`Idempotency-Key`: the same key with the same request gives the first answer again, with another one an error."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select

from service.errors import PolyclipError
from service.storage.tables import idempotency, now


class KeyReused(PolyclipError):
    """The key was used with another request."""

    code, status, hint = "idempotency_key_reused", 422, "take a new key for another request"


def request_hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def earlier_answer(connection: Connection, tenant: str, key: str | None, hashed: str) -> Any:
    """What was answered before, or None. Raises KeyReused."""
    if key is None:
        return None
    mine = (idempotency.c.tenant_id == tenant, idempotency.c.key == key)
    row = connection.execute(select(idempotency.c.request_hash, idempotency.c.answer).where(*mine)).first()
    if row is None:
        return None
    if row.request_hash != hashed:
        raise KeyReused(f"the idempotency key {key!r:.80} was used with another request")
    return row.answer


def once(
    connection: Connection, tenant: str, key: str | None, hashed: str, act: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The earlier answer, or that of `act`, which is remembered; for a write transaction, before it locks anything else.

    Of two requests at once with one key the second waits for the first. Raises KeyReused.
    """
    if key is None:
        return act()
    if connection.dialect.name == "postgresql":  # SQLite has one writer at a time
        connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(f"{tenant} {key}", 0))))
    answer: dict[str, Any] | None = earlier_answer(connection, tenant, key, hashed)
    if answer is None:
        answer = act()
        remember(connection, tenant, key, hashed, answer)
    return answer


def remember(connection: Connection, tenant: str, key: str, hashed: str, answer: Any) -> None:
    row = {"tenant_id": tenant, "key": key, "request_hash": hashed, "answer": answer, "created_at": now()}
    connection.execute(insert(idempotency).values(**row))


def forget_object(connection: Connection, tenant: str, made: str) -> None:
    """Removes the answers that tell of an object, by its id, which is gone."""
    mine = (idempotency.c.tenant_id == tenant, idempotency.c.answer["id"].as_string() == made)
    connection.execute(delete(idempotency).where(*mine))


def forget(connection: Connection, before: str) -> None:
    """Every tenant's keys that were used first before this time may be used anew."""
    connection.execute(delete(idempotency).where(idempotency.c.created_at < before))
