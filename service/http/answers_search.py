"""What is answered to searches, and to the wish for vectors."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from service.http.answers import BackboneName, PageInfo


class HitIdOut(BaseModel):
    """`rank` by score, from 1, however the hits are sorted; `start` and `end` in seconds."""

    rank: int
    score: float
    video_id: str
    start: float
    end: float


class HitOut(HitIdOut):
    filename: str
    metadata: dict[str, Any]
    thumbnail_url: str
    video_url: str


class SearchPool(BaseModel):
    collection: str
    generation: str
    adapter: str | None
    backbone: BackboneName
    total_videos: int
    pending_videos: int


class Warning(BaseModel):
    code: str
    detail: str


class SearchAnswer(BaseModel):
    data: list[HitOut | HitIdOut]
    search_pool: SearchPool
    timings_ms: dict[str, float]
    page_info: PageInfo
    warnings: list[Warning]


class EmbeddingOut(BaseModel):
    """`embedding`: of length 1; as `base64`, little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class TokenUsage(BaseModel):
    """Tokens that were read, start and end of each text included; a picture has none."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsOut(BaseModel):
    """As OpenAI's, in the order of the inputs; `warnings` as of a search."""

    object: Literal["list"] = "list"
    data: list[EmbeddingOut]
    model: str
    usage: TokenUsage
    warnings: list[Warning]


class ModelOut(BaseModel):
    """`created`: Unix time; `owned_by`: the tenant."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelsOut(BaseModel):
    """As OpenAI's, all of them."""

    object: Literal["list"] = "list"
    data: list[ModelOut]
