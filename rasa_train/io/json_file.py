"""JSON files that somebody else may have written: read within bounds, and refused in one line."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError, first_line

T = TypeVar("T")

LARGEST = 64 << 20
"""Bytes of the largest file that is read. The index of a model with 500,000 tensors has half as many."""

DEEPEST = 100
"""Levels of the most nested object that is read. Whoever goes through a value calls a function for each level, and
Python ends a program with some hundreds of them."""


def read_bytes(path: Path, largest: int = LARGEST) -> bytes:
    """Return the content of a regular file.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the path is not a regular file (a pipe would be waited for), is larger than ``largest`` bytes, or
            cannot be read.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise UserError(f"{path} is not a file")
            content = file.read(min(largest, found.st_size) + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(content) > largest:
        raise UserError(f"{path} is larger than {largest:,} bytes, the most that is read")
    return content


def read_object(path: Path, largest: int = LARGEST) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: as ``read_bytes``, or the file does not hold one JSON object.
    """
    content = read_bytes(path, largest)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold one JSON object, got {type(value).__name__}")
    if _is_deeper(value, DEEPEST):
        raise UserError(f"{path} is nested more than {DEEPEST} levels deep")
    return value


def _is_deeper(value: object, most: int) -> bool:
    level = [value]
    for _ in range(most + 1):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
        ]
    return bool(level)


def field(values: Mapping[str, Any], key: str, kind: type[T], where: object, default: T | None = None) -> T:
    """Return ``values[key]``, which must be of the type ``kind``; ``default`` if it is absent and there is one.

    ``bool`` does not count as ``int``, and ``int`` counts as ``float``.

    Args:
        where: the file, for the message.
    Raises:
        UserError: the value is absent without a default, or of another type.
    """
    if key not in values and default is not None:
        return default
    value = values.get(key)
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return kind(value)  # type: ignore[call-arg]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        found = "nothing" if key not in values else f"{type(value).__name__} {value!r:.60}"
        raise UserError(f"{where}: {key} must be {kind.__name__}, got {found}")
    return value
