"""WikiSQL: queries as text, and their logical-form and execution accuracy.

A query is ``{"sel": column, "agg": aggregation, "conds": [[column, operator, value], ...]}``, its parts by number, as
in the published files. Model-written queries become numbers first, and their values reach SQLite as bound parameters
only.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

AGGREGATIONS = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
OPERATORS = ("=", ">", "<")
STEPS = 20_000_000
"""Instructions of SQLite's machine that a query may take: more than a count over a million rows does."""
LONGEST = 10_000
"""Characters of the longest text that is read as a query."""
_AND = re.compile(r"\s+AND\s+", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")
_QUOTES = {'"': '"', "`": "`", "[": "]", "'": "'"}

Condition = tuple[int, int, str | int | float]


class BadQuery(ValueError):
    """A prediction is not a query. The text says why."""


@dataclass(frozen=True)
class Query:
    """One query; all numbers count from 0."""

    column: int
    aggregation: int
    conditions: tuple[Condition, ...]

    def same(self, other: Query, *, ordered: bool = False) -> bool:
        """Whether both are the same logical form. Values are compared as lower-case text (1998 is "1998").

        Args:
            ordered: whether the order of the conditions counts.
        """
        mine, theirs = (
            [(column, operator, str(value).lower()) for column, operator, value in query.conditions]
            for query in (self, other)
        )
        same = mine == theirs if ordered else set(mine) == set(theirs)
        return same and (self.column, self.aggregation) == (other.column, other.aggregation)


@dataclass(frozen=True)
class Table:
    """A table of the published ``*.tables.jsonl``, or of the hub's rows."""

    header: tuple[str, ...]
    types: tuple[str, ...]
    """``real`` or ``text`` for each column."""
    rows: tuple[tuple[Any, ...], ...]


def read_query(value: Any) -> Query:
    """Return the query in an object of the published files, or of the hub, where conditions are columns of a table.

    Raises:
        BadQuery: it is none.
    """
    if not isinstance(value, dict):
        raise BadQuery("not an object with sel, agg and conds")
    conditions = value.get("conds")
    if isinstance(conditions, dict):
        parts = [conditions.get(key) for key in ("column_index", "operator_index", "condition")]
        if not all(isinstance(part, list) for part in parts) or len({len(part or ()) for part in parts}) > 1:
            raise BadQuery("conds must have column_index, operator_index and condition, of the same length")
        conditions = [list(condition) for condition in zip(*map(list, filter(None, parts)), strict=True)]
    column, aggregation = value.get("sel"), value.get("agg")
    if type(column) is not int or type(aggregation) is not int or not isinstance(conditions, list):
        raise BadQuery("sel and agg must be whole numbers, and conds a list")
    for condition in conditions:
        if (
            not isinstance(condition, list)
            or len(condition) != 3
            or not all(type(number) is int for number in condition[:2])
            or not isinstance(condition[2], str | int | float)
        ):
            raise BadQuery("a condition must be [column, operator, value]")
    return Query(column, aggregation, tuple((place, operator, text) for place, operator, text in conditions))


def read_table(value: Any) -> Table:
    """Return the table in an object with ``header``, ``types`` and ``rows``.

    Raises:
        BadQuery: it is none.
    """
    parts = [value.get(key) if isinstance(value, dict) else None for key in ("header", "types", "rows")]
    if not all(isinstance(part, list) for part in parts):
        raise BadQuery("a table must have header, types and rows")
    header, types, rows = (list(part or ()) for part in parts)
    if len(header) != len(types) or not all(isinstance(row, list) and len(row) == len(header) for row in rows):
        raise BadQuery("a table must have one type for each column, and in each row one value")
    if len(header) > 1000:
        raise BadQuery("a table must have at most 1,000 columns")
    return Table(tuple(map(str, header)), tuple(map(str, types)), tuple(map(tuple, rows)))


def question_text(question: str, header: Sequence[str]) -> str:
    """Return the text that a model is asked: the question and the columns of its table."""
    return f"{question.strip()}\nColumns: {', '.join(header)}"


def query_text(query: Query, header: Sequence[str]) -> str:
    """Return a query as the text that a model is to write, as in the hub's ``human_readable``."""
    conditions = [f"{header[column]} {OPERATORS[operator]} {value}" for column, operator, value in query.conditions]
    selected = f"{AGGREGATIONS[query.aggregation]} {header[query.column]}".strip()
    return f"SELECT {selected} FROM table" + (f" WHERE {' AND '.join(conditions)}" if conditions else "")


def training_row(question: str, sql: Any, header: Sequence[str]) -> dict[str, str]:
    """Return a row to train on, with ``query`` and ``response``, of one question of the published files."""
    return {"query": question_text(question, header), "response": query_text(read_query(sql), header)}


def parse(text: str, header: Sequence[str]) -> Query:
    """Return the query in a text such as ``query_text`` writes, which may also have ``MAX(column)``, quoted names of
    columns, and any case. Values are taken as they stand: quotes around one belong to it, as in the published queries.

    Raises:
        BadQuery: the text is not a query on these columns.
    """
    text = " ".join(text[:LONGEST].split()).removesuffix(";").strip()
    rest = _after("SELECT ", text)
    found = ((number, _selected(rest, name, header)) for number, name in reversed([*enumerate(AGGREGATIONS)]))
    aggregation, selected = next((each for each in found if each[1]), (0, None))
    if selected is None:
        raise BadQuery("no known column after SELECT")
    column, rest = selected
    parts = re.match(r"FROM \S+ ?(?:WHERE (.*))?$", rest, re.IGNORECASE)
    if parts is None:
        raise BadQuery("no FROM table after the column, or something else than WHERE after it")
    return Query(column, aggregation, tuple(_conditions(parts[1] or "", header)))


def _selected(rest: str, aggregation: str, header: Sequence[str]) -> tuple[int, str] | None:
    """Return the selected column and the text from FROM on; None if it is not this aggregation of a column."""
    if not rest.upper().startswith(aggregation):
        return None
    inner = rest[len(aggregation) :].lstrip()
    if aggregation and inner.startswith("("):
        for column, after in _columns(inner[1:].lstrip(), header):
            if after.startswith(")"):
                return column, after[1:].lstrip()
    return next((found for found in _columns(inner, header) if found[1].upper().startswith("FROM ")), None)


def _columns(text: str, header: Sequence[str]) -> list[tuple[int, str]]:
    """Return the columns that a text begins with, the longest name first, and the text after each."""
    close = _QUOTES.get(text[:1])
    found = []
    for number, name in enumerate(" ".join(part.split()) for part in header):
        for start, end in ((0, ""), *([(1, close)] if close else [])):
            whole = f"{name}{end}"
            if name and text[start : start + len(whole)].lower() == whole.lower():
                found.append((len(whole), number, text[start + len(whole) :].lstrip()))
    return [(number, after) for _, number, after in sorted(found, key=lambda each: (-each[0], each[1]))]


def _conditions(text: str, header: Sequence[str]) -> list[Condition]:
    found: list[Condition] = []
    while text:
        begin = _condition(text, header)
        if begin is None:
            raise BadQuery("a condition that is not a known column, one of = > <, and a value")
        column, operator, rest = begin
        ends = (match for match in _AND.finditer(rest) if _condition(rest[match.end() :], header))
        end = next(ends, None)
        value = rest[: end.start()] if end else rest
        text = rest[end.end() :] if end else ""
        found.append((column, operator, value.strip()))
    return found


def _condition(text: str, header: Sequence[str]) -> tuple[int, int, str] | None:
    for column, after in _columns(text, header):
        if after[:1] in OPERATORS and after[:1]:
            return column, OPERATORS.index(after[0]), after[1:].strip()
    return None


def _after(word: str, text: str) -> str:
    if text[: len(word)].upper() != word:
        raise BadQuery(f"does not begin with {word.strip()}")
    return text[len(word) :]


class Engine:
    """SQLite in memory with one table, on which queries run. The text in the table and in conditions is lower-cased."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.connection = sqlite3.connect(":memory:")
        columns = ", ".join(f"col{i} {'real' if kind == 'real' else 'text'}" for i, kind in enumerate(table.types))
        self.connection.execute(f"CREATE TABLE t ({columns})")
        marks = ", ".join("?" * len(table.types))
        self.connection.executemany(
            f"INSERT INTO t VALUES ({marks})", ([_cell(value) for value in row] for row in table.rows)
        )
        self.connection.execute("PRAGMA query_only = ON")

    def close(self) -> None:
        self.connection.close()

    def run(self, query: Query) -> list[Any]:
        """Return the values that a query selects.

        Raises:
            BadQuery: the query names a column, aggregation or operator that is not there, compares a number with text,
                or takes too long.
        """
        width = len(self.table.header)
        columns = [query.column, *(column for column, _, _ in query.conditions)]
        if not all(0 <= column < width for column in columns):
            raise BadQuery(f"a column that is not among the {width} of the table")
        if not 0 <= query.aggregation < len(AGGREGATIONS) or len(query.conditions) > 100:
            raise BadQuery("no such aggregation, or too many conditions")
        if not all(0 <= operator < len(OPERATORS) for _, operator, _ in query.conditions):
            raise BadQuery("no such operator")
        where = " AND ".join(f"col{column} {OPERATORS[operator]} ?" for column, operator, _ in query.conditions)
        values = [_bound(value, self.table.types[column]) for column, _, value in query.conditions]
        selected = (
            f"{AGGREGATIONS[query.aggregation]}(col{query.column})" if query.aggregation else f"col{query.column}"
        )
        self.connection.set_progress_handler(_stop_after(STEPS), 100_000)
        try:
            statement = f"SELECT {selected} FROM t" + (f" WHERE {where}" if where else "")
            return [value for (value,) in self.connection.execute(statement, values)]
        except (sqlite3.Error, OverflowError, UnicodeEncodeError) as error:
            raise BadQuery(f"SQLite: {error}") from None


def _stop_after(steps: int) -> Callable[[], bool]:
    left = steps // 100_000

    def stop() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    return stop


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return value.lower().encode(errors="replace").decode()
    return value if value is None or isinstance(value, float) else _whole(value)


def _whole(value: Any) -> Any:
    """Return a whole number as SQLite can hold it, and anything else as text."""
    return value if isinstance(value, int) and -(1 << 63) <= value < 1 << 63 else json.dumps(value)


def _bound(value: str | int | float, kind: str) -> Any:
    """Return the value of a condition as the published evaluation binds it: on a ``real`` column, text becomes the
    number that it is, or else the first number in it."""
    if not isinstance(value, str):
        return value if isinstance(value, float) else _whole(value)
    value = value.lower()
    if kind != "real":
        return value
    try:
        return float(value.replace(",", ""))
    except ValueError:
        if (number := _NUMBER.search(value)) is None:
            raise BadQuery(f"a number column is compared with {value[:40]!r}") from None
        return float(number[0])
