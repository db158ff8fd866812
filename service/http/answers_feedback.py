"""What is answered about feedback, and what a check-up tells."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from service.http.answers import Page


class FeedbackOut(BaseModel):
    """What the user of a key said of a hit; `start` and `end` in seconds, null for the whole video."""

    id: str
    query: str
    video_id: str
    start: float | None
    end: float | None
    relevant: bool
    key_id: str
    created_at: str
    updated_at: str


class FeedbackPage(Page[FeedbackOut]):
    """Feedback, newest first."""


class WeakQuery(BaseModel):
    """A caption, or a query of users. `relevant` and `irrelevant`: how often users called its hits so."""

    text: str
    source: Literal["caption", "feedback"]
    reasons: list[Literal["caption_not_found", "relevant_not_found", "called_irrelevant"]]
    video_id: str | None = Field(description="Whose caption it is; null for a query of users.")
    rank: int | None = Field(description="Of the first right video; null where it is not among the candidates.")
    relevant: int
    irrelevant: int


class VideoName(BaseModel):
    video_id: str
    filename: str


class VideoToCaption(VideoName):
    why: Literal["no_captions", "never_found"]


class GateOut(BaseModel):
    """What a reliable comparison of a new adapter lacks. A training holds out about a fifth of the captioned videos:
    `captions_needed` so many more captions on further videos, or `held_out_needed` on those that are held out."""

    captioned_videos: int
    videos_needed: int
    held_out_captions: int
    held_out_needed: int
    captions_needed: int


class CheckUpOut(BaseModel):
    """What a collection's searches are weak at. `asked`: captions and queries of users that were asked. Lists name 50 at most,
    `…_total` counts all."""

    collection: str
    generation: str
    adapter: str | None
    ready_videos: int
    captions: int
    asked: int
    weak_queries: list[WeakQuery]
    weak_queries_total: int
    never_found: list[VideoName]
    never_found_total: int
    caption_next: list[VideoToCaption]
    gate: GateOut
