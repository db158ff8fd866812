"""What the database knows, tenant by tenant: every function takes the tenant first, and none finds another's rows.

Each function runs inside the caller's transaction (`Database.read` or `Database.write`) and raises what happened; how that
looks over HTTP is decided in `service/errors.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Connection, RowMapping, Select, and_, delete, exists, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from service.records import (
    adapters,
    api_keys,
    captions,
    collections,
    generations,
    house,
    new_id,
    now,
    segments,
    tasks,
    tenants,
    videos,
    workers,
)

NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}")
IN_PROGRESS = ("pending", "validating", "queued", "indexing")


class NotFound(LookupError):
    """`what` is collection, video, adapter, task, tenant or key."""

    def __init__(self, what: str, name: str) -> None:
        super().__init__(f"there is no {what} {name!r}")
        self.what = what


class AlreadyExists(ValueError):
    def __init__(self, what: str, name: str) -> None:
        super().__init__(f"there is a {what} named {name!r} already")
        self.what = what


class InvalidName(ValueError):
    """A name has other characters than letters, digits, dot, hyphen and underscore, or more than 64."""


class QuotaExceeded(ValueError):
    """The message says which quota and how large it is."""


@dataclass(frozen=True, slots=True)
class Tenant:
    id: str
    name: str
    quotas: Mapping[str, Any]
    created_at: str


@dataclass(frozen=True, slots=True)
class ApiKey:
    id: str
    tenant_id: str
    role: str
    hash: str
    created_at: str
    expires_at: str | None
    last_used_at: str | None
    revoked_at: str | None


@dataclass(frozen=True, slots=True)
class Collection:
    id: str
    tenant_id: str
    name: str
    settings: Mapping[str, Any]
    active_generation_id: str
    created_at: str
    deleted_at: str | None


@dataclass(frozen=True, slots=True)
class Generation:
    """`digest` names the adapter (None: the frozen backbone); its text side searches the vectors of `vector_set`."""

    id: str
    tenant_id: str
    collection_id: str
    adapter_id: str | None
    backbone: str
    vector_set: str
    state: str
    created_at: str
    activated_at: str | None
    digest: str | None


@dataclass(frozen=True, slots=True)
class Caption:
    text: str
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True, slots=True)
class Video:
    id: str
    tenant_id: str
    collection_id: str
    task_id: str
    filename: str
    sha256: str
    size: int
    status: str
    error: Mapping[str, Any] | None
    media: Mapping[str, Any] | None
    metadata: Mapping[str, Any]
    created_at: str
    updated_at: str
    deleted_at: str | None


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    id: str
    tenant_id: str
    collection_id: str
    version: int
    digest: str
    manifest: Mapping[str, Any]
    created_at: str


@dataclass(frozen=True, slots=True)
class Task:
    id: str
    tenant_id: str
    collection_id: str | None
    kind: str
    status: str
    progress: float
    message: str
    request: Mapping[str, Any]
    error: Mapping[str, Any] | None
    result: Mapping[str, Any] | None
    cancel_requested: bool
    created_at: str
    started_at: str | None
    finished_at: str | None


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a list in the order of creation, newest first; `after` is the id to go on from, None at the end."""

    rows: Sequence[Any]
    after: str | None
    total: int


Record = TypeVar("Record")


def _record(kind: type[Record], row: RowMapping) -> Record:
    return kind(**{name: row[name] for name in kind.__dataclass_fields__})  # type: ignore[attr-defined]


def _page(connection: Connection, query: Select[Any], kind: type[Record], ids: Any, limit: int, after: str | None) -> Page:
    total = connection.scalar(select(func.count()).select_from(query.subquery())) or 0
    if after is not None:
        query = query.where(ids < after)
    rows = connection.execute(query.order_by(ids.desc()).limit(limit + 1)).mappings().all()
    records = [_record(kind, row) for row in rows[:limit]]
    return Page(records, rows[limit - 1]["id"] if len(rows) > limit else None, total)


# The house: facts about the installation


def fact(connection: Connection, key: str) -> Any:
    return connection.scalar(select(house.c.value).where(house.c.key == key))


def set_fact(connection: Connection, key: str, value: Any) -> None:
    connection.execute(delete(house).where(house.c.key == key))
    connection.execute(insert(house).values(key=key, value=value))


def worker_seen(connection: Connection, worker: str) -> None:
    connection.execute(delete(workers).where(workers.c.id == worker))
    connection.execute(insert(workers).values(id=worker, seen_at=now()))


def last_heartbeat(connection: Connection) -> str | None:
    return connection.scalar(select(func.max(workers.c.seen_at)))  # type: ignore[no-any-return]


# Tenants and keys


def create_tenant(connection: Connection, name: str, quotas: Mapping[str, Any]) -> Tenant:
    tenant = Tenant(new_id("ten"), _name(name), dict(quotas), now())
    if connection.scalar(select(tenants.c.id).where(tenants.c.name == name)):
        raise AlreadyExists("tenant", name)
    connection.execute(insert(tenants).values(id=tenant.id, name=name, quotas=tenant.quotas, created_at=tenant.created_at))
    return tenant


def tenant_named(connection: Connection, name: str) -> Tenant:
    row = connection.execute(select(tenants).where(tenants.c.name == name)).mappings().first()
    if row is None:
        raise NotFound("tenant", name)
    return _record(Tenant, row)


def tenant_of_key(connection: Connection, key_id: str) -> tuple[Tenant, ApiKey] | None:
    key = connection.execute(select(api_keys).where(api_keys.c.id == key_id)).mappings().first()
    if key is None:
        return None
    tenant = connection.execute(select(tenants).where(tenants.c.id == key["tenant_id"])).mappings().one()
    return _record(Tenant, tenant), _record(ApiKey, key)


def add_key(connection: Connection, tenant: str, key_id: str, role: str, hashed: str, expires_at: str | None) -> ApiKey:
    key = ApiKey(key_id, tenant, role, hashed, now(), expires_at, None, None)
    values = {name: getattr(key, name) for name in ApiKey.__dataclass_fields__}
    connection.execute(insert(api_keys).values(**values))
    return key


def keys(connection: Connection, tenant: str) -> list[ApiKey]:
    rows = connection.execute(select(api_keys).where(api_keys.c.tenant_id == tenant).order_by(api_keys.c.created_at))
    return [_record(ApiKey, row) for row in rows.mappings()]


def revoke_key(connection: Connection, tenant: str, key_id: str) -> None:
    mine = and_(api_keys.c.tenant_id == tenant, api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
    if not connection.execute(update(api_keys).where(mine).values(revoked_at=now())).rowcount:
        raise NotFound("key", key_id)


def key_used(connection: Connection, tenant: str, key_id: str) -> None:
    mine = and_(api_keys.c.tenant_id == tenant, api_keys.c.id == key_id)
    connection.execute(update(api_keys).where(mine).values(last_used_at=now()))


def usage(connection: Connection, tenant: str) -> dict[str, int]:
    """What counts against the quotas."""
    alive = and_(videos.c.tenant_id == tenant, videos.c.deleted_at.is_(None))
    count, size = connection.execute(select(func.count(), func.coalesce(func.sum(videos.c.size), 0)).where(alive)).one()
    mine = and_(collections.c.tenant_id == tenant, collections.c.deleted_at.is_(None))
    return {
        "collections": connection.scalar(select(func.count()).select_from(collections).where(mine)) or 0,
        "videos": count,
        "bytes": int(size),
        "adapters": connection.scalar(select(func.count()).select_from(adapters).where(adapters.c.tenant_id == tenant)) or 0,
    }


def check_quota(connection: Connection, tenant: Tenant, **more: int) -> None:
    """Raises QuotaExceeded if `more` of something (videos, bytes, collections) would pass the tenant's quota."""
    if not any(tenant.quotas.get(f"max_{what}") is not None for what in more):
        return
    used = usage(connection, tenant.id)
    for what, count in more.items():
        limit = tenant.quotas.get(f"max_{what}")
        if limit is not None and used[what] + count > limit:
            raise QuotaExceeded(f"the tenant may have {limit} {what} and has {used[what]}")


# Collections


def create_collection(
    connection: Connection, tenant: Tenant, name: str, settings: Mapping[str, Any], backbone: str
) -> Collection:
    """A collection with its first generation, the frozen backbone without adapter, active at once."""
    check_quota(connection, tenant, collections=1)
    collection = new_id("col")
    generation = add_generation(connection, tenant.id, collection, None, backbone, None, state="active", insert_row=False)
    try:
        with connection.begin_nested():
            connection.execute(
                insert(collections).values(
                    id=collection,
                    tenant_id=tenant.id,
                    name=_name(name),
                    settings=dict(settings),
                    active_generation_id=generation["id"],
                    created_at=now(),
                )
            )
    except IntegrityError as error:
        raise AlreadyExists("collection", name) from error
    connection.execute(insert(generations).values(**generation))
    return collection_named(connection, tenant.id, name)


def collection_named(connection: Connection, tenant: str, name: str) -> Collection:
    if not NAME.fullmatch(name):  # nothing that a database would choke on
        raise NotFound("collection", name)
    mine = and_(collections.c.tenant_id == tenant, collections.c.name == name, collections.c.deleted_at.is_(None))
    row = connection.execute(select(collections).where(mine)).mappings().first()
    if row is None:
        raise NotFound("collection", name)
    return _record(Collection, row)


def collection_name(connection: Connection, tenant: str, collection: str) -> str:
    mine = and_(collections.c.tenant_id == tenant, collections.c.id == collection, collections.c.deleted_at.is_(None))
    name = connection.scalar(select(collections.c.name).where(mine))
    if name is None:
        raise NotFound("collection", collection)
    return str(name)


def list_collections(connection: Connection, tenant: str, limit: int, after: str | None) -> Page:
    query = select(collections).where(collections.c.tenant_id == tenant, collections.c.deleted_at.is_(None))
    return _page(connection, query, Collection, collections.c.id, limit, after)


def change_collection(connection: Connection, tenant: str, collection: str, settings: Mapping[str, Any]) -> None:
    mine = and_(collections.c.tenant_id == tenant, collections.c.id == collection)
    connection.execute(update(collections).where(mine).values(settings=dict(settings)))


def mark_collection_deleted(connection: Connection, tenant: str, collection: str) -> None:
    mine = and_(collections.c.tenant_id == tenant, collections.c.id == collection)
    connection.execute(update(collections).where(mine).values(deleted_at=now()))
    theirs = and_(videos.c.tenant_id == tenant, videos.c.collection_id == collection, videos.c.deleted_at.is_(None))
    connection.execute(update(videos).where(theirs).values(deleted_at=now()))


def lock_collection(connection: Connection, tenant: str, collection: str) -> Collection | None:
    """The collection, its row locked until the transaction ends; None if it is gone."""
    mine = and_(collections.c.tenant_id == tenant, collections.c.id == collection, collections.c.deleted_at.is_(None))
    row = connection.execute(select(collections).where(mine).with_for_update()).mappings().first()
    return None if row is None else _record(Collection, row)


def counts(connection: Connection, tenant: str, collection: str) -> dict[str, int]:
    """Videos of a collection by status."""
    mine = and_(videos.c.tenant_id == tenant, videos.c.collection_id == collection, videos.c.deleted_at.is_(None))
    rows = connection.execute(select(videos.c.status, func.count()).where(mine).group_by(videos.c.status))
    return {status: count for status, count in rows}


# Videos and captions


def add_video(
    connection: Connection,
    tenant: str,
    collection: str,
    video: str,
    filename: str,
    sha256: str,
    size: int,
    metadata: Mapping[str, Any],
    texts: Sequence[Caption],
) -> Task:
    """A pending video and its indexing task."""
    task = add_task(connection, tenant, collection, "index_video", {"video_id": video})
    stamp = now()
    connection.execute(
        insert(videos).values(
            id=video,
            tenant_id=tenant,
            collection_id=collection,
            task_id=task.id,
            filename=filename,
            sha256=sha256,
            size=size,
            status="pending",
            metadata=dict(metadata),
            created_at=stamp,
            updated_at=stamp,
        )
    )
    set_captions(connection, tenant, video, texts)
    return task


def video(connection: Connection, tenant: str, video_id: str, collection: str | None = None) -> Video:
    """A video that is not deleted; with `collection`, only if it is in that one."""
    mine = and_(videos.c.tenant_id == tenant, videos.c.id == video_id, videos.c.deleted_at.is_(None))
    row = connection.execute(select(videos).where(mine)).mappings().first()
    if row is None or (collection is not None and row["collection_id"] != collection):
        raise NotFound("video", video_id)
    return _record(Video, row)


def signed_video(connection: Connection, video_id: str) -> Video:
    """A video by id alone: only for a URL whose signature, made for the tenant's own caller, names this id."""
    row = connection.execute(select(videos).where(videos.c.id == video_id, videos.c.deleted_at.is_(None))).mappings().first()
    if row is None:
        raise NotFound("video", video_id)
    return _record(Video, row)


def videos_by_id(connection: Connection, tenant: str, ids: Iterable[str]) -> dict[str, Video]:
    mine = and_(videos.c.tenant_id == tenant, videos.c.id.in_(list(ids)), videos.c.deleted_at.is_(None))
    return {row["id"]: _record(Video, row) for row in connection.execute(select(videos).where(mine)).mappings()}


def videos_of(connection: Connection, tenant: str, collection: str, status: str) -> list[Video]:
    mine = and_(
        videos.c.tenant_id == tenant,
        videos.c.collection_id == collection,
        videos.c.status == status,
        videos.c.deleted_at.is_(None),
    )
    return [_record(Video, row) for row in connection.execute(select(videos).where(mine).order_by(videos.c.id)).mappings()]


def twin(connection: Connection, tenant: str, collection: str, sha256: str) -> Video | None:
    """A video of the collection with the same bytes that did not fail."""
    mine = and_(
        videos.c.tenant_id == tenant,
        videos.c.collection_id == collection,
        videos.c.sha256 == sha256,
        videos.c.deleted_at.is_(None),
        videos.c.status != "failed",
    )
    row = connection.execute(select(videos).where(mine).order_by(videos.c.id)).mappings().first()
    return None if row is None else _record(Video, row)


def list_videos(
    connection: Connection, tenant: str, collection: str, status: str | None, limit: int, after: str | None
) -> Page:
    query = select(videos).where(
        videos.c.tenant_id == tenant, videos.c.collection_id == collection, videos.c.deleted_at.is_(None)
    )
    if status is not None:
        query = query.where(videos.c.status == status)
    return _page(connection, query, Video, videos.c.id, limit, after)


def set_video(connection: Connection, tenant: str, video_id: str, **values: Any) -> bool:
    """Changes status, error or media; False if the video is gone."""
    mine = and_(videos.c.tenant_id == tenant, videos.c.id == video_id, videos.c.deleted_at.is_(None))
    return bool(connection.execute(update(videos).where(mine).values(updated_at=now(), **values)).rowcount)


def mark_video_deleted(connection: Connection, tenant: str, video_id: str) -> None:
    """The video leaves every list now, and every index by a tombstone in each vector set of its collection."""
    gone = video(connection, tenant, video_id)
    lock_collection(connection, tenant, gone.collection_id)
    set_video(connection, tenant, video_id, deleted_at=now())
    connection.execute(delete(segments).where(segments.c.video_id == video_id))
    for vector_set in vector_sets(connection, tenant, gone.collection_id):
        connection.execute(insert(segments).values(vector_set=vector_set, video_id=video_id, ordinal=-1))


def set_captions(connection: Connection, tenant: str, video_id: str, texts: Sequence[Caption]) -> None:
    mine = select(videos.c.id).where(videos.c.tenant_id == tenant, videos.c.id == video_id)
    connection.execute(delete(captions).where(captions.c.video_id.in_(mine)))
    for position, caption in enumerate(texts):
        connection.execute(
            insert(captions).values(
                id=new_id("cap"), video_id=video_id, position=position, text=caption.text, start=caption.start, end=caption.end
            )
        )


def captions_of(connection: Connection, tenant: str, video_ids: Iterable[str]) -> dict[str, list[Caption]]:
    """Captions of each of these videos, in the order in which they were given."""
    found: dict[str, list[Caption]] = {video_id: [] for video_id in video_ids}
    query = (
        select(captions.c.video_id, captions.c.text, captions.c.start, captions.c.end)
        .join(videos, videos.c.id == captions.c.video_id)
        .where(videos.c.tenant_id == tenant, captions.c.video_id.in_(list(found)))
        .order_by(captions.c.video_id, captions.c.position)
    )
    for video_id, text, start, end in connection.execute(query):
        found[video_id].append(Caption(text, start, end))
    return found


def captioned_videos(connection: Connection, tenant: str, collection: str) -> int:
    """Ready videos with at least one caption."""
    query = (
        select(func.count(func.distinct(captions.c.video_id)))
        .join(videos, videos.c.id == captions.c.video_id)
        .where(
            videos.c.tenant_id == tenant,
            videos.c.collection_id == collection,
            videos.c.deleted_at.is_(None),
            videos.c.status == "ready",
        )
    )
    return connection.scalar(query) or 0


# Adapters, generations and their vectors


def add_adapter(connection: Connection, tenant: str, collection: str, manifest: Mapping[str, Any]) -> AdapterVersion:
    """A published version; the same bytes published twice are the same version."""
    mine = and_(adapters.c.tenant_id == tenant, adapters.c.collection_id == collection)
    row = connection.execute(select(adapters).where(mine, adapters.c.digest == manifest["digest"])).mappings().first()
    if row is not None:
        return _record(AdapterVersion, row)
    latest = connection.scalar(select(func.coalesce(func.max(adapters.c.version), 0)).where(mine)) or 0
    version = AdapterVersion(new_id("adp"), tenant, collection, latest + 1, manifest["digest"], dict(manifest), now())
    connection.execute(
        insert(adapters).values(**{name: getattr(version, name) for name in AdapterVersion.__dataclass_fields__})
    )
    return version


def adapter(connection: Connection, tenant: str, collection: str, adapter_id: str) -> AdapterVersion:
    mine = and_(adapters.c.tenant_id == tenant, adapters.c.collection_id == collection, adapters.c.id == adapter_id)
    row = connection.execute(select(adapters).where(mine)).mappings().first()
    if row is None:
        raise NotFound("adapter", adapter_id)
    return _record(AdapterVersion, row)


def list_adapters(connection: Connection, tenant: str, collection: str, limit: int, after: str | None) -> Page:
    query = select(adapters).where(adapters.c.tenant_id == tenant, adapters.c.collection_id == collection)
    return _page(connection, query, AdapterVersion, adapters.c.id, limit, after)


_with_digest = select(generations, adapters.c.digest).outerjoin(adapters, adapters.c.id == generations.c.adapter_id)


def add_generation(
    connection: Connection,
    tenant: str,
    collection: str,
    adapter_id: str | None,
    backbone: str,
    vector_set: str | None,
    state: str,
    insert_row: bool = True,
) -> dict[str, Any]:
    """A generation's row; `vector_set` None: it gets video vectors of its own."""
    generation = new_id("gen")
    row = {
        "id": generation,
        "tenant_id": tenant,
        "collection_id": collection,
        "adapter_id": adapter_id,
        "backbone": backbone,
        "vector_set": vector_set or generation,
        "state": state,
        "created_at": now(),
        "activated_at": now() if state == "active" else None,
    }
    if insert_row:
        connection.execute(insert(generations).values(**row))
    return row


def active_generation(connection: Connection, tenant: str, name: str) -> tuple[Collection, Generation]:
    """The collection and the generation that its searches use, read in one step: adapter and vectors always fit."""
    if not NAME.fullmatch(name):
        raise NotFound("collection", name)
    query = (
        _with_digest.add_columns(collections)
        .join(collections, collections.c.active_generation_id == generations.c.id)
        .where(collections.c.tenant_id == tenant, collections.c.name == name, collections.c.deleted_at.is_(None))
    )
    row = connection.execute(query).first()
    if row is None:
        raise NotFound("collection", name)
    values = list(row)
    width = len(generations.columns) + 1
    generation = Generation(**dict(zip([*generations.columns.keys(), "digest"], values[:width], strict=True)))
    return Collection(**dict(zip(collections.columns.keys(), values[width:], strict=True))), generation


def generation(connection: Connection, tenant: str, generation_id: str) -> Generation:
    mine = and_(generations.c.tenant_id == tenant, generations.c.id == generation_id)
    row = connection.execute(_with_digest.where(mine)).mappings().first()
    if row is None:
        raise NotFound("generation", generation_id)
    return _record(Generation, row)


def generations_of(connection: Connection, tenant: str, collection: str) -> list[Generation]:
    mine = and_(generations.c.tenant_id == tenant, generations.c.collection_id == collection)
    rows = connection.execute(_with_digest.where(mine).order_by(generations.c.id)).mappings()
    return [_record(Generation, row) for row in rows]


def vector_sets(connection: Connection, tenant: str, collection: str) -> list[str]:
    return sorted({g.vector_set for g in generations_of(connection, tenant, collection)})


def set_generation_state(connection: Connection, tenant: str, generation_id: str, state: str) -> None:
    mine = and_(generations.c.tenant_id == tenant, generations.c.id == generation_id)
    connection.execute(update(generations).where(mine).values(state=state))


def switch(connection: Connection, tenant: str, collection: str, generation_id: str) -> None:
    """Makes a generation the active one; the one before is kept, retired."""
    for other in generations_of(connection, tenant, collection):
        if other.state == "active":
            set_generation_state(connection, tenant, other.id, "retired")
    mine = and_(generations.c.tenant_id == tenant, generations.c.id == generation_id)
    connection.execute(update(generations).where(mine).values(state="active", activated_at=now()))
    theirs = and_(collections.c.tenant_id == tenant, collections.c.id == collection)
    connection.execute(update(collections).where(theirs).values(active_generation_id=generation_id))


def missing_vectors(connection: Connection, tenant: str, collection: str, vector_set: str) -> list[Video]:
    """Ready videos of the collection that have no vectors in the set."""
    mine = and_(
        videos.c.tenant_id == tenant,
        videos.c.collection_id == collection,
        videos.c.status == "ready",
        videos.c.deleted_at.is_(None),
    )
    held = select(segments.c.video_id).where(segments.c.vector_set == vector_set)
    query = select(videos).where(mine, videos.c.id.not_in(held)).order_by(videos.c.id)
    return [_record(Video, row) for row in connection.execute(query).mappings()]


def _in_set(tenant: str, vector_set: str) -> ColumnElement[bool]:
    """Rows of a vector set, if it is the tenant's: rows of `segments` bear no tenant themselves."""
    owned = exists().where(generations.c.tenant_id == tenant, generations.c.id == vector_set)
    return and_(segments.c.vector_set == vector_set, owned)


def has_vectors(connection: Connection, tenant: str, video_id: str, vector_set: str) -> bool:
    mine = and_(_in_set(tenant, vector_set), segments.c.video_id == video_id)
    return connection.scalar(select(func.count()).select_from(segments).where(mine)) not in (0, None)


def add_segments(
    connection: Connection, tenant: str, video_id: str, vector_set: str, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Vectors of a live video, once: `rows` hold ordinal, start, end, pooled and frames."""
    if has_vectors(connection, tenant, video_id, vector_set):
        return
    for row in rows:
        connection.execute(insert(segments).values(vector_set=vector_set, video_id=video_id, **row))


def drop_vectors(connection: Connection, tenant: str, vector_set: str) -> None:
    """Removes a vector set of the tenant's."""
    if connection.scalar(select(generations.c.id).where(generations.c.tenant_id == tenant, generations.c.id == vector_set)):
        connection.execute(delete(segments).where(segments.c.vector_set == vector_set))


def segments_after(
    connection: Connection, tenant: str, vector_set: str, seq: int, limit: int
) -> list[dict[str, Any]]:
    """Rows of a vector set in order of sequence number, tombstones among them; without the frame vectors."""
    columns = (segments.c.seq, segments.c.video_id, segments.c.ordinal, segments.c.start, segments.c.end, segments.c.pooled)
    mine = and_(_in_set(tenant, vector_set), segments.c.seq > seq)
    rows = connection.execute(select(*columns).where(mine).order_by(segments.c.seq).limit(limit))
    return [dict(row) for row in rows.mappings()]


def frame_vectors(connection: Connection, tenant: str, vector_set: str, seqs: Iterable[int]) -> dict[int, bytes]:
    mine = and_(_in_set(tenant, vector_set), segments.c.seq.in_(list(seqs)))
    return {seq: frames for seq, frames in connection.execute(select(segments.c.seq, segments.c.frames).where(mine))}


def video_vectors(connection: Connection, tenant: str, vector_set: str, video_ids: Iterable[str]) -> dict[str, list[bytes]]:
    """The frame vectors of each video's segments in a vector set of the tenant's, in order."""
    found: dict[str, list[bytes]] = {}
    query = (
        select(segments.c.video_id, segments.c.frames)
        .join(videos, videos.c.id == segments.c.video_id)
        .where(videos.c.tenant_id == tenant, segments.c.vector_set == vector_set, segments.c.ordinal >= 0)
        .where(segments.c.video_id.in_(list(video_ids)))
        .order_by(segments.c.video_id, segments.c.ordinal)
    )
    for video_id, frames in connection.execute(query):
        found.setdefault(video_id, []).append(frames)
    return found


# Tasks


def add_task(connection: Connection, tenant: str, collection: str | None, kind: str, request: Mapping[str, Any]) -> Task:
    task = Task(
        new_id("task"), tenant, collection, kind, "queued", 0.0, "", dict(request), None, None, False, now(), None, None
    )
    connection.execute(insert(tasks).values(**{name: getattr(task, name) for name in Task.__dataclass_fields__}))
    return task


def task(connection: Connection, tenant: str, task_id: str) -> Task:
    mine = and_(tasks.c.tenant_id == tenant, tasks.c.id == task_id)
    row = connection.execute(select(tasks).where(mine)).mappings().first()
    if row is None:
        raise NotFound("task", task_id)
    return _record(Task, row)


def list_tasks(
    connection: Connection, tenant: str, collection: str | None, status: str | None, limit: int, after: str | None
) -> Page:
    query = select(tasks).where(tasks.c.tenant_id == tenant)
    if collection is not None:
        query = query.where(tasks.c.collection_id == collection)
    if status is not None:
        query = query.where(tasks.c.status == status)
    return _page(connection, query, Task, tasks.c.id, limit, after)


def set_task(connection: Connection, tenant: str, task_id: str, **values: Any) -> None:
    """Changes a task that has not ended."""
    mine = and_(tasks.c.tenant_id == tenant, tasks.c.id == task_id, tasks.c.status.in_(("queued", "running")))
    connection.execute(update(tasks).where(mine).values(**values))


def start_task(connection: Connection, tenant: str, task_id: str) -> None:
    set_task(connection, tenant, task_id, status="running", started_at=now())


def end_task(connection: Connection, tenant: str, task_id: str, status: str, **values: Any) -> None:
    progress = {"progress": 1.0} if status == "succeeded" else {}
    set_task(connection, tenant, task_id, status=status, finished_at=now(), **progress, **values)


def open_tasks(connection: Connection) -> list[Task]:
    """Every tenant's tasks that have not ended: for the sweep of the job engine alone."""
    query = select(tasks).where(tasks.c.status.in_(("queued", "running"))).order_by(tasks.c.id)
    return [_record(Task, row) for row in connection.execute(query).mappings()]


def _name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise InvalidName(f"a name has 1 to 64 letters, digits, dots, hyphens and underscores; {name!r:.80} has not")
    return name
