"""The tokenizer's chat template: which columns of a row it uses, the form of the messages it takes, and its text."""

from __future__ import annotations

import inspect
import itertools
import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from ..errors import UserError
from .columns import Message, Variables, text_of

DATE = datetime(2024, 7, 26)
"""The date that a template prints instead of today's, so that the tokens do not depend on the day on which they are
made: the one that Llama's own templates print where there is no clock."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKS = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
_NOW = re.compile(
    r"""\bstrftime_now\(\s*(?:format\s*=\s*)?(?P<quote>['"])(?P<format>(?:(?!(?P=quote))[^\\])*)(?P=quote)\s*\)"""
)
_PROBE = "quokka"
Span = tuple[int, int]  # characters [start, end)


class ChatTemplate:
    """The chat template of a tokenizer.

    What the template can take is found by trying it: whether the content of a message is text or a list of parts,
    whether the arguments of a tool call are an object or JSON text, and whether a tool call may have no content.

    Raises:
        UserError: the tokenizer has no chat template, or the template asks for the date in an unknown way.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                "data.template: chat, but the model's tokenizer has no chat template; use template: alpaca or plain, "
                "or a model with a chat template",
                key="data.template",
            )
        self._tokenizer = tokenizer
        try:
            sources = [tokenizer.get_chat_template(tools=tools) for tools in (None, [dict[str, Any]()])]
        except ValueError as error:  # several templates, and none of them is the default
            raise UserError(f"the tokenizer's chat template: {error}", key="data.template") from None
        self.prints_the_date = any(re.search(r"\bstrftime_now\s*\(", source) for source in sources)
        self._sources = [_with_fixed_date(source) for source in sources]
        taken = inspect.signature(tokenizer.apply_chat_template).parameters.keys() | tokenizer.special_tokens_map.keys()
        self.names = frozenset().union(*map(_names, self._sources)) - (taken - {"tools", "documents"})
        """Names of the columns that the template uses, apart from the messages."""
        text, parts = self._try(_PROBE), self._try([{"type": "text", "text": _PROBE}])
        self._takes_text = _PROBE in text or _PROBE not in parts
        self._takes_parts = _PROBE in parts and (parts == text or not self._takes_text)
        forms = itertools.product((True, False), (None, ""))
        self._takes_objects, self._no_content = next(filter(self._takes_call, forms), (True, None))

    def marks_turns(self, variables: Variables) -> bool:
        """Whether the template delimits what the assistant writes by {% generation %} marks."""
        return bool(_GENERATION.search(self._source(variables)))

    def render(
        self, messages: list[Message], variables: Variables, where: str, *, tokenize: bool = False, **options: Any
    ) -> Any:
        """Return the text of a conversation, or its tokens.

        Args:
            messages: as ``Columns.extract`` returns them.
            variables: columns of the row that the template uses.
            where: place of the row, for messages.
            options: further options of ``apply_chat_template``.
        Raises:
            UserError: the template refuses the conversation.
        """
        try:
            fitting = [self._fitting(message) for message in messages]
            made = self._apply(fitting, variables, tokenize=tokenize, **options)
            if isinstance(made, str):
                made.encode()  # half a surrogate pair in a tool is not a character for any tokenizer
            return made
        except Exception as error:  # a template may raise anything: an error of its own, or of a missing key
            raise UserError(
                f"{where}: the tokenizer's chat template refuses this conversation: {error}", key="data.dataset"
            ) from error

    def turns(self, messages: list[Message], variables: Variables, text: str, where: str) -> list[Span]:
        """Return the characters of the assistant's turns in ``text``: each from the end of the text before (with the
        header that asks for an answer) to the end of the turn. This is right only if each of these texts is the
        beginning of the next.
        """
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:i], variables, where, add_generation_prompt=True) if i else ""
            upto = self.render(messages[: i + 1], variables, where)
            if not (upto.startswith(before) and text.startswith(upto)):
                raise UserError(
                    f"{where}: the tokenizer's chat template changes earlier turns around message {i}, so "
                    "the assistant's words cannot be told apart. Use a template with {% generation %} marks, "
                    "or set data.supervise: all",
                    key="data.template",
                )
            spans.append((len(before), len(upto)))
        return spans

    def _apply(self, messages: list[Any], variables: Variables, **options: Any) -> Any:
        source = self._source(variables)
        return self._tokenizer.apply_chat_template(messages, chat_template=source, **variables, **options)

    def _source(self, variables: Variables) -> str:
        return self._sources["tools" in variables]

    def _fitting(self, message: Message) -> Mapping[str, Any]:
        """Return the message in the form that the template takes."""
        content = message.get("content")
        changed: dict[str, Any] = {}
        if content is None:
            changed["content"] = self._no_content
        elif isinstance(content, list) and not self._takes_parts:
            changed["content"] = text_of(content)
        elif isinstance(content, str) and not self._takes_text:
            changed["content"] = [{"type": "text", "text": content}]
        if isinstance(calls := message.get("tool_calls"), list):
            changed["tool_calls"] = [self._fitting_call(call) for call in calls]
        return {**message, **changed}

    def _fitting_call(self, call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(function := call.get("function"), Mapping):
            return {**call, "function": self._fitting_call(function)}
        arguments = call.get("arguments")
        if isinstance(arguments, str) and self._takes_objects:
            try:
                value = json.loads(arguments)
            except ValueError:
                return call
            return {**call, "arguments": value} if isinstance(value, dict) else call
        if isinstance(arguments, dict) and not self._takes_objects:
            return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
        return call

    def _try(self, content: Any) -> str:
        """Return the text of two turns with this content, empty if the template refuses them."""
        return self._text([{"role": role, "content": content} for role in ("user", "assistant")])

    def _takes_call(self, form: tuple[bool, str | None]) -> bool:
        """Whether the template writes out a tool call whose arguments are an object (or else JSON text), with this
        content."""
        arguments = {_PROBE: 1} if form[0] else json.dumps({_PROBE: 1})
        call = {"type": "function", "id": "call12345", "function": {"name": "search", "arguments": arguments}}
        text = self._text(
            [
                {"role": "user", "content": "find"},
                {"role": "assistant", "content": form[1], "tool_calls": [call]},
                {"role": "tool", "name": "search", "tool_call_id": "call12345", "content": "found"},
                {"role": "assistant", "content": "done"},
            ]
        )
        return _PROBE in text and f"'{_PROBE}'" not in text and "None" not in text  # quotes and None are Python's

    def _text(self, messages: list[Any]) -> str:
        try:
            return str(self._apply(messages, {}, tokenize=False))
        except Exception:  # see ``render``
            return ""


def _with_fixed_date(source: str) -> str:
    """Return the template with ``DATE`` in place of today's date."""
    fixed = _NOW.sub(lambda found: json.dumps(DATE.strftime(found["format"])), source)
    if re.search(r"\bstrftime_now\s*\(", fixed):
        raise UserError(
            "the tokenizer's chat template prints today's date in a format that it computes, so each day would make "
            "other tokens; write the format into the template as text: strftime_now('%d %b %Y')",
            key="data.template",
        )
    return fixed


def _names(source: str) -> frozenset[str]:
    """Return the names that a template looks up in what it is given."""
    import jinja2
    import jinja2.meta

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        found = jinja2.meta.find_undeclared_variables(environment.parse(_MARKS.sub("", source)))
    except jinja2.TemplateError:  # each row says so
        return frozenset()
    known = {"messages", "strftime_now", "raise_exception", *environment.globals}
    return frozenset(found - known)
