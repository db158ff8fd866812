"""Search filters: comparisons of a video's facts and metadata.

`{"duration": {"gte": 5, "lte": 60}, "metadata.camera": "north", "metadata.tag": {"in": ["a", "b"]}}`; all must hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from service.catalog import Video

FIELDS = ("duration", "width", "height", "fps", "codec", "filename", "size", "created_at")
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda value, wanted: value == wanted,
    "ne": lambda value, wanted: value != wanted,
    "in": lambda value, wanted: any(v in wanted for v in value) if isinstance(value, list) else value in wanted,
    "gt": lambda value, wanted: value > wanted,
    "gte": lambda value, wanted: value >= wanted,
    "lt": lambda value, wanted: value < wanted,
    "lte": lambda value, wanted: value <= wanted,
    "exists": lambda value, wanted: (value is not None) == wanted,
}


class InvalidFilter(ValueError):
    """An unknown field or operator, or an operand of the wrong type; `pointer` is its place in the request."""

    def __init__(self, pointer: str, detail: str) -> None:
        super().__init__(detail)
        self.pointer = pointer


def check(where: Mapping[str, Any]) -> None:
    """Raises InvalidFilter."""
    for field, condition in where.items():
        pointer = f"/filter/{field}"
        if field not in FIELDS and not field.startswith("metadata."):
            raise InvalidFilter(pointer, f"unknown field {field!r}: take metadata.NAME or one of {', '.join(FIELDS)}")
        if isinstance(condition, list):
            raise InvalidFilter(pointer, 'to compare with several values, write {"in": [...]}')
        if not isinstance(condition, Mapping):
            continue
        if not condition:
            raise InvalidFilter(pointer, f"no operator: take one of {', '.join(OPERATORS)}")
        for operator, operand in condition.items():
            if operator not in OPERATORS:
                raise InvalidFilter(f"{pointer}/{operator}", f"unknown operator: take one of {', '.join(OPERATORS)}")
            if operator == "in" and not isinstance(operand, list):
                raise InvalidFilter(f"{pointer}/in", "must be a list")
            if operator == "exists" and not isinstance(operand, bool):
                raise InvalidFilter(f"{pointer}/exists", "must be true or false")
            ordered = isinstance(operand, int | float | str) and not isinstance(operand, bool)
            if operator in ("gt", "gte", "lt", "lte") and not ordered:
                raise InvalidFilter(f"{pointer}/{operator}", "must be a number or a string")


def matches(where: Mapping[str, Any], video: Video) -> bool:
    """Whether a checked filter holds for a video. A comparison of values of different types does not hold."""
    return all(_holds(_value(field, video), condition) for field, condition in where.items())


def _holds(value: Any, condition: Any) -> bool:
    if not isinstance(condition, Mapping):
        return condition in value if isinstance(value, list) else bool(value == condition)
    for operator, operand in condition.items():
        if value is None and operator not in ("exists", "ne"):
            return False
        try:
            if not OPERATORS[operator](value, operand):
                return False
        except TypeError:
            return False
    return True


def _value(field: str, video: Video) -> Any:
    if field.startswith("metadata."):
        value: Any = video.metadata
        for part in field.removeprefix("metadata.").split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value
    if field in ("filename", "size", "created_at"):
        return getattr(video, field)
    return (video.media or {}).get(field)
