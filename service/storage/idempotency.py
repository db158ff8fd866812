"""`Idempotency-Key`: the same key with the same request gives the first answer again, with another one an error."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from sqlalchemy import Connection, insert, select

from service.storage.tables import idempotency, now


class KeyReused(ValueError):
    """The key was used with another request."""


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


def remember(connection: Connection, tenant: str, key: str | None, hashed: str, answer: Any) -> None:
    """In the transaction that does what is answered."""
    if key is not None:
        row = {"tenant_id": tenant, "key": key, "request_hash": hashed, "answer": answer, "created_at": now()}
        connection.execute(insert(idempotency).values(**row))
