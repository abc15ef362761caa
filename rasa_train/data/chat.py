"""The tokenizer's chat template: which columns of a row it uses, the form of the messages it takes, and its text."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from ..errors import UserError
from ..io.bounded import Child, Exceeded
from . import served_turns
from .columns import Message, Variables, text_of
from .config import DataConfig
from .conversations import REASONING
from .served_turns import Served, Span
from .template_names import names_used

DATE = datetime(2024, 7, 26)
"""The date that a template prints instead of today's, so that the tokens do not depend on the day on which they are
made: the one that Llama's own templates print where there is no clock."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_NOW = re.compile(
    r"""\bstrftime_now\(\s*(?:format\s*=\s*)?(?P<quote>['"])(?P<format>(?:(?!(?P=quote))[^\\])*)(?P=quote)\s*\)"""
)
_WRAPPED = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)  # in the text of Hermes' rows
_PROBE = "quokka"
_MEMORY, _SECONDS, _LONGEST = 512 << 20, 20, 32 << 20  # for one conversation; the last is in bytes of its text
_LONGEST_TEMPLATE = 1 << 20  # characters; those of published models have 30,000 or less
Conversation = tuple[str, list[Message], Variables]
"""Place of a row, its messages as ``Columns.extract`` returns them, and what it gives to the template beside."""


class ChatTemplate:
    """The chat template of a tokenizer.

    A template is a program of whoever made the model, so it runs in a child process whose memory and time are bounded.

    Raises:
        UserError: the tokenizer has no chat template, or the template asks for the date in an unknown way, or takes too
            much memory or time.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                "data.template: chat, but the model's tokenizer has no chat template; use template: alpaca or plain, "
                "or a model with a chat template",
                key="data.template",
            )
        self._tokenizer = tokenizer
        self._child: Child | None = None
        self.names: frozenset[str]
        """Names of the columns that the template uses, apart from the messages."""
        self.prints_the_date: bool
        self.ends: list[str]
        """Texts of the special tokens that end a turn of the assistant; none if no such token does."""
        try:
            [(self.names, self.prints_the_date, self.ends)] = self._ask(None)
        except Exceeded as error:
            raise _exceeded("", error) from None

    def render(self, conversations: Sequence[Conversation], config: DataConfig) -> Iterator[Served]:
        """Yield the texts of each conversation, as a server would see them.

        Raises:
            UserError: the template refuses a conversation, or takes too much memory or time for it.
        """
        try:
            yield from self._ask((conversations, config.supervise == "all", config.rewritten_history == "refuse"))
        except Exceeded as error:
            raise _exceeded(f"{conversations[error.done][0]}: ", error) from None

    def _ask(self, request: Any) -> Iterator[Any]:
        if self._child is None:
            self._child = Child(_Answers(self._tokenizer), memory=_MEMORY, seconds=_SECONDS, largest=_LONGEST)
        return self._child.ask(request)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_child": None}  # another process makes a child of its own


def _exceeded(where: str, error: Exceeded) -> UserError:
    what = {
        "memory": f"takes more than {_MEMORY >> 20:,} MiB of memory",
        "time": f"computes for more than {_SECONDS} s",
        "large": f"writes more than {_LONGEST >> 20} MiB of text",
    }[error.what]
    of = "this conversation" if where else "a conversation of two words"
    return UserError(
        f"{where}the tokenizer's chat template {what} for {of}; correct chat_template.jinja (or chat_template in "
        "tokenizer_config.json), name another tokenizer in model.tokenizer, or set data.template: alpaca",
        key="data.template",
    )


class _Answers:
    """What the child process answers: facts about the template, or the texts of conversations."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._template: _Template | None = None

    def __call__(self, request: tuple[Sequence[Conversation], bool, bool] | None) -> Iterator[Any]:
        template = self._template = self._template or _Template(self._tokenizer)
        if request is None:
            yield template.names, template.prints_the_date, template.ends
            return
        conversations, everything, refuse = request
        for where, messages, variables in conversations:
            conversation = served_turns.Conversation(template, messages, variables, where)
            yield conversation.everything() if everything else conversation.split(refuse=refuse)


class _Template:
    """The chat template itself.

    What the template can take is found by trying it: whether the content of a message is text or a list of parts,
    whether the arguments of a tool call are an object or JSON text, and whether a tool call may have no content.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        try:
            sources = [tokenizer.get_chat_template(tools=tools) for tools in (None, [dict[str, Any]()])]
        except ValueError as error:  # several templates, and none of them is the default
            raise UserError(f"the tokenizer's chat template: {error}", key="data.template") from None
        if max(map(len, sources)) > _LONGEST_TEMPLATE:
            raise UserError(
                f"the tokenizer's chat template has more than {_LONGEST_TEMPLATE:,} characters", key="data.template"
            )
        self.prints_the_date = any(re.search(r"\bstrftime_now\s*\(", source) for source in sources)
        self._sources = [_with_fixed_date(source) for source in sources]
        taken = inspect.signature(tokenizer.apply_chat_template).parameters.keys() | tokenizer.special_tokens_map.keys()
        self.names = frozenset().union(*map(names_used, self._sources)) - (taken - {"tools", "documents"})
        """Names of the columns that the template uses, apart from the messages, and ``messages.<key>`` for the keys of
        messages that it uses."""
        self._knows_developers = any("developer" in source for source in self._sources)
        self._wraps_results = any("<tool_response>" in source for source in self._sources)
        self._reasoning = next((key for key in REASONING if f"messages.{key}" in self.names), REASONING[0])
        text, parts = self._try(_PROBE), self._try([{"type": "text", "text": _PROBE}])
        self._takes_text = _PROBE in text or _PROBE not in parts
        self._takes_parts = _PROBE in parts and (parts == text or not self._takes_text)
        self.ends = _special_tokens(tokenizer, (text if self._takes_text else parts).rpartition(_PROBE)[2])
        """Texts of the special tokens that end a turn of the assistant; none if no such token does."""
        forms = itertools.product((True, False), (None, ""))
        self._takes_objects, self._no_content = next(filter(self._takes_call, forms), (True, None))

    def marks_turns(self, variables: Variables) -> bool:
        """Whether the template delimits what the assistant writes by {% generation %} marks."""
        return bool(_GENERATION.search(self._source(variables)))

    def render(self, messages: list[Message], variables: Variables, where: str, **options: Any) -> str:
        """Return the text of a conversation.

        Args:
            messages: as ``Columns.extract`` returns them.
            variables: columns of the row that the template uses.
            where: place of the row, for messages.
            options: further options of ``apply_chat_template``.
        Raises:
            UserError: the template refuses the conversation.
        """
        with _refusals(where):
            made = str(self._apply([self._fitting(message) for message in messages], variables, **options))
            made.encode()  # half a surrogate pair in a tool is not a character for any tokenizer
            return made

    def render_marked(self, messages: list[Message], variables: Variables, where: str) -> tuple[str, list[Span]]:
        """Return the text of a conversation, and the characters between the template's marks. Raises as ``render``."""
        from transformers.utils.chat_template_utils import render_jinja_template

        with _refusals(where):
            given = [{k: v for k, v in self._fitting(m).items() if v is not None} for m in messages]
            [text], [spans] = render_jinja_template(
                conversations=[given],
                chat_template=self._source(variables),
                return_assistant_tokens_mask=True,
                **{**self._tokenizer.special_tokens_map, **variables},
            )
            text.encode()
            return text, spans

    def _apply(self, messages: list[Any], variables: Variables, **options: Any) -> Any:
        source = self._source(variables)
        return self._tokenizer.apply_chat_template(
            messages, chat_template=source, tokenize=False, **variables, **options
        )

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
        if message["role"] == "developer" and not self._knows_developers:
            changed["role"] = "system"  # the former name
        if "reasoning_content" in message:
            changed[self._reasoning] = message["reasoning_content"]
        wrapped = self._wraps_results and message["role"] == "tool" and isinstance(content, str)
        if wrapped and (found := _WRAPPED.fullmatch(str(content))):
            changed["content"] = found[1] if self._takes_text else [{"type": "text", "text": found[1]}]
        return {key: value for key, value in {**message, **changed}.items() if key != "trained"}

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
            return str(self._apply(messages, {}))
        except MemoryError:
            raise
        except Exception:  # see ``_refusals``
            return ""


def _special_tokens(tokenizer: Any, text: str) -> list[str]:
    """Return the special tokens in a text, in order."""
    tokens = sorted({str(token) for token in tokenizer.added_tokens_decoder.values()} - {""}, key=len, reverse=True)
    return re.findall("|".join(map(re.escape, tokens)), text) if tokens else []


@contextlib.contextmanager
def _refusals(where: str) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # a template may raise anything: an error of its own, or of a missing key
        raise UserError(
            f"{where}: the tokenizer's chat template refuses this conversation: {str(error)[:1000]}", key="data.dataset"
        ) from error


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
