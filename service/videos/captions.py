"""What a caption may be, whichever way it comes: over HTTP, from a file of captions or in an archive."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, Field, model_validator

MAX_TEXT = 10_000  # characters
MAX_CAPTIONS = 1000  # of a video


def _worded(text: str) -> str:
    if not text.strip():
        raise ValueError("must have more than white space")
    return text


CaptionText = Annotated[str, Field(min_length=1, max_length=MAX_TEXT), AfterValidator(_worded)]


class CaptionIn(BaseModel, extra="forbid"):
    """A caption; `start` and `end` in seconds."""

    text: CaptionText
    start: float | None = Field(None, ge=0, allow_inf_nan=False)
    end: float | None = Field(None, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _ordered(self) -> CaptionIn:
        if self.start is not None and self.end is not None and self.end <= self.start:
            raise ValueError("end must be after start")
        return self
