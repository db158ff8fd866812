"""What is answered about alerts and their events."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from service.http.answers import Failure, Page


class AlertOut(BaseModel):
    """A standing query; `events`: how many videos have met it so far."""

    id: str
    name: str | None
    text: str
    min_score: float | None
    webhook: str | None
    events: int
    created_at: str


class NewAlertOut(AlertOut):
    """With what the calls of its webhook are signed with, the only time that it is shown."""

    secret: str | None


class AlertPage(Page[AlertOut]):
    """Alerts, newest first."""


class AlertEventOut(BaseModel):
    """A video that met an alert, at its best segment. `number` counts the alert's events: the id in the stream."""

    id: str
    number: int
    alert_id: str
    video_id: str
    start: float
    end: float
    score: float
    generation: str
    delivery: Literal["pending", "delivered", "failed"] | None = Field(description="Of the webhook; null without one.")
    error: Failure | None = Field(description="Why the delivery has failed.")
    created_at: str
    delivered_at: str | None


class AlertEventPage(Page[AlertEventOut]):
    """Events of an alert, newest first."""
