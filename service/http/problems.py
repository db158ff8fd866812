"""What an exception looks like over HTTP: RFC 9457 problem documents with stable codes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnectionFree
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from adapters_store import AdapterMismatch, DamagedAdapter, InvalidAdapter, LeaseTimeout
from backbone.batcher import BatcherClosed, BatcherFull, DeadlinePassed
from indexer.frames import DamagedFrames
from service.adapters.adapter_rows import AdapterInUse
from service.adapters.encoder import OtherBackbone
from service.adapters.train import TooFewCaptions
from service.http.middleware import BodyTooLarge
from service.http.paging import InvalidPageToken
from service.http.tasks import TaskNotCancellable, TooManyStreams
from service.http.uploads import EmptyFile, FileTooLarge, InvalidUpload, UnsupportedMedia
from service.search.filters import InvalidFilter
from service.search.query import EmptyText
from service.storage.blobs import BlobMissing
from service.storage.database import InvalidText
from service.storage.faults import Fault, fault_of
from service.storage.idempotency import KeyReused
from service.storage.keys import InvalidKey, InvalidSignature, MissingKey, RoleTooLow, TooManyWrongKeys
from service.storage.rows import AlreadyExists, InvalidName, NotFound, QuotaExceeded
from service.upkeep.archive import InvalidArchive
from service.upkeep.import_collection import ArchiveOfOtherBackbone
from training.recipe import InvalidRecipe

log = structlog.get_logger()

STATUS: dict[type[Exception], tuple[int, str]] = {
    MissingKey: (401, "missing_key"),
    InvalidKey: (401, "invalid_key"),
    RoleTooLow: (403, "role_too_low"),
    InvalidSignature: (403, "invalid_signature"),
    QuotaExceeded: (403, "quota_exceeded"),
    BlobMissing: (404, "file_missing"),
    TooFewCaptions: (409, "too_few_captions"),
    AdapterInUse: (409, "adapter_in_use"),
    ArchiveOfOtherBackbone: (409, "archive_of_other_backbone"),
    TaskNotCancellable: (409, "task_not_cancellable"),
    FileTooLarge: (413, "video_too_large"),
    BodyTooLarge: (413, "body_too_large"),
    UnsupportedMedia: (415, "unsupported_media"),
    EmptyFile: (422, "empty_file"),
    InvalidUpload: (422, "invalid_upload"),
    InvalidArchive: (422, "invalid_archive"),
    InvalidName: (422, "invalid_name"),
    EmptyText: (422, "empty_text"),
    InvalidRecipe: (422, "invalid_recipe"),
    InvalidPageToken: (422, "invalid_page_token"),
    InvalidAdapter: (422, "invalid_adapter"),
    AdapterMismatch: (422, "adapter_mismatch"),
    KeyReused: (422, "idempotency_key_reused"),
    TooManyWrongKeys: (429, "too_many_wrong_keys"),
    TooManyStreams: (429, "too_many_streams"),
    OtherBackbone: (503, "other_backbone"),
    DamagedFrames: (503, "frames_damaged"),
    BatcherFull: (503, "overloaded"),
    DeadlinePassed: (503, "overloaded"),
    LeaseTimeout: (503, "overloaded"),
    TimeoutError: (503, "overloaded"),
    BatcherClosed: (503, "shutting_down"),
    DamagedAdapter: (503, "adapter_damaged"),
}
FAULTS: dict[Fault, tuple[int, str, str, int]] = {  # and the seconds after which to try again
    "full": (507, "insufficient_storage", "the disk is full: nothing was stored; searches go on", 60),
    "read_only": (503, "storage_read_only", "the disk cannot be written to: nothing was stored; searches go on", 60),
    "busy": (503, "database_busy", "another process has held the database's write lock for too long", 5),
    "crowded": (503, "overloaded", "all connections to the database are in use", 2),
}
MAX_ERRORS = 20  # listed in one answer
MAX_DETAIL = 1000  # characters of what tells of a fault: it may quote what the client sent
PLAIN = {404: "not_found", 405: "method_not_allowed", 416: "invalid_range"}


def install(app: FastAPI) -> None:
    """Makes every error answer of `app` a problem document."""
    for kind, (status, code) in STATUS.items():
        app.add_exception_handler(kind, _handler(status, code))
    for kind in (OSError, DBAPIError, NoConnectionFree):
        app.add_exception_handler(kind, _machine)
    app.add_exception_handler(NotFound, _not_found)
    app.add_exception_handler(AlreadyExists, _already_exists)
    app.add_exception_handler(InvalidText, _invalid_text)
    app.add_exception_handler(InvalidFilter, _invalid_filter)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(HTTPException, _plain)
    app.add_exception_handler(ClientDisconnect, lambda request, error: Response(status_code=499))
    app.add_exception_handler(Exception, _internal)


def problem(
    request: Request,
    status: int,
    code: str,
    detail: str,
    errors: Sequence[Mapping[str, Any]] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A problem document (RFC 9457)."""
    body: dict[str, Any] = {
        "type": f"urn:polyclip:problem:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": _cut(detail),
        "code": code,
        "request_id": getattr(request.state, "request_id", ""),
    }
    if errors:
        body["errors"] = [{name: _cut(value) for name, value in error.items()} for error in errors[:MAX_ERRORS]]
        body["errors_left_out"] = max(0, len(errors) - MAX_ERRORS)
    extra = {**(headers or {}), "X-Request-Id": body["request_id"]}
    if status == 401:
        extra["WWW-Authenticate"] = "Bearer"
    if status in (429, 503):
        extra.setdefault("Retry-After", "2")
    return Response(json.dumps(body), status, extra, media_type="application/problem+json")


def _cut(text: str) -> str:
    return text if len(text) <= MAX_DETAIL else text[: MAX_DETAIL - 1] + "…"


def _handler(status: int, code: str) -> Any:
    def handle(request: Request, error: Exception) -> Response:
        if isinstance(error, DamagedAdapter):
            log.error("adapter_damaged", reason=str(error))
        seconds = error.retry_after if isinstance(error, BatcherFull | TooManyWrongKeys) else None
        wait = None if seconds is None else {"Retry-After": str(max(1, math.ceil(seconds)))}
        return problem(request, status, code, str(error) or "the answer took too long", headers=wait)

    return handle


def _machine(request: Request, error: Exception) -> Response:
    if (fault := fault_of(error)) is not None:
        status, code, detail, wait = FAULTS[fault]
        log.error(code, path=request.url.path, reason=" ".join(str(error).split())[:300])
        return problem(request, status, code, detail, headers={"Retry-After": str(wait)})
    if isinstance(error, OperationalError):
        return problem(request, 503, "database_unavailable", "the database does not answer")
    return _internal(request, error)


def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, NotFound)
    return problem(request, 404, f"{error.what}_not_found", str(error))


def _already_exists(request: Request, error: Exception) -> Response:
    assert isinstance(error, AlreadyExists)
    return problem(request, 409, f"{error.what}_exists", str(error))


def _invalid_text(request: Request, error: Exception) -> Response:
    """A path with such a text names nothing; elsewhere it is a fault of the request."""
    assert isinstance(error, InvalidText)
    if any(error.text == part for part in request.path_params.values()):
        return problem(request, 404, "not_found", "nothing has this name")
    return problem(request, 422, "invalid_request", str(error))


def _invalid_filter(request: Request, error: Exception) -> Response:
    assert isinstance(error, InvalidFilter)
    return problem(request, 422, "invalid_filter", str(error), [{"pointer": error.pointer, "detail": str(error)}])


def _invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    places = [{"pointer": "".join(f"/{part}" for part in place["loc"][1:]), "detail": place["msg"]} for place in error.errors()]
    detail = "; ".join(f"{_cut(place['pointer']) or 'body'}: {_cut(place['detail'])}" for place in places[:MAX_ERRORS])
    return problem(request, 422, "invalid_request", detail, places)


def _plain(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = PLAIN.get(error.status_code, "invalid_request")
    return problem(request, error.status_code, code, str(error.detail), headers=error.headers)


def _internal(request: Request, error: Exception) -> Response:
    log.exception("request_failed", request_id=request.state.request_id, path=request.url.path, exc_info=error)
    return problem(request, 500, "internal", "this is our fault; the log tells more under the request id")
