"""A filter as SQL, the same on SQLite and PostgreSQL: which videos it may let through, and which of them it surely does.

Between the two are those that only `Filter.matches` can tell: times near a bound, which have offsets; fractions near one, whose
last digit SQLite may read otherwise; names and operands that are not written into SQL. Everything else is decided here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple

from sqlalchemy import (
    Boolean,
    ColumnElement,
    Numeric,
    String,
    and_,
    case,
    cast,
    exists,
    false,
    func,
    literal,
    literal_column,
    not_,
    null,
    or_,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import JSONB

from service.search.filters import FIELDS, Filter, Test, comparable
from service.storage.tables import videos

PLAIN = re.compile(r"[ !#-\[\]-~]+")  # names that both write as they are in a path
EXACT = 2**53  # whole numbers up to here are the same as integers, floats and decimals
MOST_OPERANDS = 4000  # of one filter in a statement: SQLite takes 32,766 parameters, and most are in `may` and in `sure`
NEAR = 2.0**-50  # of a number: farther apart than this, two are told apart however they were read
DAY = timedelta(days=1)
COLUMNS = {"filename": videos.c.filename, "created_at": videos.c.created_at, "size": videos.c.size}

Clause = ColumnElement[bool]


class Clauses(NamedTuple):
    """`may` holds for every video that the filter lets through, `sure` for none that it does not."""

    may: Clause
    sure: Clause

    @property
    def exact(self) -> bool:
        return self.may is self.sure


@dataclass(frozen=True, slots=True)
class _Value:
    """What stands in a field: `text`, `number` and `precise` are NULL where it is no such thing."""

    empty: Clause  # missing, or null
    text: ColumnElement[Any]
    number: ColumnElement[Any]
    precise: ColumnElement[Any]  # a number that is read to its last digit
    is_true: Clause
    is_false: Clause
    any_element: Callable[[Callable[[_Value], Clause]], Clause]  # of a list


def compiled(where: Filter, dialect: str) -> Clauses:
    """The filter over the table `videos`; what cannot be said in SQL may let through every video, and surely none."""
    may, sure, left = [], [], MOST_OPERANDS
    for name, tests in where.tests.items():
        value = _value(name, dialect)
        for test in tests:
            left -= len(test.operands)
            clauses = Clauses(true(), false()) if value is None or left < 0 else _said(value, test, dialect)
            may.append(clauses.may)
            sure.append(clauses.sure)
    every = and_(true(), *may)
    return Clauses(every, every if all(a is b for a, b in zip(may, sure, strict=True)) else and_(true(), *sure))


def _said(value: _Value, test: Test, dialect: str) -> Clauses:
    if test.operator == "exists":
        return _both(not_(value.empty) if test.operands[0] else value.empty)
    if test.operator in ("gt", "gte", "lt", "lte"):
        return _ordered(value, test, dialect)
    equal = _equal(value, test.operands, dialect)
    if test.operator != "ne":
        return equal
    return _both(not_(equal.may)) if equal.exact else Clauses(not_(equal.sure), not_(equal.may))


def _both(clause: Clause) -> Clauses:
    return Clauses(clause, clause)


def _equal(value: _Value, operands: Sequence[Any], dialect: str) -> Clauses:
    """The value, or an element of a list, is one of the operands."""
    texts: list[str] = []
    whole: list[float] = []
    near: list[float] = []
    moments: list[tuple[str, Any]] = []
    for operand in operands:
        kind, measure = comparable(operand)
        if kind == "text":
            texts.append(operand)
        elif kind == "time":
            moments.append((operand, measure))
        elif kind == "number":
            (whole if _is_exact(operand) else near).append(operand)

    def sure(of: _Value) -> list[Clause]:
        found: list[Clause] = [of.text.in_(texts)] if texts else []
        found += [of.number.in_([_number(n, dialect) for n in whole])] if whole else []
        found += [of.empty] if None in operands else []
        found += [of.is_true] if any(operand is True for operand in operands) else []
        found += [of.is_false] if any(operand is False for operand in operands) else []
        return found + ([of.text.in_([text for text, _ in moments])] if moments else [])

    def may(of: _Value) -> list[Clause]:
        found = sure(of) + [_near(of, number, dialect) for number in near]
        return found + [and_(*_days(of.text, measure)) for _, measure in moments]

    def somewhere(tests: Callable[[_Value], list[Clause]]) -> Clause:
        return or_(_told(tests(value)), value.any_element(lambda element: _told(tests(element))))

    surely = somewhere(sure)
    return _both(surely) if not near and not moments else Clauses(somewhere(may), surely)


def _ordered(value: _Value, test: Test, dialect: str) -> Clauses:
    (operand,) = test.operands
    kind, measure = comparable(operand)
    up = test.operator in ("gt", "gte")
    if kind == "text":
        return _both(_told([_compare(value.text, test.operator, operand)]))
    if kind == "number":
        if not _is_finite(operand):
            return Clauses(value.number.is_not(None), false())
        if value.number is value.precise and abs(operand) <= EXACT:
            return _both(_told([_compare(value.number, test.operator, _number(operand, dialect))]))
        near = abs(float(operand)) * NEAR
        low, high = (_number(float(operand) + sign * near, dialect) for sign in (-1, 1))
        loose, strict = (low, high) if up else (high, low)
        sure = [value.number > strict if up else value.number < strict]
        if _is_exact(operand):
            sure.append(_compare(value.precise, test.operator, _number(operand, dialect)))
        return Clauses(_told([value.number >= loose if up else value.number <= loose]), _told(sure))
    assert isinstance(measure, float)  # a time: a text that is one lies within a day of its own date, others compare as texts
    (first, after), text = _bounds(measure), value.text
    if up:
        may = text >= first if first else text.is_not(None)
        return Clauses(_told([may]), _told([text >= after] if after else []))
    may = text < after if after else text.is_not(None)
    return Clauses(_told([may]), _told([text < first] if first else []))


def _compare(column: ColumnElement[Any], operator: str, bound: Any) -> Clause:
    ways: dict[str, Clause] = {"gt": column > bound, "gte": column >= bound, "lt": column < bound, "lte": column <= bound}
    return ways[operator]


def _told(clauses: Sequence[Clause]) -> Clause:
    """One of them holds; never NULL."""
    return func.coalesce(or_(false(), *clauses), false(), type_=Boolean)


def _bounds(moment: float) -> tuple[str | None, str | None]:
    """The dates between which a time (seconds since 1970) is written, in any offset: the first, and the one after the last;
    None where there are none so far out.
    """

    def day(shift: timedelta) -> str | None:
        try:
            return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=moment) + shift).date().isoformat()
        except OverflowError:
            return None

    return day(-DAY), day(2 * DAY)


def _days(text: ColumnElement[Any], moment: float) -> list[Clause]:
    first, after = _bounds(moment)
    found: list[Clause] = [text.is_not(None)]
    return found + ([text >= first] if first else []) + ([text < after] if after else [])


def _near(value: _Value, number: float, dialect: str) -> Clause:
    if not _is_finite(number):
        return value.number.is_not(None)
    near = abs(float(number)) * NEAR
    return value.number.between(_number(float(number) - near, dialect), _number(float(number) + near, dialect))


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number) and math.isfinite(float(number) * 2)
    except OverflowError:  # an int beyond all floats
        return False


def _is_exact(number: float) -> bool:
    return _is_finite(number) and number == int(number) and abs(number) <= EXACT


def _number(number: float, dialect: str) -> Any:
    """A number as the database's JSON numbers compare with it."""
    if dialect == "postgresql":
        return Decimal(repr(number)) if isinstance(number, float) else Decimal(number)
    return number


def _value(name: str, dialect: str) -> _Value | None:
    """What stands in a field of a video; None where its name cannot be written into SQL."""
    if name in COLUMNS:
        column = COLUMNS[name]
        no_text, no_number = cast(null(), String), cast(null(), Numeric)
        text, number = (no_text, column) if name == "size" else (_binary(column, dialect), no_number)
        return _Value(false(), text, number, number, false(), false(), lambda _: false())
    column, names = (videos.c.media, [name]) if name in FIELDS else (videos.c.metadata, name.split(".")[1:])
    if not all(PLAIN.fullmatch(part) for part in names):
        return None
    return _postgresql(column, names) if dialect == "postgresql" else _sqlite(column, names)


def _sqlite(column: ColumnElement[Any], names: Sequence[str]) -> _Value:
    path = literal("$" + "".join(f'."{name}"' for name in names), String)
    kind, found = func.json_type(column, path, type_=String), func.json_extract(column, path)

    def any_element(test: Callable[[_Value], Clause]) -> Clause:
        elements = func.json_each(column, path).table_valued("value", "type", name="elements")
        inner = _sqlite_value(elements.c.type, elements.c.value, lambda _: false())
        return and_(func.coalesce(kind, "") == "array", exists(select(1).select_from(elements).where(test(inner))))

    return _sqlite_value(kind, found, any_element)


def _sqlite_value(kind: ColumnElement[Any], found: ColumnElement[Any], any_element: Any) -> _Value:
    return _Value(
        empty=func.coalesce(kind, "null") == "null",
        text=case((kind == "text", found)),
        number=case((kind.in_(("integer", "real")), found)),
        precise=case((kind == "integer", found)),
        is_true=kind == "true",
        is_false=kind == "false",
        any_element=any_element,
    )


def _postgresql(column: ColumnElement[Any], names: Sequence[str]) -> _Value:
    found: Any = cast(column, JSONB)
    for name in names:
        found = found.op("->")(literal(name, String))

    def any_element(test: Callable[[_Value], Clause]) -> Clause:
        whole = case((func.jsonb_typeof(found) == "array", found), else_=literal_column("'[]'::jsonb"))
        elements = func.jsonb_array_elements(whole).table_valued("value", name="elements")
        inner = _postgresql_value(elements.c.value, lambda _: false())
        return exists(select(1).select_from(elements).where(test(inner)))

    return _postgresql_value(found, any_element)


def _postgresql_value(found: ColumnElement[Any], any_element: Any) -> _Value:
    kind, written = func.jsonb_typeof(found), found.op("#>>")(literal_column("'{}'"))
    number = case((kind == "number", cast(written, Numeric)))
    return _Value(
        empty=func.coalesce(kind, "null") == "null",
        text=_binary(case((kind == "string", written)), "postgresql"),
        number=number,
        precise=number,
        is_true=and_(kind == "boolean", written == "true"),
        is_false=and_(kind == "boolean", written == "false"),
        any_element=any_element,
    )


def _binary(text: ColumnElement[Any], dialect: str) -> ColumnElement[Any]:
    """A text that is compared by its bytes, as Python and SQLite do, and not as a language sorts."""
    return cast(text, String).collate("C") if dialect == "postgresql" else text
