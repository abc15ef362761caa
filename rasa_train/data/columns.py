"""The meaning of a row: a query and its response, a conversation, or tokens that are ready."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

from ..errors import UserError

Row = Mapping[str, object]
Kind = Literal["pair", "messages", "tokens"]

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


@dataclass(frozen=True)
class Columns:
    """Columns of a row that hold the parts of an example.

    ``names`` maps our names to the file's: ``query``, ``response`` and perhaps ``input`` for a pair,
    ``messages`` for a conversation, ``input_ids`` and perhaps ``labels`` for tokens.
    """

    kind: Kind
    names: Mapping[str, str]

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


def find_columns(row: Row, where: str, configured: Mapping[str, str] | None) -> Columns:
    """Find the columns of a dataset from its first row.

    Args:
        row: the first row; ``where`` is its place, for messages.
        configured: ``data.columns`` (our names -> the file's), or None to recognise the usual names:
            ``input_ids``; ``messages``; query/response; instruction (and ``input``)/response or output;
            prompt/completion; question/answer; problem/solution.
    Raises:
        UserError: a configured column is missing, or nothing is recognised.
    """
    if configured is not None:
        for name in configured.values():
            _present(row, name, where)
        return Columns("messages" if "messages" in configured else "pair", configured)
    if "input_ids" in row:
        return Columns("tokens", {name: name for name in ("input_ids", "labels") if name in row})
    if "messages" in row:
        return Columns("messages", {"messages": "messages"})
    for query, response in _PAIRS:
        if query in row and response in row:
            names = {"query": query, "response": response}
            return Columns("pair", names | {"input": "input"} if query == "instruction" else names)
    known = ", ".join("/".join(pair) for pair in _PAIRS)
    raise UserError(
        f"{where}: there are no known columns among {_listed(row)}; known are input_ids, messages, {known}. "
        "Say which to use with data.columns: {query: <column>, response: <column>}",
        key="data.columns",
    )


def _listed(row: Row) -> str:
    return ", ".join(map(str, row)) or "(none)"


def _present(row: Row, name: str, where: str) -> None:
    if name not in row:
        raise UserError(
            f"{where}: there is no column {name!r}; this row has {_listed(row)}. Correct the file, or name the right "
            "columns in data.columns",
            key="data.columns",
        )


def _value(row: Row, name: str, wanted: type[str] | type[list[object]], where: str) -> Any:
    _present(row, name, where)
    value = row[name]
    if isinstance(value, wanted):
        if isinstance(value, str):
            _check_unicode(value, name, where)
        return value
    kind = "text" if wanted is str else "a list"
    raise UserError(
        f"{where}: column {name!r} must be {kind}, got {_kind_of(value)}; correct or remove this row",
        key="data.dataset",
    )


def _messages(row: Row, name: str, where: str) -> list[Message]:
    messages: list[Message] = _value(row, name, list, where)
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(
                f"{where}: {name}[{i}] must be an object with a text `role` and a `content`, got {_kind_of(message)}",
                key="data.dataset",
            )
        if isinstance(content := message.get("content"), str):
            _check_unicode(content, f"{name}[{i}].content", where)
    if not messages:
        raise UserError(f"{where}: column {name!r} is an empty conversation; remove this row", key="data.dataset")
    return messages


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


def _kind_of(value: object) -> str:
    if value is None:
        return "null"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"
