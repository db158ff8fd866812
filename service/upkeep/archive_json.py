"""The JSON members of an archive, checked field by field: nothing else of them is read."""

from __future__ import annotations

import re
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, field_validator, model_validator

from indexer.decode import MediaFacts
from service.settings import SHORTEST_SEGMENT, CollectionSettings
from service.storage.rows import parse_json
from service.storage.tables import now
from service.videos.captions import MAX_CAPTIONS, CaptionIn

FORMAT = "polyclip-archive/1"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


def _time(value: Any) -> str:
    """A time as the tables hold it; now, where it is none."""
    return value if isinstance(value, str) and TIME.fullmatch(value) else now()


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be printable")
    return text


def _label(name: str) -> str:
    """A file name for people to read: never a path."""
    return "".join(c for c in re.split(r"[/\\]", name)[-1] if c.isprintable())[:255] or "video"


def _metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    for side in ("before", "after", "in_use"):
        scores = metrics.get(side, {})
        if not (isinstance(scores, dict) and isinstance(scores.get("text_to_video", {}), dict)):
            raise ValueError(f"{side} must hold scores")
    return metrics


def _data(data: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(data.get("validation_videos", []), list):
        raise ValueError("validation_videos must be a list")
    return data


Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Word = Annotated[str, Field(max_length=100), AfterValidator(_printable)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Time = Annotated[str, BeforeValidator(_time), Field(default_factory=now)]
Facts = Annotated[dict[str, Any], BeforeValidator(lambda value: value or {}), Field(default_factory=dict)]


class Part(BaseModel, strict=True):
    """A JSON object; what it holds beside the fields is passed over."""

    @classmethod
    def of(cls, data: bytes) -> Self:
        """Raises ValueError, with one line that names the first field that is wrong."""
        value = parse_json(data.decode())
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


class Backbone(Part):
    name: str | None = None
    fingerprint: str


class Collection(Part):
    name: str
    settings: CollectionSettings

    @field_validator("settings", mode="before")
    @classmethod
    def _no_shorter_segments(cls, settings: Any) -> Any:
        """Earlier versions knew no shortest segment."""
        if isinstance(settings, dict) and isinstance(seconds := settings.get("segment_seconds"), int | float):
            return {**settings, "segment_seconds": max(seconds, SHORTEST_SEGMENT) if seconds > 0 else seconds}
        return settings


class Adapter(Part):
    """A version that comes along; its tensors are a member of their own."""

    digest: Digest
    version: Annotated[int, Field(ge=1, lt=1 << 31)]
    created_at: Time


class Generation(Part):
    """`adapter` is a digest, or None for the frozen backbone; `vector_set` the generation whose vectors it searches."""

    id: str
    adapter: str | None
    vector_set: str
    active: bool


class Manifest(Part):
    """`videos` and `bytes` are what the collection needs of its tenant's quotas."""

    format: Annotated[str, Field(pattern=f"^{FORMAT}$")]
    backbone: Backbone
    collection: Collection
    videos: Count
    bytes: Count
    adapters: list[Adapter]
    generations: list[Generation]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        """One generation is active, no adapter has two, and only the vectors of the frozen backbone are shared."""
        made_with = [each.adapter for each in self.generations]
        digests, shared = [each.digest for each in self.adapters], [g.id for g in self.generations if g.adapter is None]
        unique = (digests, [each.version for each in self.adapters], [g.id for g in self.generations], made_with)
        if (
            any(len(set(values)) < len(values) for values in unique)
            or [g.active for g in self.generations].count(True) != 1
            or not set(made_with) <= {None, *digests}
            or any(g.vector_set not in ([g.id] if g.adapter is None else [g.id, *shared]) for g in self.generations)
        ):
            raise ValueError("the generations and adapters do not fit together")
        return self


class AdapterManifest(Part):
    """What an adapter's manifest tells beyond the file itself."""

    recipe: Facts
    metrics: Annotated[Facts, AfterValidator(_metrics)]
    data: Annotated[Facts, AfterValidator(_data)]
    words: Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=1000)] = []
    parent: Annotated[str, Field(max_length=64)] | None = None
    created_at: Time


class Media(Part):
    duration: Number
    width: Count
    height: Count
    fps: Number
    codec: Word
    frames: Count
    container: Word
    decoder: Word

    def facts(self) -> MediaFacts:
        return MediaFacts(**self.model_dump())


class VideoRecord(Part):
    filename: Annotated[str, AfterValidator(_label)]
    sha256: Digest
    size: Count
    created_at: Time
    metadata: dict[str, Any]
    media: Media | None = None
    captions: Annotated[list[CaptionIn], Field(max_length=MAX_CAPTIONS)]


class Contents(Part):
    """The last member but the checksums: how many videos there are."""

    videos: Count
