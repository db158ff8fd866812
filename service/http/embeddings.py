"""`/v1/embeddings` and `/v1/models`: vectors for other programs, in the shape of OpenAI's API."""

from __future__ import annotations

import base64
from datetime import datetime
from typing import Any

from fastapi import APIRouter, Request

from service.http.answers_search import EmbeddingOut, EmbeddingsOut, ModelsOut, TokenUsage, Warning
from service.http.auth import PROBLEMS, CanSearch, InServices, KeyFirst, larger_bodies
from service.http.schemas import EmbeddingsRequest
from service.http.search import while_connected
from service.search.embed import BACKBONE, COLLECTION, embed
from service.storage import collection_rows
from service.storage.rows import ALL

router = APIRouter(route_class=KeyFirst, prefix="/v1", tags=["search"], responses=PROBLEMS)


@router.post("/embeddings", name="create_embeddings")
@larger_bodies(8)
async def create(request: Request, body: EmbeddingsRequest, tenant: CanSearch, services: InServices) -> EmbeddingsOut:
    """Vectors of texts and pictures, of length 1: those that searches in the collection compare. A text's is the query's, a
    picture's that of a frame.

    Vectors of two models are comparable only where neither has an adapter and both have the same backbone.
    """
    of = services.storage, services.encoder, services.searcher.texts, services.pictures, services.reading
    found = await while_connected(request, embed(*of, tenant.id, body.model, body.inputs))
    warnings = []
    if (caution := found.encoder.choice.caution) is not None:
        warnings.append(Warning(code="backbone_knows_no_real_pictures", detail=caution))
    if found.truncated:
        length, places = found.encoder.backbone.context_length, ", ".join(map(str, found.truncated))
        detail = f"longer than the {length} tokens that the backbone reads, their ends were cut off: inputs {places}"
        warnings.append(Warning(code="text_truncated", detail=detail))
    coded = body.encoding_format == "base64"
    rows: list[Any] = [base64.b64encode(v.astype("<f4").tobytes()).decode() if coded else v.tolist() for v in found.vectors]
    return EmbeddingsOut(
        data=[EmbeddingOut(index=i, embedding=row) for i, row in enumerate(rows)],
        model=body.model,
        usage=TokenUsage(prompt_tokens=found.tokens, total_tokens=found.tokens),
        warnings=warnings,
    )


@router.get("/models", name="list_models", response_model=ModelsOut)
def models(tenant: CanSearch, services: InServices) -> dict[str, Any]:
    """What `model` may name: the tenant's collections, and `backbone`."""
    with services.storage.database.read() as connection:
        mine = collection_rows.list_collections(connection, tenant.id, ALL, None).rows
    names = [(BACKBONE, tenant.created_at)]
    names += [(COLLECTION * (each.name == BACKBONE) + each.name, each.created_at) for each in mine]
    rows = [{"id": name, "created": int(datetime.fromisoformat(at).timestamp())} for name, at in names]
    return {"data": [{**row, "owned_by": tenant.name} for row in rows]}
