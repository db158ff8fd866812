"""What all modules of rows need: what it raises, pages of a list, names."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Connection, RowMapping, Select, func, select

NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}")
DEPTH = 32  # of JSON that comes back with every hit


class NotFound(LookupError):
    """`what` is collection, video, adapter, task, tenant or key."""

    def __init__(self, what: str, name: str) -> None:
        super().__init__(f"there is no {what} {name!r}")
        self.what = what


class AlreadyExists(ValueError):
    def __init__(self, what: str, name: str) -> None:
        super().__init__(f"there is a {what} named {name!r} already")
        self.what = what


class InvalidName(ValueError):
    """A name has other characters than letters, digits, dot, hyphen and underscore, or more than 64."""


class QuotaExceeded(ValueError):
    """The message says which quota and how large it is."""


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a list in the order of creation, newest first; `after` is the id to go on from, None at the end."""

    rows: Sequence[Any]
    after: str | None
    total: int


Record = TypeVar("Record")


def record(kind: type[Record], row: RowMapping) -> Record:
    return kind(**{name: row[name] for name in kind.__dataclass_fields__})  # type: ignore[attr-defined]


def page(connection: Connection, query: Select[Any], kind: type[Record], ids: Any, limit: int, after: str | None) -> Page:
    total = connection.scalar(select(func.count()).select_from(query.subquery())) or 0
    if after is not None:
        query = query.where(ids < after)
    rows = connection.execute(query.order_by(ids.desc()).limit(limit + 1)).mappings().all()
    records = [record(kind, row) for row in rows[:limit]]
    return Page(records, rows[limit - 1]["id"] if len(rows) > limit else None, total)


def checked_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise InvalidName(f"a name has 1 to 64 letters, digits, dots, hyphens and underscores; {name!r:.80} has not")
    return name


def parse_json(text: str) -> Any:
    """JSON that can be stored and sent again. Raises ValueError."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # no infinite number, no half of a character
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {str(error)[:100]}") from error
    if not _within(value, DEPTH):
        raise ValueError(f"nested more than {DEPTH} levels deep")
    return value


def _within(value: Any, levels: int) -> bool:
    inner = list(value.values()) if isinstance(value, dict) else value
    return not isinstance(inner, list) or (levels > 0 and all(_within(v, levels - 1) for v in inner))
