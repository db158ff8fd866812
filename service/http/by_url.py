"""Videos by URL: one as JSON, many as a manifest. Tasks fetch them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, BackgroundTasks, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from service.errors import PolyclipError
from service.http.answers import ManifestOut
from service.http.auth import PROBLEMS, CanWrite, IdempotencyKey, InServices, KeyFirst, Services, larger_bodies
from service.http.schemas import VideoByUrl
from service.jobs.task_rows import Task
from service.net import InvalidUrl, PrivateAddress, checked_url
from service.storage import idempotency
from service.storage.tenant_rows import Tenant
from service.videos import fetch
from service.videos.fetch import Wish

MAX_LINES = 10_000  # of a manifest
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["url"],
    "properties": {
        "url": {"type": "string", "description": "http or https, without user and password"},
        "filename": {"type": "string", "description": "default: the last part of the URL's path"},
        "captions": {"type": "array", "items": {}, "description": "strings or {text, start?, end?}"},
        "metadata": {"type": "object", "description": "returned with every hit"},
    },
}
_LINES = {"type": "string", "description": "an object a line"}
_MANIFEST = {
    "requestBody": {
        "required": True,
        "content": {
            "application/x-ndjson": {"schema": _LINES},
            "application/json": {"schema": {"type": "array", "items": SCHEMA, "maxItems": MAX_LINES}},
        },
    }
}
router = APIRouter(route_class=KeyFirst, prefix="/collections/{name}/videos", tags=["videos"], responses=PROBLEMS)


class InvalidManifest(PolyclipError):
    """A manifest has no line, too many, or is a JSON list that cannot be read."""

    code, status, hint = "invalid_manifest", 422, f"send 1 to {MAX_LINES} objects, one a line or as a JSON list"


def asked(request: Request) -> bool:
    """Whether the body says where the video is, and is not the video itself."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"


async def one(name: str, request: Request, tenant: Tenant, services: Services, key: str | None) -> dict[str, Any]:
    """The answer to a request for one video by URL."""
    request.state.body_bytes *= 4  # as captions may be
    body = await request.body()
    return await to_thread.run_sync(_queue_one, services, tenant, name, body, key)


@router.post(
    "/manifest", name="upload_manifest", status_code=202, response_model=ManifestOut, openapi_extra=_MANIFEST
)  # fmt: skip
@larger_bodies(8)
async def manifest(
    name: str,
    request: Request,
    background: BackgroundTasks,
    tenant: CanWrite,
    services: InServices,
    key: IdempotencyKey = None,
) -> dict[str, Any]:
    """Queues many videos by URL: objects as `POST …/videos` takes them, one a line (JSONL) or as a JSON list, at most 10,000.

    Lines that are wrong are told with their numbers, the others are queued.
    """
    body = await request.body()
    answer, tasks = await to_thread.run_sync(_queue_many, services, tenant, name, body, key)
    background.add_task(_enqueue, services, request.app, tasks)
    return answer


def _queue_one(services: Services, tenant: Tenant, name: str, body: bytes, key: str | None) -> dict[str, Any]:
    try:
        wish = _wish(services, body)
    except ValidationError as error:
        places = [{**place, "loc": ("body", *place["loc"])} for place in error.errors(include_url=False)]
        raise RequestValidationError(places) from error

    def answer(tasks: Sequence[Task]) -> dict[str, Any]:
        (task,) = tasks
        return {"video_id": None, "task_id": task.id, "status": "pending", "duplicate_of": None, "updated": []}

    hashed = idempotency.request_hash("videos by url", name, body.decode())
    found, tasks = fetch.queue(services.storage, tenant, name, [wish], answer, key, hashed)
    for task in tasks:
        services.jobs.enqueue(task)
    return found


def _queue_many(
    services: Services, tenant: Tenant, name: str, body: bytes, key: str | None
) -> tuple[dict[str, Any], list[Task]]:
    wishes: dict[int, Wish] = {}
    refused: list[dict[str, Any]] = []
    for number, line in _lines(body):
        try:
            wishes[number] = _wish(services, line)
        except (ValidationError, InvalidUrl, PrivateAddress) as error:
            refused.append({"line": number, **_told(error)})
    if not wishes and not refused:
        raise InvalidManifest("the manifest is empty")

    def answer(tasks: Sequence[Task]) -> dict[str, Any]:
        queued = [{"line": number, "task_id": task.id} for number, task in zip(wishes, tasks, strict=True)]
        return {"queued": queued, "refused": refused, **({"collection_id": tasks[0].collection_id} if tasks else {})}

    hashed = idempotency.request_hash("manifest", name, hashlib.sha256(body).hexdigest())
    return fetch.queue(services.storage, tenant, name, list(wishes.values()), answer, key, hashed)


def _lines(body: bytes) -> Iterator[tuple[int, bytes]]:
    """The objects of a manifest, each as JSON, with their numbers from 1; empty lines are counted and passed over."""
    body = body.removeprefix(b"\xef\xbb\xbf")
    rows = body.splitlines()
    if body.lstrip()[:1] == b"[":
        try:
            rows = [json.dumps(each).encode() for each in json.loads(body)]
        except (ValueError, RecursionError) as error:
            raise InvalidManifest(f"the manifest begins as a JSON list and is none: {str(error)[:100]}") from error
    found = [(number, row) for number, row in enumerate(rows, start=1) if row.strip()]
    if len(found) > MAX_LINES:
        raise InvalidManifest(f"a manifest has at most {MAX_LINES} lines, this one has {len(found)}")
    yield from found


def _wish(services: Services, body: bytes) -> Wish:
    """Raises ValidationError, InvalidUrl, PrivateAddress."""
    asked = VideoByUrl.model_validate_json(body)
    checked_url(asked.url, services.storage.settings.private_urls)
    return Wish(**asked.model_dump())


def _told(error: ValidationError | PolyclipError) -> dict[str, str]:
    if isinstance(error, PolyclipError):
        return {"code": error.code, "detail": str(error)}
    places = ("/".join(("", *map(str, place["loc"]))) + ": " + place["msg"] for place in error.errors()[:3])
    return {"code": "invalid_request", "detail": "; ".join(places)[:500]}


def _enqueue(services: Services, app: FastAPI, tasks: Sequence[Task]) -> None:
    """What is left out where the service ends is found by the sweep."""
    for task in tasks:
        if app.state.draining.is_set():
            return
        services.jobs.enqueue(task)
