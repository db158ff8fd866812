"""Liveness, readiness, metrics, and the page."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse

from service.http.answers import LivenessOut, ReadinessOut
from service.http.auth import InServices, KeyFirst, authenticated
from service.storage import facts, keys

router = APIRouter(route_class=KeyFirst, tags=["health"])
WORKER_SECONDS = 30.0


@router.get("/healthz", name="get_liveness", response_model=LivenessOut)
async def healthz() -> dict[str, str]:
    """The process lives: answered on the event loop, which needs no thread for it."""
    return {"status": "ok"}


@router.get("/readyz", name="get_readiness", response_model=ReadinessOut, responses={503: {"model": ReadinessOut}})
def readyz(services: InServices) -> Response:
    """200 when searches can be answered: the backbone is loaded and the database answers. `ready` where a worker has been seen
    within 30 seconds, too; else `degraded`: what is uploaded or asked for waits until there is one. `missing`: what `checks`
    did not find.

    `warning`: what the backbone's searches are worth where it knows no real pictures.
    """
    checks: dict[str, Any] = {"backbone": services.encoder.backbone_loaded, "database": False, "worker": False}
    try:
        with services.storage.database.read() as connection:
            connection.execute(text("select 1"))
            checks["database"] = True
            checks["worker"] = bool(facts.living_workers(connection, WORKER_SECONDS))
    except SQLAlchemyError:
        pass
    missing = [name for name, found in checks.items() if not found]
    searches = missing in ([], ["worker"])
    status = ("degraded" if missing else "ready") if searches else "not ready"
    backbones = [{**each.choice.shown(), "fingerprint": each.backbone.fingerprint} for each in services.encoder.resident]
    caution = services.encoder.choice.caution
    told = {"status": status, "checks": checks, "missing": missing, "backbones": backbones, "warning": caution}
    return JSONResponse(told, 200 if searches else 503)


@router.get("/metrics", name="get_metrics", response_class=PlainTextResponse)
async def metrics(request: Request, services: InServices) -> Response:
    """Prometheus, with the operator's key (as a bearer token, for one), unless `POLYCLIP_METRICS_OPEN` is set."""
    if not services.storage.settings.metrics_open:
        keys.check_role(await authenticated(request), "root")
    told = await to_thread.run_sync(generate_latest, request.app.state.metrics.registry)
    return Response(told, media_type=CONTENT_TYPE_LATEST)


@router.get("/", include_in_schema=False)
def page() -> HTMLResponse:
    return HTMLResponse((files("service.http") / "page" / "index.html").read_text())
