"""Questions of the suites e2e, samsum and wikisql: rows of the published files, local or from the hub, in one form."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.columns import listed
from ..data.hub_source import HubSource
from ..errors import UserError
from ..io.json_file import read_bytes
from .problems import Row, find_file, local_rows
from .wikisql import BadQuery, question_text, read_query, read_table

LARGEST = 256 << 20
"""Bytes of the largest .csv or .txt file that is read, unpacked."""
_MOJIBAKE = {"Ł": "£", "Â£": "£", "Ã©": "é", "ã©": "é"}
"""Characters of the published E2E files that its script corrects."""


@dataclass(frozen=True)
class Published:
    """Where a set is published: hub id and revision, and patterns of its files."""

    hub: str
    revision: str | None
    files: tuple[str, ...]


PUBLISHED = {
    # The hub's own rows come from a script, which datasets no longer runs; its conversion to Parquet is a branch.
    "e2e": Published(
        "tuetschek/e2e_nlg", "refs/convert/parquet", ("testset_w_refs.csv*", "*e2e*test*", "test.txt*", "test*.json*")
    ),
    "samsum": Published("knkarthick/samsum", None, ("*samsum*test*.json*", "test*.json*")),
    "wikisql": Published(
        "Salesforce/wikisql", "refs/convert/parquet", ("test.jsonl*", "*wikisql*test*.json*", "dev.jsonl*")
    ),
}


def load(suite: str, data: str | None) -> list[Row]:
    """Return the questions of ``e2e``, ``samsum`` or ``wikisql``.

    Args:
        data: a file or directory in a published format; None for the hub's split ``test``.
    Returns:
        Rows with ``query``, the text that the model gets, and ``references``, a list of texts. References of equal
        meaning representations are together. Rows of wikisql have ``sql`` and ``table`` instead of references.
    Raises:
        UserError: the rows cannot be found, or lack a column.
    """
    path = None if data is None else find_file(suite, data, PUBLISHED[suite].files)
    raw = _hub(suite) if path is None else _local(path)
    rows = {"e2e": _e2e, "samsum": _samsum, "wikisql": _wikisql}[suite](raw, path)
    if not rows:
        raise UserError(f"--data: {data} has no rows")
    return rows


def text_of(row: Row, where: str, names: Sequence[str], what: str) -> str:
    """Return the text in the first of some columns that a row has. Raises ``UserError`` if there is none."""
    for name in names:
        if isinstance(row.get(name), str):
            return str(row[name])
    raise UserError(
        f"{where}: {what} must be text in {' or '.join(f'`{n}`' for n in names)}; the row has {listed(row)}"
    )


def _e2e(raw: Iterable[tuple[str, Row]], path: Path | None) -> list[Row]:
    groups: dict[str, list[str]] = {}
    for where, row in raw:
        meaning = text_of(
            row, where, ("mr", "meaning_representation", "context", "query"), "the meaning representation"
        )
        reference = text_of(row, where, ("ref", "human_reference", "target", "completion", "response"), "the reference")
        groups.setdefault(meaning.strip(), []).append(reference.strip())
    return [{"query": meaning, "references": references} for meaning, references in groups.items()]


def _samsum(raw: Iterable[tuple[str, Row]], path: Path | None) -> list[Row]:
    return [
        {
            "query": text_of(row, where, ("dialogue", "query"), "the dialogue"),
            "references": [text_of(row, where, ("summary", "response"), "the summary")],
        }
        for where, row in raw
    ]


def _wikisql(raw: Iterable[tuple[str, Row]], path: Path | None) -> list[Row]:
    listed_rows = [(where, dict(row)) for where, row in raw]
    add_tables(listed_rows, path)
    rows = []
    for where, row in listed_rows:
        question = text_of(row, where, ("question",), "the question")
        try:
            query, table = read_query(row.get("sql")), read_table(row.get("table"))
        except BadQuery as error:
            raise UserError(f"{where}: {error}") from None
        sql = {"sel": query.column, "agg": query.aggregation, "conds": [list(each) for each in query.conditions]}
        kept = {"header": table.header, "types": table.types, "rows": table.rows}
        rows.append({"query": question_text(question, table.header), "sql": sql, "table": kept})
    return rows


def add_tables(rows: Sequence[tuple[str, Row]], path: Path | None, *, required: bool = True) -> None:
    """Give each row its ``table``, from the ``*.tables.jsonl`` beside the file of questions, by its ``table_id``.

    Raises:
        UserError: a row has no table, and tables are required.
    """
    if all("table" in row for _, row in rows):
        return
    wanted = {row.get("table_id") for _, row in rows if "table" not in row}
    tables: dict[str, Row] = {}
    place = None if path is None else _tables_beside(path)
    if place is not None:
        tables = {str(row["id"]): row for _, row in local_rows(place) if row.get("id") in wanted}
    for where, row in rows:
        if "table" not in row and row.get("table_id") in tables:
            row["table"] = tables[row["table_id"]]
        if "table" not in row and required:
            beside = "beside the questions" if place is None else f"in {place}"
            raise UserError(
                f"{where}: there is no table {row.get('table_id')!r} {beside}; give a directory with the questions and "
                "their tables, such as test.jsonl and test.tables.jsonl, or rows with a `table` each"
            )


def _tables_beside(path: Path) -> Path | None:
    stem = path.name.partition(".json")[0]
    places = [path.with_name(f"{stem}.tables.jsonl{end}") for end in ("", ".gz")]
    return next((place for place in places if place.is_file()), None)


def _local(path: Path) -> Iterator[tuple[str, Row]]:
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".csv", ".tsv")):
        return _csv_rows(path, "\t" if name.endswith(".tsv") else ",")
    if name.endswith(".txt"):
        return _pairs(path)
    return local_rows(path)


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[str, Row]]:
    reader = csv.DictReader(io.StringIO(_corrected(_text(path))), delimiter=delimiter)
    try:
        for row in reader:
            yield f"{path}:{reader.line_num}", {str(key).strip().lower(): value for key, value in row.items()}
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not CSV: {error}") from None


def _pairs(path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            context, found, completion = line.partition("||")
            if not found:
                raise UserError(f"{path}:{number}: a line must be context||completion, with two bars between the two")
            yield f"{path}:{number}", {"context": context, "completion": completion}


def _text(path: Path) -> str:
    content = read_bytes(path, LARGEST)
    try:
        if path.name.lower().endswith(".gz"):
            with gzip.open(io.BytesIO(content)) as file:
                content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise UserError(f"{path} unpacks to more than {LARGEST >> 20} MiB, the most that is read")
        return content.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None


def _corrected(text: str) -> str:
    for wrong, right in _MOJIBAKE.items():
        text = text.replace(wrong, right)
    return text


def _hub(suite: str) -> list[tuple[str, Any]]:
    published = PUBLISHED[suite]
    try:
        return [(where, dict(row)) for where, row in HubSource(published.hub, None, "test", published.revision).rows()]
    except UserError as error:
        raise UserError(
            f"the questions of suite {suite} ({published.hub}) are not on this machine, and the hub cannot be reached "
            "or does not have them. Run the same command once with a network connection, or give files in a published "
            f"format: --data PATH, a file or a directory that has {' or '.join(published.files)}\n({error})"
        ) from None
