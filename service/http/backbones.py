"""Backbones: the data folder's own, and what its collections may be changed to."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from backbone.catalogue import choices
from service.adapters.backbones import BackboneChoice, known_backbones
from service.http.answers import BackbonePage
from service.http.auth import PROBLEMS, CanSearch, InServices, KeyFirst

router = APIRouter(route_class=KeyFirst, prefix="/backbones", tags=["collections"], responses=PROBLEMS)


@router.get("", name="list_backbones", response_model=BackbonePage)
def list_all(tenant: CanSearch, services: InServices) -> dict[str, Any]:
    """Those that have been loaded here, the data folder's own first, and then others that a collection can be changed to.

    `polyclip backbones` has the sources of what is published.
    """
    catalogue = {choice.name: choice for choice in choices()}
    offered = services.storage.settings.backbones
    if offered is None:
        others = [BackboneChoice(choice.name, tag) for choice in catalogue.values() for tag in choice.tags]
    else:
        others = [BackboneChoice(name, tag or None) for name, _, tag in (each.partition(":") for each in offered)]
    with services.storage.database.read() as connection:
        own, *more = known_backbones(connection)
    resident = {each.backbone.fingerprint for each in services.encoder.resident}
    rows = [(BackboneChoice.of(told), str(told["fingerprint"])) for told in (own, *more)]
    there = {choice for choice, _ in rows}
    shown = []
    for choice, fingerprint in [*rows, *((other, "") for other in others if other not in there)]:
        facts = catalogue.get(choice.name)
        shown.append({
            **choice.shown(), "fingerprint": fingerprint or None, "own": fingerprint == own["fingerprint"],
            "in_memory": fingerprint in resident,
            "parameters": facts and facts.parameters, "image_size": facts and facts.image_size,
            "context_length": facts and facts.context_length, "frame_cost": facts and facts.frame,
            "licence": facts and facts.licence, "published": facts and facts.zero_shot.get(choice.pretrained or ""),
        })  # fmt: skip
    return {"data": shown, "page_info": {"next_page_token": None, "total_results": len(shown)}}
