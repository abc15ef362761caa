"""The meaning of a row: a query and its response, a conversation, or tokens that are ready."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from ..errors import UserError, some
from .conversations import (
    REASONING,
    check_turns,
    is_as_written,
    read_chosen,
    read_history,
    read_messages,
    read_prompt,
    said,
    unread_keys,
)
from .conversations import Message as Message
from .conversations import text_of as text_of
from .row_values import check_unicode, has_bare_functions, listed_objects, refused, without_nulls
from .row_values import kind_of as kind_of

Row = Mapping[str, object]
Kind = Literal["pair", "messages", "tokens"]
ALIASES = {"conversations": "messages", "context": "input"}
"""Other names that ``data.columns`` may have for ours."""
OPTIONAL = {"input", "tools", "system", "history", "reasoning", "rejected"}
"""Our names of the columns that ``data.columns`` may name and that a row may leave out."""
_LISTS = {"tools", "documents"}
_OF_MESSAGES = "messages."  # begins the names of the keys of messages that a chat template uses
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
_LATER_PAIRS = (("prompt", "response"), ("question", "response"), ("input", "output"))
_CONVERSATIONS = ("conversations", "conversation", "dialog", "dialogue")
_PROMPTS = ("prompt", "question", "instruction", "query", "input")  # of rows with a preferred answer
_SYSTEM = ("system", "system_prompt")

Variables = Mapping[str, Any]
"""Values that a row gives to the chat template beside its messages, such as ``tools``."""


@dataclass(frozen=True)
class Columns:
    """Columns of a row that hold the parts of an example.

    ``names`` maps our names to the file's: ``query``, ``response`` and perhaps ``input``, ``history`` and ``reasoning``
    for a pair, ``messages`` or ``chosen`` (perhaps after a ``query``) for a conversation, ``input_ids`` and perhaps
    ``labels`` for tokens; perhaps ``system`` and ``tools``. ``wanted`` are the further names that the chat template
    uses, and the keys of messages that it uses, as ``messages.<key>``.
    """

    kind: Kind
    names: Mapping[str, str]
    wanted: frozenset[str] = frozenset()
    unused: set[str] = field(default_factory=set)
    """Columns that a row had so far, with a value, and that are not used, and keys of messages, as
    ``messages.<key>``."""
    anew: set[str] = field(default_factory=set)
    """Parts of the rows so far that earlier versions read in another way, or not at all."""
    absent: set[str] = field(default_factory=set)
    """Columns that may be left out of a row and that no row had so far, although ``data.columns`` names them."""

    @property
    def prefers(self) -> bool:
        """Whether the rows have a preferred answer, which is trained on, and another, which is not."""
        return "chosen" in self.names

    def extract(self, row: Row, where: str) -> Any:
        """Return the parts of one row, checked.

        Args:
            row: column name -> value.
            where: the row's place ("FILE:LINE"), for messages.
        Returns:
            ``(query, response)``, a list of messages (also of a pair that has more than these two texts), or
            ``(input_ids, labels or None)``.
        Raises:
            UserError: a column is missing, its value is of the wrong type, or nobody could have had this conversation.
        """
        if self.kind == "tokens":
            if "labels" in row and "labels" not in self.names:
                raise UserError(
                    f"{where}: this row has `labels`, but the first row has none; give `labels` to all rows or to none",
                    key="data.dataset",
                )
            labels = _value(row, "labels", list, where) if "labels" in self.names else None
            return _value(row, "input_ids", list, where), labels
        messages = self._preferred(row, where) if self.prefers else self._conversation(row, where)
        if isinstance(messages, tuple):
            return messages
        check_turns(messages, where)
        messages = self._with_system(messages, row, where)
        unread = unread_keys(messages, self._read)
        if "tool_calls" in unread:
            raise UserError(
                f"{where}: the assistant calls a tool, and the template does not know `tool_calls`, so it would write "
                "nothing. Take data.template: chat and a model whose chat template knows them, or remove this row",
                key="data.template",
            )
        self._note(_OF_MESSAGES + key for key in unread)
        return messages

    @cached_property
    def _read(self) -> frozenset[str]:
        """Keys of messages that the chat template uses."""
        return frozenset(name.removeprefix(_OF_MESSAGES) for name in self.wanted if name.startswith(_OF_MESSAGES))

    def _conversation(self, row: Row, where: str) -> list[Message] | tuple[str, str]:
        if self.kind == "messages":
            return self._messages(row, where)
        answer = _present(row, self.names["response"], where)
        thoughts = self._optional("reasoning", row) if self._uses_reasoning else None
        before = self._before(row, where)
        if isinstance(answer, list):
            return before + read_messages(answer, self.names["response"], where)
        response = text_in(row, self.names["response"], where)
        query = before[-1]["content"]
        if len(before) == 1 and isinstance(query, str) and not thoughts and not self._optional("system", row):
            return query, response
        made: Message = {"role": "assistant", "content": response}
        if thoughts:
            made["reasoning_content"] = text_in(row, self.names["reasoning"], where)
            self.anew.add("reasoning")
        return [*before, made]

    def _messages(self, row: Row, where: str) -> list[Message]:
        value = _present(row, self.names["messages"], where)
        made = read_messages(value, self.names["messages"], where)
        if "messages" not in self.anew and not is_as_written(made, value):
            self.anew.add("messages")
        return made

    def _preferred(self, row: Row, where: str) -> list[Message]:
        """Return a conversation whose last answer is the preferred one, or is part of it already."""
        before: list[Message] = []
        if "messages" in self.names:
            before = self._messages(row, where)
            if before[-1]["role"] == "assistant":
                return before
            before = read_prompt(row[self.names["messages"]], self.names["messages"], where)
        elif "query" in self.names:
            before = self._before(row, where)
        answer = read_chosen(_present(row, self.names["chosen"], where), self.names["chosen"], where)
        return before + answer if answer[0]["role"] == "assistant" else answer

    def _before(self, row: Row, where: str) -> list[Message]:
        """Return the messages before the answer: those of the history, and the query with its input."""
        name = self.names["query"]
        value = _present(row, name, where)
        if isinstance(value, list) or (self.prefers and isinstance(value, str)):
            made = read_prompt(value, name, where)
        else:
            made = said(text_in(row, name, where), "")[:1]
        if self._optional("input", row) and isinstance(query := made[-1]["content"], str):  # Alpaca's optional context
            made[-1]["content"] = f"{query}\n\n{text_in(row, self.names['input'], where)}"
        if history := read_history(self._optional("history", row), self.names.get("history", ""), where):
            self.anew.add("history")
        return history + made

    def _with_system(self, messages: list[Message], row: Row, where: str) -> list[Message]:
        if not self._optional("system", row):
            return messages
        name = self.names["system"]
        text = text_in(row, name, where)
        if messages[0]["role"] not in ("system", "developer"):
            self.anew.add("system")
            return [{"role": "system", "content": text}, *messages]
        if text_of(messages[0]["content"]) == text:
            return messages
        raise UserError(
            f"{where}: column {name!r} has a system prompt, and the conversation has another. Correct the row, or "
            "leave the column out by naming those to use: data.columns: {messages: <column>}",
            key="data.columns",
        )

    def _optional(self, name: str, row: Row) -> object:
        """Return the value of a column that a row may leave out, None if it does."""
        return row.get(self.names[name]) if name in self.names else None

    @cached_property
    def _uses_reasoning(self) -> bool:
        return "reasoning" in self.names and not unread_keys(
            [{"role": "assistant", "reasoning_content": "."}], self._read
        )

    def variables(self, row: Row, where: str) -> Variables:
        """Return what one row gives to the chat template beside its messages, and note the columns that are not used.

        Raises:
            UserError: the tools or documents are not what a template can take.
        """
        left_out = {"tools", "rejected"} if self._uses_reasoning else {"tools", "rejected", "reasoning"}
        used, values = {self.names[name] for name in self.names.keys() - left_out}, dict[str, Any]()
        for name in filter(lambda name: not name.startswith(_OF_MESSAGES), self.wanted):
            column = self._column_of(name, row)
            if row.get(column) is not None and not (name == "tools" and self._lists_tools(row)):
                values[name] = listed_objects(row[column], column, where) if name in _LISTS else row[column]
                used.add(column)
                self.anew.update(["tools"] if column == "tools" and has_bare_functions(row[column]) else [])
        if isinstance(more := row.get("chat_template_kwargs"), Mapping):
            values |= {name: value for name, value in more.items() if name in self.wanted}
            used |= {"chat_template_kwargs"} if more.keys() <= self.wanted else set()
        rejected = self.names.get("rejected", "rejected") if self.prefers else None
        for name, value in row.items():
            if name == rejected and value is not None:
                self._note([f"{name} (the chosen answers are trained on)"])
            elif name not in used and value is not None:
                self._note([str(name)])
        self.absent.difference_update(row)
        return {name: without_nulls(value) for name, value in values.items() if name not in _LISTS or value}

    def _column_of(self, name: str, row: Row) -> str:
        if name != "tools":
            return name
        return self.names.get("tools") or ("tools" if row.get("tools") or "functions" not in row else "functions")

    def _lists_tools(self, row: Row) -> bool:
        """Whether the system prompt lists the tools already, as in the rows that Hermes was trained on, so that the
        template must not do it again."""
        first = self._optional("messages", row)
        first = first[0] if isinstance(first, list) and first else None
        texts = [self._optional("system", row), *(first.values() if isinstance(first, Mapping) else ())]
        found = "user" not in texts and any(isinstance(text, str) and "<tools>" in text for text in texts)
        self.anew.update(["tools"] if found else [])
        return found

    def _note(self, names: Iterable[str]) -> None:
        for name in names:
            if len(self.unused) < _MOST_UNUSED:
                self.unused.add(name[:_LONGEST_NAME])


def find_columns(row: Row, where: str, configured: Mapping[str, str] | None, wanted: Iterable[str] = ()) -> Columns:
    """Find the columns of a dataset from its first row.

    Args:
        row: the first row; ``where`` is its place, for messages.
        configured: ``data.columns`` (our names -> the file's), or None to recognise the usual names, which
            docs/OWN_DATA.md lists.
        wanted: names of columns that the chat template uses, apart from the messages, and ``messages.<key>`` for the
            keys of messages that it uses.
    Raises:
        UserError: a configured column is missing, or nothing is recognised.
    """
    names = frozenset(wanted)
    if configured is not None:
        chosen = {ALIASES.get(key, key): column for key, column in configured.items()}
        for key in chosen.keys() - OPTIONAL:
            _present(row, chosen[key], where)
        absent = {chosen[key] for key in chosen.keys() & OPTIONAL}
        return Columns("messages" if {"messages", "chosen"} & chosen.keys() else "pair", chosen, names, absent=absent)
    if "input_ids" in row:
        return Columns("tokens", {name: name for name in ("input_ids", "labels") if name in row})
    if found := _recognised(row):
        optional = {"system": _first(row, _SYSTEM), "history": "history", "reasoning": _first(row, REASONING)}
        optional = optional if "query" in found else {"system": optional["system"]}
        anew = {"context"} & set(found.values())
        return Columns("pair" if "response" in found else "messages", found | optional, names, anew=anew)
    known = ", ".join("/".join(pair) for pair in (*_PAIRS, *_LATER_PAIRS))
    raise UserError(
        f"{where}: there are no known columns among {listed(row)}; known are input_ids, messages, conversations, "
        f"chosen/rejected, {known}. Say which to use with data.columns: {{query: <column>, response: <column>}}, or "
        "{messages: <column>}"
        + ("; or set task: classification, for texts and their labels" if "label" in row else "")
        + ("; a text without an answer is no conversation" if "text" in row else ""),
        key="data.columns",
    )


def _recognised(row: Row) -> dict[str, str]:
    """Return our names of the columns of a row whose names are usual; none if they are not."""
    prefers = {name: name for name in ("chosen", "rejected")} if row.keys() >= {"chosen", "rejected"} else {}
    if "messages" in row:
        return {"messages": "messages"} | prefers
    for query, response in _PAIRS:
        if query in row and response in row:
            found = {"query": query, "response": response}
            context = "context" if "context" in row and "input" not in row else "input"  # Dolly's, or Alpaca's
            return found | {"input": context} if query == "instruction" else found
    conversation = next((name for name in _CONVERSATIONS if _is_list(row.get(name))), None)
    if conversation:
        return {"messages": conversation} | prefers
    if prefers:
        query = next((name for name in _PROMPTS if name in row), "")
        return prefers | ({"query": query} if query else {}) | ({"input": "input"} if query == "instruction" else {})
    for query, response in _LATER_PAIRS:
        if query in row and response in row:
            return {"query": query, "response": response}
    return {}


def _first(row: Row, names: Iterable[str]) -> str:
    *_, default = reversed(tuple(names))
    return next((name for name in names if name in row), default)


def _is_list(value: object) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("[{"))


def listed(row: Row) -> str:
    """Return the names of a row's columns, for a message."""
    return some([str(name)[:_LONGEST_NAME] for name in row], 50) or "(none)"


def _present(row: Row, name: str, where: str) -> object:
    """Return what is in a column, which must be there."""
    if name not in row:
        raise UserError(
            f"{where}: there is no column {name!r}; this row has {listed(row)}. Correct the file, or name the right "
            "columns in data.columns",
            key="data.columns",
        )
    return row[name]


def text_in(row: Row, name: str, where: str) -> str:
    """Return the text in a column. Raises ``UserError`` if there is none."""
    text: str = _value(row, name, str, where)
    return text


def _value(row: Row, name: str, wanted: type[str] | type[list[object]], where: str) -> Any:
    value = _present(row, name, where)
    if isinstance(value, wanted):
        if isinstance(value, str):
            check_unicode(value, name, where)
        return value
    kind = "text" if wanted is str else "a list"
    raise refused(f"{where}: column {name!r} must be {kind}, got {kind_of(value)}")
