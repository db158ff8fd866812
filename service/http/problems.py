"""What an exception looks like over HTTP: RFC 9457 problem documents with stable codes."""

from __future__ import annotations

import json
import math
import pkgutil
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnectionFree
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from adapters_store import DamagedAdapter
from service import errors
from service.search.filters import InvalidFilter
from service.storage.database import InvalidText

log = structlog.get_logger()

MAX_ERRORS = 20  # listed in one answer
MAX_DETAIL = 1000  # characters of what tells of a fault: it may quote what the client sent
INTERNAL = "this is our fault; the log tells more under the request id"
PLAIN = {404: "not_found", 405: "method_not_allowed", 416: "invalid_range"}


def install(app: FastAPI) -> None:
    """Makes every error answer of `app` a problem document. The handlers are coroutines: they need no thread to wait for."""
    others = [pkgutil.resolve_name(name) for name in errors.OTHERS]
    for kind in (errors.PolyclipError, OSError, DBAPIError, NoConnectionFree, *others):
        app.add_exception_handler(kind, _known)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(HTTPException, _plain)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _internal)


def problem(
    request: Request,
    status: int,
    code: str,
    detail: str,
    errors: Sequence[Mapping[str, Any]] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The answer that is a problem document (RFC 9457)."""
    body = document(request, status, code, detail, errors)
    extra = {**(headers or {}), "X-Request-Id": body["request_id"]}
    if status == 401:
        extra["WWW-Authenticate"] = "Bearer"
    if status in (429, 503):
        extra.setdefault("Retry-After", "2")
    return Response(json.dumps(body), status, extra, media_type="application/problem+json")


def document(request: Request, status: int, code: str, detail: str, errors: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
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
    return body


def of_one(request: Request, error: Exception) -> dict[str, Any]:
    """The document of what went wrong with one of several things that are answered together."""
    if isinstance(error, ValidationError):
        places = [{"pointer": "".join(f"/{part}" for part in each["loc"]), "detail": each["msg"]} for each in error.errors()]
        return document(request, 422, "invalid_request", _listed(places), places)
    told = errors.describe(error)
    if told is None or told.status is None:
        log.exception("request_failed", path=request.url.path, exc_info=error)
        return document(request, 500, "internal", INTERNAL)
    return document(request, told.status, told.code, told.detail, _places(error, told.detail))


def _cut(text: str) -> str:
    return text if len(text) <= MAX_DETAIL else text[: MAX_DETAIL - 1] + "…"


async def _known(request: Request, error: Exception) -> Response:
    told = errors.describe(error)
    if told is None or told.status is None:
        return await _internal(request, error)
    if isinstance(error, InvalidText) and error.text in request.path_params.values():
        return problem(request, 404, "not_found", "nothing has this name")
    if errors.fault_of(error) is not None or isinstance(error, DamagedAdapter):
        log.error(told.code, path=request.url.path, reason=" ".join(str(error).split())[:300])
    wait = None if told.retry_after is None else {"Retry-After": str(max(1, math.ceil(told.retry_after)))}
    return problem(request, told.status, told.code, told.detail, _places(error, told.detail), wait)


async def _invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    places = [{"pointer": "".join(f"/{part}" for part in place["loc"][1:]), "detail": place["msg"]} for place in error.errors()]
    return problem(request, 422, "invalid_request", _listed(places), places)


def _listed(places: Sequence[Mapping[str, str]]) -> str:
    return "; ".join(f"{_cut(place['pointer']) or 'body'}: {_cut(place['detail'])}" for place in places[:MAX_ERRORS])


def _places(error: Exception, detail: str) -> list[dict[str, str]]:
    return [{"pointer": error.pointer, "detail": detail}] if isinstance(error, InvalidFilter) else []


async def _plain(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = PLAIN.get(error.status_code, "invalid_request")
    return problem(request, error.status_code, code, str(error.detail), headers=error.headers)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _internal(request: Request, error: Exception) -> Response:
    log.exception("request_failed", request_id=request.state.request_id, path=request.url.path, exc_info=error)
    return problem(request, 500, "internal", INTERNAL)
