"""From what a request says to what is asked of the searcher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from PIL.Image import Image
from pydantic import ValidationError

from service.http import paging
from service.http.schemas import ImageSearchRequest, SearchOptions, SearchRequest, VideoSearchRequest
from service.search import filters
from service.search.query import Query
from service.search.question import Asked, VideoPart
from service.storage.rows import parse_json
from service.videos.accept import InvalidUpload

IMAGE_FIELDS = [field.alias or name for name, field in ImageSearchRequest.model_fields.items()]
OF_JSON = ("texts", "filter")  # parts of a form that are not plain


def image_request(parts: Mapping[str, str]) -> ImageSearchRequest:
    """Raises InvalidUpload, RequestValidationError."""
    sent: dict[str, Any] = {}
    for name, text in parts.items():
        try:
            value = parse_json(text) if name in ("query", *OF_JSON) else text
        except ValueError as error:
            raise InvalidUpload(f"the part {name!r} is {error}") from error
        if name == "query" and not isinstance(value, dict):
            raise InvalidUpload("the part 'query' must be a JSON object")
        fields: dict[str, Any] = dict(value) if isinstance(value, dict) and name == "query" else {name: value}
        if twice := sent.keys() & fields.keys():
            raise InvalidUpload(f"the field {min(twice)!r} is sent twice")
        sent |= fields
    try:
        return ImageSearchRequest.model_validate(sent)
    except ValidationError as error:
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in error.errors()]) from error


def query_of(body: SearchOptions, picture: Image | None = None) -> Query:
    """What a request asks. Raises InvalidFilter, InvalidPageToken."""
    asked: dict[str, Any] = {
        "without": body.not_,
        "not_weight": body.not_weight,
        "generation": body.generation,
        "adapter": body.adapter,
    }
    if isinstance(body, SearchRequest | ImageSearchRequest):
        asked["texts"] = tuple(body.texts or ([] if body.text is None else [body.text]))
    if isinstance(body, ImageSearchRequest):
        asked |= {"picture": picture, "text_weight": body.text_weight}
    if isinstance(body, VideoSearchRequest):
        asked["part"] = VideoPart(body.video_id, body.start, body.end)
    how = {
        "group_by": body.group_by,
        "where": None if body.filter is None else filters.parse(body.filter),
        "exact": body.rescore,
        "wanted": offset_of(body) + body.page_limit,
        "sort_by": body.sort_by,
        "descending": body.order == "desc" or (body.order is None and body.sort_by == "created_at"),
    }
    return Query(body.collection, Asked(**asked), how)


def offset_of(body: SearchOptions) -> int:
    return int(paging.decode("offset", body.page_token) or 0)
