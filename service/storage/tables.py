"""The tables. Ids are prefixed ULIDs, times RFC 3339 UTC strings (they sort), embeddings float16 bytes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from threading import Lock

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)
from ulid import ULID

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_last = 0  # of the ids given out by this process
_lock = Lock()


def new_id(prefix: str) -> str:
    """Later ids of a process sort after earlier ones, within a millisecond too and when the clock is set back."""
    global _last
    with _lock:
        _last = max(_last + 1, int(ULID()))
        return f"{prefix}_{str(ULID.from_int(_last)).lower()}"


def now(plus: float = 0.0) -> str:
    """The time so many seconds from now."""
    return (datetime.now(UTC) + timedelta(seconds=plus)).isoformat(timespec="microseconds").replace("+00:00", "Z")


house = Table(  # facts about the whole installation: backbone, signing secret, operator's key
    "house",
    metadata,
    Column("key", String, primary_key=True),
    Column("value", JSON, nullable=False),
)

tenants = Table(
    "tenants",
    metadata,
    Column("id", String, primary_key=True),
    Column("name", String, nullable=False, unique=True),
    Column("quotas", JSON, nullable=False),
    Column("created_at", String, nullable=False),
    Column("deleted_at", String),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False, index=True),
    Column("role", String, nullable=False),
    Column("hash", String, nullable=False),
    Column("created_at", String, nullable=False),
    Column("expires_at", String),
    Column("last_used_at", String),
    Column("revoked_at", String),
)

collections = Table(
    "collections",
    metadata,
    Column("id", String, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("name", String, nullable=False),
    Column("settings", JSON, nullable=False),
    Column("active_generation_id", String),
    Column("created_at", String, nullable=False),
    Column("deleted_at", String),
)
_alive = collections.c.deleted_at.is_(None)
Index(
    "uq_collections_tenant_id_name_alive",
    collections.c.tenant_id,
    collections.c.name,
    unique=True,
    sqlite_where=_alive,
    postgresql_where=_alive,
)

videos = Table(
    "videos",
    metadata,
    Column("id", String, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("collection_id", ForeignKey("collections.id"), nullable=False),
    Column("task_id", String, nullable=False),
    Column("filename", String, nullable=False),
    Column("sha256", String, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("status", String, nullable=False),
    Column("error", JSON),
    Column("media", JSON),
    Column("metadata", JSON, nullable=False),
    Column("created_at", String, nullable=False),
    Column("updated_at", String, nullable=False),
    Column("deleted_at", String),
    Index("ix_videos_collection_id_id", "collection_id", "id"),
    Index("ix_videos_collection_id_sha256", "collection_id", "sha256"),
    Index("ix_videos_status", "status"),
)

captions = Table(
    "captions",
    metadata,
    Column("id", String, primary_key=True),
    Column("video_id", ForeignKey("videos.id"), nullable=False, index=True),
    Column("position", Integer, nullable=False),
    Column("text", Text, nullable=False),
    Column("start", Float),
    Column("end", Float),
)

feedback = Table(  # what users said of hits
    "feedback",
    metadata,
    Column("id", String, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("collection_id", ForeignKey("collections.id"), nullable=False),
    Column("video_id", ForeignKey("videos.id"), nullable=False, index=True),
    Column("key_id", String, nullable=False),  # whose statement it is
    Column("statement", String, nullable=False),  # a hash of key, query, video and part: said again, it replaces what was said
    Column("query", Text, nullable=False),
    Column("start", Float),
    Column("end", Float),
    Column("relevant", Boolean, nullable=False),
    Column("created_at", String, nullable=False),
    Column("updated_at", String, nullable=False),
    UniqueConstraint("collection_id", "statement"),
    Index("ix_feedback_collection_id_id", "collection_id", "id"),
)

alerts = Table(  # standing queries
    "alerts",
    metadata,
    Column("id", String, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False, index=True),
    Column("collection_id", ForeignKey("collections.id"), nullable=False),
    Column("name", String),
    Column("text", Text, nullable=False),
    Column("min_score", Float),
    Column("webhook", String),
    Column("events", Integer, nullable=False, server_default="0"),  # so far: the number of the newest
    Column("encoder", String),  # what `vector` was encoded with: an adapter's digest, or a frozen backbone's fingerprint
    Column("vector", LargeBinary),  # (D,) float32
    Column("failing_event", String),  # that its webhook did not take: the others wait for it
    Column("failing_until", String),  # but no longer than this
    Column("created_at", String, nullable=False),
    Index("ix_alerts_collection_id_id", "collection_id", "id"),
)

alert_events = Table(  # videos that an alert has met
    "alert_events",
    metadata,
    Column("id", String, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("alert_id", ForeignKey("alerts.id"), nullable=False),
    Column("video_id", ForeignKey("videos.id"), nullable=False, index=True),
    Column("number", Integer, nullable=False),  # counts an alert's events in the order in which they become visible
    Column("start", Float, nullable=False),
    Column("end", Float, nullable=False),
    Column("score", Float, nullable=False),
    Column("generation_id", String, nullable=False),
    Column("delivery", String),  # of the webhook: pending, delivered, failed; null without one
    Column("error", JSON),
    Column("task_id", String),  # that delivers it
    Column("created_at", String, nullable=False, index=True),
    Column("delivered_at", String),
    UniqueConstraint("alert_id", "video_id"),
    UniqueConstraint("alert_id", "number"),
)

adapters = Table(
    "adapters",
    metadata,
    Column("id", String, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("collection_id", ForeignKey("collections.id"), nullable=False),
    Column("version", Integer, nullable=False),
    Column("digest", String, nullable=False),
    Column("manifest", JSON, nullable=False),
    Column("created_at", String, nullable=False),
    Column("deleted_at", String),
    UniqueConstraint("collection_id", "digest"),
    UniqueConstraint("collection_id", "version"),
)

generations = Table(
    "generations",
    metadata,
    Column("id", String, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("collection_id", ForeignKey("collections.id"), nullable=False, index=True),
    Column("adapter_id", ForeignKey("adapters.id")),  # null: zero-shot
    Column("backbone", String, nullable=False),  # fingerprint
    Column("vector_set", String, nullable=False),  # the generation whose video vectors it searches: itself, but for scope text
    Column("state", String, nullable=False),  # building, active, retired
    Column("created_at", String, nullable=False),
    Column("activated_at", String),
    Column("retired_at", String),
)

segments = Table(
    "segments",
    metadata,
    Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("vector_set", String, nullable=False),
    Column("video_id", String, nullable=False),
    Column("ordinal", Integer, nullable=False),  # -1: a tombstone, the video is gone
    Column("start", Float),
    Column("end", Float),
    Column("pooled", LargeBinary),  # (D,) float16, mean of the frames, normalised
    Column("frames", LargeBinary),  # (F, D) float16, unnormalised
    UniqueConstraint("vector_set", "video_id", "ordinal"),
    Index("ix_segments_vector_set_seq", "vector_set", "seq"),
    sqlite_autoincrement=True,  # a sequence number is never given twice
)

OPEN = ("queued", "running")  # a task that has not ended

tasks = Table(
    "tasks",
    metadata,
    Column("id", String, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("collection_id", String, index=True),
    Column("kind", String, nullable=False),
    Column("status", String, nullable=False),  # queued, running, succeeded, failed, cancelled
    Column("progress", Float, nullable=False),
    Column("message", String, nullable=False),
    Column("request", JSON, nullable=False),
    Column("error", JSON),
    Column("result", JSON),
    Column("cancel_requested", Boolean, nullable=False),
    Column("attempts", Integer, nullable=False, server_default="0"),  # starts, the one that runs included
    Column("revision", Integer, nullable=False, server_default="0"),  # counts the changes of this row: the id of its events
    Column("created_at", String, nullable=False),
    Column("started_at", String),
    Column("finished_at", String),
    Index("ix_tasks_tenant_id_id", "tenant_id", "id"),
    Index("ix_tasks_status", "status"),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("tenant_id", ForeignKey("tenants.id"), primary_key=True),
    Column("key", String, primary_key=True),
    Column("request_hash", String, nullable=False),
    Column("answer", JSON, nullable=False),
    Column("created_at", String, nullable=False),
)

workers = Table(
    "workers",
    metadata,
    Column("id", String, primary_key=True),
    Column("seen_at", String, nullable=False),
)
