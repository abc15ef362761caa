"""Values of a row: what they are called in messages, and what of them no tokenizer or chat template can take."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from typing import Any

from ..errors import UserError

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def without_nulls(value: Any) -> Any:
    """Return ``value`` without the keys whose value is null, at any depth. Columnar files give every object the keys of
    all others in the column; JSON lines have only the keys that somebody wrote."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def listed_objects(value: Any, name: str, where: str) -> list[Any]:
    """Return the list of objects in a column, which may be JSON text as a whole or in each item. A function on its own
    becomes a tool, as a server gives it to the template."""
    try:
        items = json.loads(value or "[]") if isinstance(value, str) else value
        items = [json.loads(item) if isinstance(item, str) else item for item in items]
        if not all(isinstance(item, Mapping) for item in items):
            raise TypeError
        if name != "documents":
            items = [_tool(item) for item in items]
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise refused(
            f"{where}: column {name!r} must be a list of objects, or the JSON text of one, got {kind_of(value)}"
        ) from None
    return list(items)


def _tool(item: Mapping[str, Any]) -> Mapping[str, Any]:
    if "function" not in item and isinstance(item.get("name"), str) and item.get("type", "function") == "function":
        item = {"type": "function", "function": {key: value for key, value in item.items() if key != "type"}}
    if isinstance(function := item.get("function"), dict) and isinstance(function.get("parameters"), str):
        return {**item, "function": {**function, "parameters": json.loads(function["parameters"])}}
    return item


def has_bare_functions(value: Any) -> bool:
    """Whether ``listed_objects`` makes tools of functions in a column."""
    items = json_value(value) if isinstance(value, str) else value
    return any("function" not in (json_value(item) if isinstance(item, str) else item) for item in items or ())


def check_unicode(text: str, name: str, where: str) -> None:
    """Refuse half a surrogate pair (``"\\ud83d"``): JSON may hold it, but it is not a character for any tokenizer."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise refused(
            f"{where}: column {name!r} holds {error.object[error.start]!r} at character {error.start}, half "
            "of a surrogate pair, which is not a character"
        ) from None


def refused(message: str) -> UserError:
    """Return the error of a row that cannot be trained on."""
    return UserError(f"{message}; correct or remove this row", key="data.dataset")


def kind_of(value: object) -> str:
    if value is None:
        return "null"
    shown = _SHORT.repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"


def json_value(text: str) -> Any:
    """Return the value of JSON text, None if it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
