"""What a request may say; `answers.py` has what is answered."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from service.net import MAX_URL
from service.search.pictures import DATA_URL
from service.search.question import MOST_TEXTS, NOT_WEIGHT, TEXT_WEIGHT
from service.settings import CollectionSettings
from service.storage.database import check_text
from service.storage.rows import parse_json
from service.videos.captions import MAX_CAPTIONS, MAX_TEXT, CaptionIn, CaptionText
from training.recipe import Recipe

PageLimit = Annotated[int, Field(ge=1, le=50)]


class In(BaseModel):
    """A request body: an unknown field is an error."""

    model_config = ConfigDict(extra="forbid")


Text = Annotated[str, Field(max_length=MAX_TEXT)]
Texts = Annotated[list[Text], Field(min_length=2, max_length=MOST_TEXTS)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
TEXT = "What is to be seen; cut at the backbone's context length."
TEXTS = "Several texts instead of one, whose mean is searched with; `/search/batch` answers each by itself."
ADAPTER = (
    'Answer under this adapter, which has been active before, instead of the active one; "none": the frozen backbone. Nothing '
    "is switched."
)


class SearchOptions(In):
    """What all kinds of queries take."""

    collection: str
    not_: Text | None = Field(None, alias="not", description="What is not to be seen.")
    not_weight: float = Field(NOT_WEIGHT, ge=0, le=1, description="How much of `not` is taken away.")
    generation: str | None = Field(None, description="Answer under this generation, which still stands, instead of the active.")
    adapter: str | None = Field(None, description=ADAPTER)
    page_limit: PageLimit = 10
    page_token: str | None = None
    group_by: Literal["video", "segment"] = "video"
    filter: dict[str, Any] | None = Field(None, description='{"duration": {"gte": 5}, "metadata.camera": "north"}')
    rescore: bool = Field(True, description="Rescore the first stage's candidates over their frame vectors.")
    sort_by: Literal["score", "created_at", "filename", "duration"] = Field(
        "score", description="The order of the hits; the score decides which these are, and their `rank`."
    )
    order: Literal["asc", "desc"] | None = Field(
        None,
        description="Of `sort_by`; default: the newest, and otherwise the least, first. By score the best is always first.",
    )
    fields: Literal["all", "ids"] = Field("all", description="`ids`: hits without file name, metadata and URLs.")

    @model_validator(mode="after")
    def _one_generation(self) -> Self:
        if self.generation is not None and self.adapter is not None:
            raise ValueError("generation and adapter exclude each other")
        return self


class SearchRequest(SearchOptions):
    text: Text | None = Field(None, description=TEXT)
    texts: Texts | None = Field(None, description=TEXTS)
    combine: Literal["mean"] = Field("mean", description="How `texts` are taken together.")

    @model_validator(mode="after")
    def _text(self) -> Self:
        if (self.text is None) == (self.texts is None):
            raise ValueError("needs text or texts, one of them")
        return self


class VideoSearchRequest(SearchOptions):
    video_id: str = Field(description="A video of the collection.")
    start: Seconds | None = Field(None, description="The part of it that is meant, in seconds; default: from its beginning.")
    end: Seconds | None = Field(None, description="Default: to its end.")


class ImageSearchRequest(SearchOptions):
    """The fields that may be sent beside the image, as parts of the form or as one JSON object in the part `query`."""

    text: Text | None = Field(None, description="What is to be seen besides.")
    texts: Texts | None = Field(None, description=TEXTS)
    text_weight: float = Field(TEXT_WEIGHT, ge=0, le=1, description="The share of text or texts, beside that of the image.")

    @model_validator(mode="after")
    def _text(self) -> Self:
        if self.text is not None and self.texts is not None:
            raise ValueError("text and texts exclude each other")
        return self


def _queries(schema: dict[str, Any]) -> None:
    refs = [{"$ref": f"#/components/schemas/{model.__name__}"} for model in (SearchRequest, VideoSearchRequest)]
    schema["properties"]["queries"]["items"] = {"anyOf": refs}


class BatchRequest(In):
    """Each query is checked, and answered, by itself."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=_queries)

    queries: list[Any] = Field(min_length=1, max_length=64, description="As `/search` and `/search/video` take them.")


class NewFeedback(In):
    collection: str
    query: str = Field(max_length=MAX_TEXT, description="What was searched for.")
    video_id: str = Field(max_length=100, description="A hit of it.")
    start: float | None = Field(None, ge=0, allow_inf_nan=False, description="Of the part that is meant, in seconds.")
    end: float | None = Field(None, ge=0, allow_inf_nan=False)
    relevant: bool

    @model_validator(mode="after")
    def _ordered(self) -> NewFeedback:
        if self.start is not None and self.end is not None and self.end <= self.start:
            raise ValueError("end must be after start")
        return self


class NewAlert(In):
    text: str = Field(max_length=MAX_TEXT, description="What is waited for; cut at the backbone's context length.")
    min_score: float | None = Field(
        None, ge=-1, le=1, allow_inf_nan=False, description="Least score of a match; without it every new video is one."
    )
    webhook: str | None = Field(None, max_length=2000, description="http or https URL that is called with each event.")
    name: str | None = Field(None, min_length=1, max_length=200)


MAX_INPUTS = 64  # of one request for embeddings


class ImageInput(In):
    image: str = Field(description="data:image/png;base64,…")


class EmbeddingsRequest(In):
    model: str = Field(max_length=200, description="A collection's name, or `backbone`: the own one, frozen.")
    input: str | ImageInput | list[str | ImageInput] = Field(
        description=f'Up to {MAX_INPUTS}: texts, and pictures as `{{"image": URL}}` or as the data URL itself.'
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, description="Refused: vectors have the length that the backbone gives them.")
    user: str | None = Field(None, max_length=1000, description="Passed over.")

    @property
    def inputs(self) -> list[str]:
        each = self.input if isinstance(self.input, list) else [self.input]
        return [one if isinstance(one, str) else one.image for one in each]

    @field_validator("input", mode="before")
    @classmethod
    def _few(cls, value: Any) -> Any:
        each = value if isinstance(value, list) else [value]
        if not 1 <= len(each) <= MAX_INPUTS:
            raise ValueError(f"has {len(each)} inputs: 1 to {MAX_INPUTS} are taken at once")
        for one in each:
            text = one.get("image") if isinstance(one, dict) and set(one) == {"image"} else one
            if not isinstance(text, str):
                raise ValueError('an input is a text, or {"image": "data:image/…"}; tokens are not taken')
            if text is not one and not text.startswith(DATA_URL):
                raise ValueError("an image is sent as a data URL: data:image/png;base64,…")
            if len(text) > MAX_TEXT and not text.startswith(DATA_URL):
                raise ValueError(f"a text has at most {MAX_TEXT} characters")
        return value

    @field_validator("dimensions")
    @classmethod
    def _all(cls, value: int | None) -> int | None:
        if value is not None:
            raise ValueError("vectors are not shortened here: leave it out")
        return value


class NewCollection(In):
    name: str
    settings: CollectionSettings = CollectionSettings()


class ChangedCollection(In):
    settings: CollectionSettings


MAX_METADATA = 65536  # bytes of a video's metadata as JSON: a filter reads those of all videos


class Captions(In):
    captions: list[CaptionText | CaptionIn] = Field(max_length=MAX_CAPTIONS)


class VideoByUrl(In):
    url: str = Field(max_length=MAX_URL)
    filename: str | None = Field(None, max_length=1000)
    captions: list[CaptionText | CaptionIn] = Field([], max_length=MAX_CAPTIONS)
    metadata: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _storable(self) -> VideoByUrl:
        check_text([self.url, self.filename, [c if isinstance(c, str) else c.text for c in self.captions]])
        text = "{}" if self.metadata is None else json.dumps(self.metadata, ensure_ascii=False)
        if len(text.encode()) > MAX_METADATA:
            raise ValueError(f"metadata is over {MAX_METADATA} bytes")
        parse_json(text)
        return self


class TrainRequest(In):
    recipe: dict[str, Any] = Field(
        default={},
        description="Fields of the training; those not given have their defaults. The service's limits are in its settings.",
        json_schema_extra=Recipe.json_schema(),
    )
    scope: Literal["both", "text", "vision"] | None = None
    activate: Literal["if_better", "always", "never"] = "if_better"
    text_first: bool = Field(
        False,
        description="Train an adapter of the text tower first: it is in use within a minute or two, as no video is embedded "
        "again. The whole one follows and is compared with it.",
    )


class BackboneIn(In):
    name: str = Field(max_length=200, description="`builtin`, or an open_clip architecture: `GET /backbones` lists some.")
    pretrained: str | None = Field(None, max_length=1000, description="Its weights: one of the architecture's tags.")


class ActivateRequest(In):
    adapter_id: str | None = Field(None, description="An adapter's id, or null for the frozen backbone.")
    backbone: BackboneIn | None = Field(None, description="Change to this backbone, without an adapter.")

    @model_validator(mode="after")
    def _one(self) -> ActivateRequest:
        if not self.model_fields_set:
            raise ValueError("needs adapter_id or backbone")
        if self.adapter_id is not None and self.backbone is not None:
            raise ValueError("adapter_id and backbone exclude each other: an adapter brings the backbone it was trained on")
        return self


class EvaluateRequest(In):
    split: Literal["validation", "all"] = "validation"


class Quotas(In):
    max_videos: int | None = Field(None, ge=0)
    max_bytes: int | None = Field(None, ge=0)
    max_collections: int | None = Field(None, ge=0)


class NewTenant(In):
    name: str
    quotas: Quotas = Quotas()


class NewKey(In):
    role: Literal["search", "write", "admin"]
    expires_at: datetime | None = None

    @field_validator("expires_at")
    @classmethod
    def _utc(cls, moment: datetime | None) -> datetime | None:
        try:
            return moment and (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
        except OverflowError as error:
            raise ValueError("is out of range") from error
