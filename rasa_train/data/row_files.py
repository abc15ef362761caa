"""Rows of one file: JSON lines, one JSON list, gzipped or not, and Parquet. Errors name the file and the line."""

import gzip
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from ..errors import UserError
from ..io.bounded import Child, Exceeded, weight
from .columns import Row

_BLOCK = 1 << 20  # bytes or characters read at a time
_SPACE = re.compile(r"[ \t\r\n]*")
MAX_ROW = 16 << 20
"""Bytes (or characters of JSON) that one row may have. What unpacks to more is an accident or an attack."""
_MAX_BLANK = 1 << 20  # bytes between two rows
_AT_A_TIME = (1000, 30, 1)
"""Rows of columnar files that are decoded at a time, and what is tried instead if they are too large together."""
_MEMORY, _SECONDS = 512 << 20, 20  # of the child process that decodes columnar files; the seconds are for one row
_UNPACKED, _TIMES = 256 << 20, 1000  # bytes that any file may unpack to, and how many times its size a large one may


def file_rows(path: Path) -> Iterator[tuple[str, Row]]:
    name = path.name.lower()
    if name.endswith(".parquet"):
        yield from _parquet_rows(path)
        return
    opener: Any = gzip.open if name.endswith(".gz") else open
    with opener(path, "rb") as file:
        if ".jsonl" not in name and _starts_with_list(file):
            yield from _list_rows(path, file)
        else:
            yield from _line_rows(path, file)


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow.parquet

    def rows(size: int) -> Iterator[Row]:
        try:
            with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BLOCK) as file:
                for batch in file.iter_batches(size, use_threads=False):
                    yield from batch.to_pylist()
        except MemoryError:
            raise
        except pyarrow.ArrowException as error:
            raise UserError(f"{path}: not a readable parquet file: {error}", key="data.dataset") from error

    path.open("rb").close()  # what cannot be read is an error of this process
    return columnar_rows(rows, str(path), path.stat().st_size)


def columnar_rows(
    rows: Callable[[int], Iterable[Row]], name: str, size: int | None, mapped: int = 0
) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a columnar file, which a child process decodes within bounds: a few bytes can stand for any
    number of equal values.

    Args:
        rows: returns the rows, decoding the given number at a time.
        name: the file, for messages.
        size: bytes of the file, if it may be from anybody.
        mapped: bytes of the files that ``rows`` maps into memory.
    Raises:
        UserError: a row is too large, or all are together.
    """

    def decoded(request: tuple[int, int]) -> Iterator[Row]:
        import pyarrow

        pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # the others reserve more than the child may have
        at_a_time, start = request
        total = 0
        most = None if size is None else max(_UNPACKED, _TIMES * size)
        for number, row in enumerate(rows(at_a_time), 1):
            total += weight(row)
            if most is not None and total > most:
                raise UserError(
                    f"{name} row {number}: the rows up to this one are more than {most >> 20:,} MiB, in a file of "
                    f"{size:,} bytes; if they are meant, write them as .jsonl",
                    key="data.dataset",
                )
            if number > start:
                yield row

    number, problem = 0, Exceeded("memory", 0)
    for at_a_time in _AT_A_TIME:
        start = number
        try:
            with Child(decoded, memory=_MEMORY + mapped, seconds=_SECONDS, largest=MAX_ROW) as child:
                for row in child.ask((at_a_time, start)):
                    number += 1
                    yield f"{name} row {number}", row
            return
        except Exceeded as error:
            problem = Exceeded(error.what, start + error.done)
            if error.what != "memory":  # fewer rows at a time would not help
                break
    what = {
        "memory": f"needs more than {_MEMORY >> 20:,} MiB of memory",
        "time": f"takes more than {_SECONDS} s to read",
        "large": f"is a row of more than {MAX_ROW >> 20} MiB",
    }[problem.what]
    raise UserError(f"{name} row {problem.done + 1}: {what}; correct or remove this row", key="data.dataset")


def _line_rows(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Row]]:
    blank = 0
    for number, line in enumerate(iter(lambda: file.readline(MAX_ROW + 1), b""), 1):
        where = f"{path}:{number}"
        if len(line) > MAX_ROW:
            raise UserError(f"{where}: a row of more than {MAX_ROW >> 20} MiB", key="data.dataset")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            if (blank := blank + len(line)) > _MAX_BLANK:
                raise UserError(f"{where}: more than {_MAX_BLANK >> 20} MiB of empty lines", key="data.dataset")
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}: not UTF-8 at byte {error.start} of the line; save the file as UTF-8",
                key="data.dataset",
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{where}: not JSON: {error}. The file must hold one JSON object a line"
                + ("" if ".jsonl" in path.name.lower() else ", or one list of objects"),
                key="data.dataset",
            ) from None
        yield where, _object(row, where)
        blank = 0


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(
            f"{where}: a row must be a JSON object (column -> value), got {type(row).__name__}",
            key="data.dataset",
        )
    return row


def _starts_with_list(file: IO[bytes]) -> bool:
    start = file.read(_BLOCK).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(0)
    return start.startswith(b"[")


def _list_rows(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Row]]:
    """Rows of one JSON list, decoded one at a time: MetaMathQA is published as a single list of 400 MB."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig")
    decoder = json.JSONDecoder()
    buffer, at, line, blank = "", 0, 1, 0  # text in hand, the place in it, the line its start is on, spaces before it

    def more() -> bool:
        nonlocal buffer, at, line
        added = text.read(max(_BLOCK, len(buffer) - at))
        if added:
            line += buffer.count("\n", 0, at)
            buffer, at = buffer[at:] + added, 0
        return bool(added)

    def next_character() -> str:
        nonlocal at, blank
        while True:
            start, at = at, _SPACE.match(buffer, at).end()  # type: ignore[union-attr]  # matches the empty string too
            if at < len(buffer):
                return buffer[at]
            if (blank := blank + at - start) > _MAX_BLANK:
                raise broken(f"more than {_MAX_BLANK >> 20} MiB of spaces", at)
            if not more():
                return ""

    def next_value() -> Any:
        nonlocal at, blank
        blank = 0
        while True:
            try:
                value, at = decoder.raw_decode(buffer, at)
                return value
            except json.JSONDecodeError as error:
                if len(buffer) - at > MAX_ROW:
                    raise broken(f"{error.msg}, in a row of more than {MAX_ROW >> 20} MiB", at) from None
                if not more():
                    raise broken(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in ...
                raise broken(str(error), at) from None

    def broken(what: str, place: int) -> UserError:
        return UserError(f"{path}:{line + buffer.count(chr(10), 0, place)}: not JSON: {what}", key="data.dataset")

    try:
        next_character()
        at += 1  # the opening bracket
        if next_character() == "]":
            return
        for number in itertools.count(1):
            next_character()
            where = f"{path} row {number}"
            yield where, _object(next_value(), where)
            separator = next_character()
            if separator not in ",]" or not separator:
                raise broken("expected ',' or ']' after a row", at)
            at += 1
            if separator == "]":
                return
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; save the file as UTF-8", key="data.dataset") from None
