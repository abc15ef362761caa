"""The meaning of a row: a query and its response, a conversation, or tokens that are ready."""

import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict

from ..errors import UserError, some

Row = Mapping[str, object]
Kind = Literal["pair", "messages", "tokens"]
OPTIONAL = {"input", "tools"}
"""Our names of the columns that ``data.columns`` may name and that a row may leave out."""
_LISTS = {"tools", "documents"}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_MOST_UNUSED, _LONGEST_NAME = 1000, 100  # columns that are told, and characters of a name

# Known pairs of (query column, response column), in the order in which they are looked for.
_PAIRS = (
    ("query", "response"),
    ("instruction", "response"),
    ("instruction", "output"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("problem", "solution"),
)


class Message(TypedDict):
    """A message of a conversation, which goes to the chat template with all its keys."""

    role: str
    content: NotRequired[object]
    tool_calls: NotRequired[object]


Variables = Mapping[str, Any]
"""Values that a row gives to the chat template beside its messages, such as ``tools``."""


@dataclass(frozen=True)
class Columns:
    """Columns of a row that hold the parts of an example.

    ``names`` maps our names to the file's: ``query``, ``response`` and perhaps ``input`` for a pair,
    ``messages`` for a conversation, ``input_ids`` and perhaps ``labels`` for tokens; perhaps ``tools``.
    ``wanted`` are the further names that the chat template uses.
    """

    kind: Kind
    names: Mapping[str, str]
    wanted: frozenset[str] = frozenset()
    unused: set[str] = field(default_factory=set)
    """Columns that a row had so far, with a value, and that are not used."""
    absent: set[str] = field(default_factory=set)
    """Columns that may be left out of a row and that no row had so far, although ``data.columns`` names them."""

    def extract(self, row: Row, where: str) -> Any:
        """Return the parts of one row, checked.

        Args:
            row: column name -> value.
            where: the row's place ("FILE:LINE"), for messages.
        Returns:
            ``(query, response)``, the list of messages, or ``(input_ids, labels or None)``.
        Raises:
            UserError: a column is missing, or its value is of the wrong type.
        """
        if self.kind == "tokens":
            if "labels" in row and "labels" not in self.names:
                raise UserError(
                    f"{where}: this row has `labels`, but the first row has none; give `labels` to all rows or to none",
                    key="data.dataset",
                )
            labels = _value(row, "labels", list, where) if "labels" in self.names else None
            return _value(row, "input_ids", list, where), labels
        if self.kind == "messages":
            return _messages(row, self.names["messages"], where)
        query = _value(row, self.names["query"], str, where)
        if "input" in self.names and row.get(self.names["input"]):  # Alpaca's optional context
            query = f"{query}\n\n{_value(row, self.names['input'], str, where)}"
        return query, _value(row, self.names["response"], str, where)

    def variables(self, row: Row, where: str) -> Variables:
        """Return what one row gives to the chat template beside its messages, and note the columns that are not used.

        Raises:
            UserError: the tools or documents are not what a template can take.
        """
        used, values = {self.names[name] for name in self.names.keys() - {"tools"}}, dict[str, Any]()
        for name in self.wanted:
            column = self._column_of(name, row)
            if row.get(column) is not None:
                values[name] = _listed_objects(row[column], column, where) if name in _LISTS else row[column]
                used.add(column)
        if isinstance(more := row.get("chat_template_kwargs"), Mapping):
            values |= {name: value for name, value in more.items() if name in self.wanted}
            used |= {"chat_template_kwargs"} if more.keys() <= self.wanted else set()
        for name, value in row.items():
            if name not in used and value is not None and len(self.unused) < _MOST_UNUSED:
                self.unused.add(str(name)[:_LONGEST_NAME])
        self.absent.difference_update(row)
        return {name: _without_nulls(value) for name, value in values.items() if name not in _LISTS or value}

    def _column_of(self, name: str, row: Row) -> str:
        if name != "tools":
            return name
        return self.names.get("tools") or ("tools" if row.get("tools") or "functions" not in row else "functions")


def find_columns(row: Row, where: str, configured: Mapping[str, str] | None, wanted: Iterable[str] = ()) -> Columns:
    """Find the columns of a dataset from its first row.

    Args:
        row: the first row; ``where`` is its place, for messages.
        configured: ``data.columns`` (our names -> the file's), or None to recognise the usual names:
            ``input_ids``; ``messages``; query/response; instruction (and ``input``)/response or output;
            prompt/completion; question/answer; problem/solution.
        wanted: names of columns that the chat template uses, apart from the messages.
    Raises:
        UserError: a configured column is missing, or nothing is recognised.
    """
    names = frozenset(wanted)
    if configured is not None:
        for key in configured.keys() - OPTIONAL:
            _present(row, configured[key], where)
        kind: Kind = "messages" if "messages" in configured else "pair"
        return Columns(kind, configured, names, absent={configured[key] for key in configured.keys() & OPTIONAL})
    if "input_ids" in row:
        return Columns("tokens", {name: name for name in ("input_ids", "labels") if name in row})
    if "messages" in row:
        return Columns("messages", {"messages": "messages"}, names)
    for query, response in _PAIRS:
        if query in row and response in row:
            found = {"query": query, "response": response}
            return Columns("pair", found | {"input": "input"} if query == "instruction" else found, names)
    known = ", ".join("/".join(pair) for pair in _PAIRS)
    raise UserError(
        f"{where}: there are no known columns among {listed(row)}; known are input_ids, messages, {known}. "
        "Say which to use with data.columns: {query: <column>, response: <column>}"
        + ("; or set task: classification, for texts and their labels" if "label" in row else ""),
        key="data.columns",
    )


def listed(row: Row) -> str:
    """Return the names of a row's columns, for a message."""
    return some([str(name)[:_LONGEST_NAME] for name in row], 50) or "(none)"


def _present(row: Row, name: str, where: str) -> None:
    if name not in row:
        raise UserError(
            f"{where}: there is no column {name!r}; this row has {listed(row)}. Correct the file, or name the right "
            "columns in data.columns",
            key="data.columns",
        )


def text_in(row: Row, name: str, where: str) -> str:
    """Return the text in a column. Raises ``UserError`` if there is none."""
    text: str = _value(row, name, str, where)
    return text


def _value(row: Row, name: str, wanted: type[str] | type[list[object]], where: str) -> Any:
    _present(row, name, where)
    value = row[name]
    if isinstance(value, wanted):
        if isinstance(value, str):
            _check_unicode(value, name, where)
        return value
    kind = "text" if wanted is str else "a list"
    raise UserError(
        f"{where}: column {name!r} must be {kind}, got {kind_of(value)}; correct or remove this row",
        key="data.dataset",
    )


def _messages(row: Row, name: str, where: str) -> list[Message]:
    messages: list[Message] = _value(row, name, list, where)
    if not messages:
        raise UserError(f"{where}: column {name!r} is an empty conversation; remove this row", key="data.dataset")
    return [_message(message, f"{name}[{i}]", where) for i, message in enumerate(messages)]


def _message(message: object, name: str, where: str) -> Message:
    """Return a message without nulls, whose content is text, a list of parts that are text, or None for a tool call."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise UserError(
            f"{where}: {name} must be an object with a text `role` and a `content`, got {kind_of(message)}",
            key="data.dataset",
        )
    clean, role = _without_nulls(message), message["role"]
    if isinstance(calls := clean.get("tool_calls"), str):
        clean["tool_calls"] = _listed_objects(calls, f"{name}.tool_calls", where)
    content = clean.get("content")
    if role == "tool" and not isinstance(content, str | None) and not _has_parts(content):
        content = json.dumps(content, ensure_ascii=False)
    if isinstance(content, str):
        _check_unicode(content, f"{name}.content", where)
    elif isinstance(content, list) and content:
        content = [_part(part, f"{name}.content[{i}]", where) for i, part in enumerate(content)]
    elif content or not (role == "assistant" and (clean.get("tool_calls") or clean.get("function_call"))):
        got = kind_of(message["content"]) if "content" in message else "none"
        wanted = "text or a list of text parts" + (", or tool calls instead" if role == "assistant" else "")
        raise UserError(
            f"{where}: the content of {name} (role {role}) must be {wanted}, got {got}; correct or remove this row",
            key="data.dataset",
        )
    clean["content"] = content or ("" if content == "" else None)
    made: Message = clean
    return made


def _has_parts(content: object) -> bool:
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(part, Mapping) and "type" in part for part in content)
    )


def _part(part: object, name: str, where: str) -> dict[str, str]:
    kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
    text = part.get("text") if isinstance(part, Mapping) else part
    if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
        raise UserError(
            f"{where}: {name} is {kind_of(part)}; only text is trained on: its parts are {{type: text, text: ...}}. "
            "Correct or remove this row",
            key="data.dataset",
        )
    _check_unicode(text, name, where)
    return {"type": "text", "text": text}


def text_of(content: object) -> Any:
    """Return the text of a message's content: that of its parts, one after the other, if it is a list of them."""
    return "".join(part["text"] for part in content) if isinstance(content, list) else content


def _without_nulls(value: Any) -> Any:
    """Return ``value`` without the keys whose value is null, at any depth. Columnar files give every object the keys of
    all others in the column; JSON lines have only the keys that somebody wrote."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _listed_objects(value: Any, name: str, where: str) -> list[Any]:
    """Return the list of objects in a column, which may be JSON text as a whole or in each item. A function of OpenAI's
    former ``functions`` becomes a tool."""
    try:
        items = json.loads(value or "[]") if isinstance(value, str) else value
        items = [json.loads(item) if isinstance(item, str) else item for item in items]
        items = [{"type": "function", "function": item} if name == "functions" else item for item in items]
        for function in (item["function"] for item in items if isinstance(item.get("function"), dict)):
            if isinstance(function.get("parameters"), str):
                function["parameters"] = json.loads(function["parameters"])
        if not all(isinstance(item, Mapping) for item in items):
            raise TypeError
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{where}: column {name!r} must be a list of objects, or the JSON text of one, got {kind_of(value)}; "
            "correct or remove this row",
            key="data.dataset",
        ) from None
    return list(items)


def _check_unicode(text: str, name: str, where: str) -> None:
    """Refuse half a surrogate pair (``"\\ud83d"``): JSON may hold it, but it is not a character for any tokenizer."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: column {name!r} holds {error.object[error.start]!r} at character {error.start}, half "
            "of a surrogate pair, which is not a character; correct or remove this row",
            key="data.dataset",
        ) from None


def kind_of(value: object) -> str:
    if value is None:
        return "null"
    shown = _SHORT.repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"
