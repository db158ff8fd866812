"""Search filters: comparisons of a video's facts and metadata.

`{"duration": {"gte": 5, "lte": 60}, "metadata.camera": "north", "metadata.tag": {"in": ["a", "b"]}}`; all must hold. A bare
value means `eq`. Of a list in the metadata one element must be equal. Values are compared as JSON has them: `true` is not 1,
1 is 1.0, and what is missing equals `null`. Strings that are both times with a date and a clock are compared as
instants, without an offset in UTC. Values of different types compare as unequal, and neither is greater.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from service.errors import PolyclipError

FIELDS = ("duration", "width", "height", "fps", "codec", "filename", "size", "created_at")
OPERATORS = ("eq", "ne", "in", "gt", "gte", "lt", "lte", "exists")
ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le,
}  # fmt: skip
MOST_FIELDS, MOST_OPERANDS, LONGEST, DEEPEST = 32, 1000, 1000, 8  # a field's parts; characters of a field or an operand
TIME = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d")


class InvalidFilter(PolyclipError):
    """An unknown field or operator, a wrong operand, or more than a limit; `pointer` is its place in the request."""

    code, status, hint = "invalid_filter", 422, "mend what `errors[0].pointer` names"

    def __init__(self, pointer: str, detail: str) -> None:
        super().__init__(detail)
        self.pointer = pointer


@dataclass(frozen=True, slots=True)
class Test:
    """An operator and what it compares with; `holds` for a value."""

    operator: str
    operands: tuple[Any, ...]
    holds: Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class Filter:
    """Made by `parse`. `metadata`: the top-level names of the metadata that it reads."""

    tests: Mapping[str, tuple[Test, ...]]
    metadata: frozenset[str]

    def matches(self, values: Mapping[str, Any]) -> bool:
        """`values`: those of FIELDS by name, and under `metadata` a mapping of the names that are read."""
        return all(
            test.holds(value) for field, tests in self.tests.items() for value in [_value(field, values)] for test in tests
        )


def parse(where: Mapping[str, Any]) -> Filter:
    """Raises InvalidFilter."""
    if len(where) > MOST_FIELDS:
        raise InvalidFilter("/filter", f"has {len(where)} fields: at most {MOST_FIELDS} are taken")
    tests: dict[str, tuple[Test, ...]] = {}
    for field, condition in where.items():
        parts = field.split(".")
        if len(field) > LONGEST or len(parts) > DEEPEST + 1:
            raise InvalidFilter("/filter", f"a field has at most {LONGEST} characters and {DEEPEST} names below metadata")
        pointer = f"/filter/{field}"
        if field not in FIELDS and not (parts[0] == "metadata" and len(parts) > 1):
            raise InvalidFilter(pointer, f"unknown field {field!r}: take metadata.NAME or one of {', '.join(FIELDS)}")
        if isinstance(condition, list):
            raise InvalidFilter(pointer, 'to compare with several values, write {"in": [...]}')
        if not isinstance(condition, Mapping):
            condition = {"eq": condition}
        if not condition:
            raise InvalidFilter(pointer, f"no operator: take one of {', '.join(OPERATORS)}")
        tests[field] = tuple(_test(f"{pointer}/{name}"[:LONGEST], name, operand) for name, operand in condition.items())
    return Filter(tests, frozenset(field.split(".")[1] for field in tests if field not in FIELDS))


def _test(pointer: str, name: str, operand: Any) -> Test:
    """What an operator asks of a value."""
    if name not in OPERATORS:
        raise InvalidFilter(pointer, f"unknown operator: take one of {', '.join(OPERATORS)}")
    if name == "exists":
        if not isinstance(operand, bool):
            raise InvalidFilter(pointer, "must be true or false")
        return Test(name, (operand,), lambda value: (value is not None) == operand)
    if name == "in":
        if not isinstance(operand, list):
            raise InvalidFilter(pointer, "must be a list")
        if len(operand) > MOST_OPERANDS:
            raise InvalidFilter(pointer, f"has {len(operand)} values: at most {MOST_OPERANDS} are taken")
    operands = tuple(operand) if name == "in" else (operand,)
    if any(isinstance(each, list | Mapping) for each in operands):
        raise InvalidFilter(pointer, "values are strings, numbers, true, false or null")
    if any(isinstance(each, str) and len(each) > LONGEST for each in operands):
        raise InvalidFilter(pointer, f"a string has at most {LONGEST} characters")
    wanted = [comparable(each) for each in operands]
    if name in ORDER:
        kind, bound = wanted[0]
        if kind not in ("number", "time", "text"):
            raise InvalidFilter(pointer, "must be a number or a string")
        compare = ORDER[name]

        def ordered(value: Any) -> bool:
            found, measure = comparable(value)
            if (found, kind) in (("time", "text"), ("text", "time")):
                return compare(str(value), str(operand))
            return found == kind and compare(measure, bound)

        return Test(name, operands, ordered)
    among = frozenset(wanted)

    def equal(value: Any) -> bool:
        values = value if isinstance(value, list) else [value]
        return any(comparable(each) in among for each in values)

    return Test(name, operands, equal if name != "ne" else lambda value: not equal(value))


def comparable(value: Any) -> tuple[str, Hashable]:
    """Its kind, and what is compared within that kind; of an object or a list in a list nothing equals it."""
    if value is None:
        return "null", None
    if isinstance(value, bool):
        return "truth", value
    if isinstance(value, int | float):
        return "number", value
    if not isinstance(value, str):
        return "other", id(value)
    if TIME.match(value):
        try:
            moment = datetime.fromisoformat(value)
            return "time", (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            pass
    return "text", value


def _value(field: str, values: Mapping[str, Any]) -> Any:
    if field in FIELDS:
        return values.get(field)
    value: Any = values["metadata"]
    for part in field.split(".")[1:]:
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
