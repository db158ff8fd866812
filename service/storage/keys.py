"""API keys and signed URLs: what proves who asks."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from service.errors import PolyclipError
from service.storage import facts, tenant_rows
from service.storage.database import Database
from service.storage.tenant_rows import ApiKey, Tenant

ROLES = ("search", "write", "admin")
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
KEY = re.compile("[^_]*_([a-z0-9]{1,64})_")


class MissingKey(PolyclipError):
    """No key was sent."""

    code, status, hint = "missing_key", 401, "send `Authorization: Bearer KEY`"


class InvalidKey(PolyclipError):
    """The key is unknown, revoked, expired, or not the operator's."""

    code, status, hint = "invalid_key", 401, "send a key that exists, is not revoked and has not expired"


class TooManyWrongKeys(PolyclipError):
    """From this address have come too many unknown keys; `retry_after` seconds must pass."""

    code, status, hint = "too_many_wrong_keys", 429, "wait `Retry-After` seconds, then send the right key"

    def __init__(self, retry_after: float) -> None:
        super().__init__("this address has sent too many unknown keys: wait, then send the right one")
        self.retry_after = retry_after


class RoleTooLow(PolyclipError):
    """The key is good, but its role does not allow this call."""

    code, status, hint = "role_too_low", 403, "take a key of a higher role"


class InvalidSignature(PolyclipError):
    """A media URL's signature is wrong or its time has passed."""

    code, status, hint = "invalid_signature", 403, "ask for the object again: its URLs are signed for a time"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: a tenant with a role, or the operator (`tenant` None, role `root`)."""

    tenant: Tenant | None
    role: str
    key_id: str


class Guesses:
    """Unknown keys by address, an IPv6 /64 being one; safe to use from several threads.

    A key that is known, also a revoked or expired one, is never counted: a guesser behind a proxy locks nobody out.
    """

    ROOM = 10_000  # addresses: the oldest are forgotten
    SECONDS = 60.0

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._wrong: OrderedDict[str, tuple[int, float]] = OrderedDict()  # address → how many, and when the first was
        self._lock = threading.Lock()

    def wrong(self, address: str) -> None:
        """Counts an unknown key. Raises TooManyWrongKeys where the address has sent too many of late."""
        with self._lock:
            now, network = time.monotonic(), _network(address)
            count, since = self._wrong.pop(network, (0, now))
            if now - since >= self.SECONDS:
                count, since = 0, now
            self._wrong[network] = (min(count + 1, self._limit), since)
            if len(self._wrong) > self.ROOM:
                self._wrong.popitem(last=False)
            if count >= self._limit:
                raise TooManyWrongKeys(since + self.SECONDS - now)


def _network(address: str) -> str:
    with suppress(ValueError):
        found = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is None:
            return str(ipaddress.ip_network((found, 64), strict=False))
    return address


def new_key() -> tuple[str, str]:
    """(key id, whole key `pc_<id>_<secret>`)."""
    key_id = "".join(secrets.choice(ALPHABET) for _ in range(8))
    return key_id, f"pc_{key_id}_{secrets.token_urlsafe(24)}"


def issue(connection: Connection, tenant: str, role: str, expires: datetime | None) -> tuple[ApiKey, str]:
    """A new key of a tenant: its record, and the whole key, which nothing else can show."""
    key_id, key = new_key()
    until = None if expires is None else expires.isoformat().replace("+00:00", "Z")
    return tenant_rows.add_key(connection, tenant, key_id, role, hash_key(key), until), key


def hash_key(key: str) -> str:
    """sha256: keys are random and long, so that no slow hash is needed."""
    return hashlib.sha256(key.encode()).hexdigest()


def authenticate(database: Database, key: str | None, guesses: Guesses, address: str) -> Caller:
    """Who sent `key` from `address`. Raises MissingKey, InvalidKey or TooManyWrongKeys."""
    if not key:
        raise MissingKey("send an API key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")
    hashed = hash_key(key)
    with database.read() as connection:
        form = KEY.match(key)
        found = tenant_rows.tenant_of_key(connection, form.group(1)) if form else None
        if found is None or not hmac.compare_digest(found[1].hash, hashed):
            if hmac.compare_digest(hashed, facts.fact(connection, "root_key_hash") or ""):
                return Caller(None, "root", "root")
            guesses.wrong(address)
            raise InvalidKey("this API key is not known")
    tenant, record = found
    _check_valid(record)
    _note_use(database, tenant, record)
    return Caller(tenant, record.role, record.id)


def check_still_valid(database: Database, caller: Caller) -> None:
    """For an answer that lasts. Raises InvalidKey once a tenant's key is revoked, expired or gone."""
    with database.read() as connection:
        found = tenant_rows.tenant_of_key(connection, caller.key_id)
    if found is None:
        raise InvalidKey("this API key is not known")
    _check_valid(found[1])


def _check_valid(record: ApiKey) -> None:
    if record.revoked_at is not None:
        raise InvalidKey("this API key has been revoked")
    if record.expires_at is not None and datetime.fromisoformat(record.expires_at) <= datetime.now(UTC):
        raise InvalidKey(f"this API key expired at {record.expires_at}")


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
            tenant_rows.key_used(connection, tenant.id, record.id)
