"""What all modules of rows need: what it raises, pages of a list, names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Connection, RowMapping, Select, Table, func, select
from sqlalchemy.dialects import postgresql, sqlite

from service.errors import PolyclipError
from service.storage.database import check_text

PART = 10_000
NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}")
ALL = 1 << 31  # rows of a page that holds everything
DEPTH = 32  # of JSON that comes back with every hit


class NotFound(PolyclipError):
    """`what` is collection, video, adapter, task, tenant or key."""

    code, status, task_code, hint = "<object>_not_found", 404, "not_found", "mend the name or id"

    def __init__(self, what: str, name: str) -> None:
        super().__init__(f"there is no {what} {name!r}")
        self.code = f"{what}_not_found"


class AlreadyExists(PolyclipError):
    code, status, hint = "<object>_exists", 409, "take another name"

    def __init__(self, what: str, name: str) -> None:
        super().__init__(f"there is a {what} named {name!r} already")
        self.code = f"{what}_exists"


class InvalidName(PolyclipError, ValueError):
    """A name has other characters than letters, digits, dot, hyphen and underscore, or more than 64."""

    code, status, hint = "invalid_name", 422, "take a name of letters, digits, dots, hyphens and underscores"


class QuotaExceeded(PolyclipError):
    """The message says which quota and how large it is."""

    code, status, hint = "quota_exceeded", 403, "delete something, or ask the operator for more"


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


def parts(values: Iterable[Any]) -> Iterator[list[Any]]:
    """The values, as many at a time as one statement takes: PostgreSQL allows 65,535 parameters, SQLite 32,766."""
    rest = list(values)
    for first in range(0, len(rest), PART):
        yield rest[first : first + PART]


def among(connection: Connection, query: Select[Any], column: Any, values: Iterable[Any]) -> Iterator[Any]:
    """The rows of `query` with one of these values in the column; its order holds within the rows of one value."""
    for part in parts(values):
        yield from connection.execute(query.where(column.in_(part)))


def checked_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise InvalidName(f"a name has 1 to 64 letters, digits, dots, hyphens and underscores; {name!r:.80} has not")
    return name


def parse_json(text: str) -> Any:
    """JSON that can be stored and sent again. Raises ValueError."""
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
        check_text(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {str(error)[:100]}") from error
    if not _within(value, DEPTH):
        raise ValueError(f"nested more than {DEPTH} levels deep")
    return value


def _within(value: Any, levels: int) -> bool:
    inner = list(value.values()) if isinstance(value, dict) else value
    return not isinstance(inner, list) or (levels > 0 and all(_within(v, levels - 1) for v in inner))


def upsert(connection: Connection, table: Table, keep: bool = False, **values: Any) -> None:
    """Inserts a row, or changes the one of the same primary key, or with `keep` leaves that; two at once do not collide."""
    insert: Any = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    row = insert(table).values(**values)
    connection.execute(
        row.on_conflict_do_nothing() if keep else row.on_conflict_do_update(index_elements=table.primary_key, set_=values)
    )
