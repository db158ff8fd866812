"""API keys and signed URLs: what proves who asks."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy.exc import DBAPIError

from service import catalog
from service.catalog import ApiKey, Tenant
from service.database import Database

ROLES = ("search", "write", "admin")
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"


class MissingKey(PermissionError):
    """No key was sent."""


class InvalidKey(PermissionError):
    """The key is unknown, revoked, expired, or not the operator's."""


class RoleTooLow(PermissionError):
    """The key is good, but its role does not allow this call."""


class InvalidSignature(PermissionError):
    """A media URL's signature is wrong or its time has passed."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: a tenant with a role, or the operator (`tenant` None, role `root`)."""

    tenant: Tenant | None
    role: str
    key_id: str


def new_key() -> tuple[str, str]:
    """(key id, whole key `pc_<id>_<secret>`)."""
    key_id = "".join(secrets.choice(ALPHABET) for _ in range(8))
    return key_id, f"pc_{key_id}_{secrets.token_urlsafe(24)}"


def hash_key(key: str) -> str:
    """sha256: keys are random and long, so that no slow hash is needed."""
    return hashlib.sha256(key.encode()).hexdigest()


def authenticate(database: Database, key: str | None) -> Caller:
    """Raises MissingKey or InvalidKey."""
    if not key:
        raise MissingKey("send an API key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")
    hashed = hash_key(key)
    with database.read() as connection:
        parts = key.split("_", 2)
        found = catalog.tenant_of_key(connection, parts[1]) if len(parts) == 3 else None
        if found is None or not hmac.compare_digest(found[1].hash, hashed):
            if hmac.compare_digest(hashed, catalog.fact(connection, "root_key_hash") or ""):
                return Caller(None, "root", "root")
            raise InvalidKey("this API key is not known")
    tenant, record = found
    if record.revoked_at is not None:
        raise InvalidKey("this API key has been revoked")
    if record.expires_at is not None and datetime.fromisoformat(record.expires_at) <= datetime.now(UTC):
        raise InvalidKey(f"this API key expired at {record.expires_at}")
    _note_use(database, tenant, record)
    return Caller(tenant, record.role, record.id)


def check_role(caller: Caller, role: str) -> None:
    """Raises RoleTooLow: `role` is search, write or admin of a tenant, or root."""
    if role == "root":
        if caller.role != "root":
            raise RoleTooLow("this call needs the operator's key")
        return
    if caller.role == "root":
        raise RoleTooLow("the operator's key belongs to no tenant: make a tenant and a key for it")
    if ROLES.index(caller.role) < ROLES.index(role):
        raise RoleTooLow(f"this call needs a key of role {role}; this one's is {caller.role}")


def sign(secret: str, path: str, expires: int) -> str:
    """The signature of a media path until the Unix time `expires`."""
    return hmac.digest(secret.encode(), f"{path}\n{expires}".encode(), "sha256").hex()[:40]


def check_signature(secret: str, path: str, expires: int, signature: str) -> None:
    """Raises InvalidSignature."""
    if not hmac.compare_digest(sign(secret, path, expires).encode(), signature.encode()):
        raise InvalidSignature("the URL's signature is wrong")
    if datetime.now(UTC).timestamp() > expires:
        raise InvalidSignature("the URL has expired: search again for a fresh one")


def _note_use(database: Database, tenant: Tenant, record: ApiKey) -> None:
    """At most once a minute, so that a search does not write; not at all while the database takes no writes."""
    last = record.last_used_at
    if last is None or abs((datetime.now(UTC) - datetime.fromisoformat(last)).total_seconds()) > 60:
        with suppress(DBAPIError), database.attempt() as connection:
            catalog.key_used(connection, tenant.id, record.id)
