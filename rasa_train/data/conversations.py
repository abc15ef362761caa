"""Conversations as people write them down: any known form becomes the messages that a chat template takes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from ..errors import UserError
from .row_values import check_unicode, json_value, kind_of, refused, without_nulls

ROLES = {
    "system": ("system", "system_prompt"),
    "developer": ("developer",),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot", "ai", "model", "chatbot", "bard", "bing"),
    "tool": ("tool", "function", "observation", "tool_response", "function_response", "tool_result", "ipython"),
    "call": ("function_call", "tool_call"),
}
"""Role -> the names that files have for it. The text of a ``call`` is the JSON of what the assistant calls."""
_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
_OWN = tuple(role for role in ROLES if role != "call")
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of what the assistant thinks before it answers, in messages, rows and templates. The first is ours."""
_TRAINED = ("trained", "weight", "train", "training", "trainable", "loss", "loss_weight")
_PAIRS = (("human", "assistant"), ("user", "assistant"), ("input", "output"), ("query", "response"))
_NO_CONTENT = {"role", "content", "trained", "tool_call_id"}
"""Keys of a message that are no loss if the template does not read them."""
_TRANSCRIPT = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant):[ \t]*")


class Message(TypedDict):
    """A message of a conversation, which goes to the chat template with all its keys but ``trained``.

    What the assistant thinks has the key ``reasoning_content``. ``trained`` is False if the message is not to be
    trained on, and absent otherwise.
    """

    role: str
    content: NotRequired[object]
    tool_calls: NotRequired[object]
    reasoning_content: NotRequired[str]
    trained: NotRequired[bool]


def read_messages(value: object, name: str, where: str) -> list[Message]:
    """Return the messages of a conversation, in the one form that chat templates take.

    Args:
        value: the list, or its JSON text. Its items are messages (``role`` or ``from``; ``content`` or ``value``), or
            turns of two texts (``{human, assistant}``, ``{input, output}``, perhaps with ``system``).
        name: the column, and ``where`` the row's place ("FILE:LINE"), for messages.
    Raises:
        UserError: an item is not of a known form, has an unknown role, or nothing to say.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = json_value(value)
    if not isinstance(value, list):
        raise refused(f"{where}: column {name!r} must be a list, got {kind_of(value)}")
    if not value:
        raise UserError(f"{where}: column {name!r} is an empty conversation; remove this row", key="data.dataset")
    made: list[Message] = []
    for i, item in enumerate(value):
        if isinstance(item, dict) and len(item) == 2 and item.get("role") in _OWN and type(item.get("content")) is str:
            check_unicode(item["content"], f"{name}[{i}].content", where)  # most messages are as they should be
            made.append({"role": item["role"], "content": item["content"]})
        else:
            made += _turn(item, f"{name}[{i}]", where) or [_message(item, f"{name}[{i}]", where)]
    return made


def read_history(value: object, name: str, where: str) -> list[Message]:
    """Return the earlier turns of a row: a list of [query, response], or of messages. Raises ``UserError`` as
    ``read_messages``."""
    if not value:
        return []
    items = json_value(value) if isinstance(value, str) else value
    if not isinstance(items, list):
        raise UserError(
            f"{where}: column {name!r} must be a list of [query, response], got {kind_of(value)}; correct or remove "
            "this row, or leave the column out by naming those to use in data.columns",
            key="data.dataset",
        )
    made: list[Message] = []
    for i, item in enumerate(items):
        place = f"{name}[{i}]"
        if not isinstance(item, list | tuple):
            made += _turn(item, place, where) or [_message(item, place, where)]
            continue
        if len(item) != 2 or not all(isinstance(text, str) for text in item):
            raise refused(f"{where}: {place} must be [query, response], two texts, got {kind_of(item)}")
        made += said(*item)
    return made


def read_chosen(value: object, name: str, where: str) -> list[Message]:
    """Return the answer that a row prefers, as messages: a text is one message of the assistant, or a whole transcript
    (``Human: ... Assistant: ...``). Raises ``UserError`` as ``read_messages``."""
    if isinstance(value, Mapping):
        return [_message(value, name, where)]
    if not isinstance(value, str) or value.lstrip().startswith("[{"):
        return read_messages(value, name, where)
    check_unicode(value, name, where)
    return _transcript(value) or [{"role": "assistant", "content": value}]


def read_prompt(value: object, name: str, where: str) -> list[Message]:
    """Return what comes before an answer, as messages that are not trained on: a text is one message of the user, or a
    transcript. Raises ``UserError`` as ``read_messages``."""
    if isinstance(value, str) and not value.lstrip().startswith("[{"):
        check_unicode(value, name, where)
        made = _transcript(value) or [{"role": "user", "content": value}]
        made = made[:-1] if made[-1] == {"role": "assistant", "content": ""} else made
    else:
        made = read_messages(value, name, where)
    return [{**message, "trained": False} if message["role"] == "assistant" else message for message in made]


def _transcript(text: str) -> list[Message]:
    """Return the messages of a transcript that begins with ``Human:``, none of any other text."""
    if not text.lstrip().startswith("Human:"):
        return []
    parts = _TRANSCRIPT.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": text.strip()} for who, text in zip(parts[::2], parts[1::2], strict=True)]


def said(query: str, response: str) -> list[Message]:
    """Return a query and its response as two messages."""
    return [{"role": "user", "content": query}, {"role": "assistant", "content": response}]


def check_turns(messages: Sequence[Message], where: str) -> None:
    """Refuse a conversation that no one could have had, or of which nothing is trained on.

    System and developer messages come first, then the user speaks; a user speaks once before an answer; a tool's
    results, of which several may follow one another, come after the assistant's call. The assistant may speak several
    times in a row, as agents do between their calls.

    Raises:
        UserError: the messages are in another order, the last is not the assistant's, or none of its is trained on.
    """
    before = "system"
    for number, message in enumerate(messages, 1):
        role, wrong = message["role"], ""
        if role in ("system", "developer"):
            wrong = "" if before == "system" else f"a {role} message, must come before the user's first message"
        elif role == "user" and before == "user":
            wrong = "the user's, follows another message of the user: join the two"
        elif role == "assistant" and before == "system":
            wrong = (
                "the assistant's, has nothing to answer: a conversation starts with the user, after any system message"
            )
        elif role == "tool" and before not in ("assistant", "tool"):
            wrong = "a tool's, must follow the assistant's call or another result"
        if wrong:
            raise refused(f"{where}: message {number} of the conversation, {wrong}")
        before = "system" if role == "developer" else role
    if before != "assistant":
        raise refused(
            f"{where}: the conversation ends with a message of the {messages[-1]['role']}, so there is no answer to "
            "train on; end it with the assistant's message"
        )
    if all(message.get("trained") is False for message in messages if message["role"] == "assistant"):
        raise refused(f"{where}: none of the assistant's messages is trained on (their weight is 0)")


def unread_keys(messages: Iterable[Message], read: frozenset[str]) -> set[str]:
    """Return the keys of messages that have something to say and that the chat template does not read.

    Args:
        read: the keys that it reads; ``*`` stands for all.
    """
    if "*" in read:
        return set()
    known = _NO_CONTENT | read | (set(REASONING) if read & set(REASONING) else set())
    return {key for message in messages for key, value in message.items() if key not in known and value}


def is_as_written(made: Sequence[Message], value: object) -> bool:
    """Whether messages are those of a column as they stand there, apart from nulls and the form of their content."""
    items = value if isinstance(value, list) else []
    return len(made) == len(items) and all(
        message["role"] != "developer"
        and "trained" not in message
        and (message == item or _kept(message) == _kept(item))
        for message, item in zip(made, items, strict=True)
    )


def _kept(message: Any) -> dict[str, Any]:
    kept = {key: value for key, value in without_nulls(message).items() if value and key not in ("content", *_TRAINED)}
    calls = kept.get("tool_calls")
    return kept | ({"tool_calls": json_value(calls)} if isinstance(calls, str) else {})


def _turn(item: object, name: str, where: str) -> list[Message]:
    """Return the messages of a turn that is an object of two texts, none if it is something else."""
    if not isinstance(item, Mapping) or item.get("role") is not None or item.get("from") is not None:
        return []
    for query, response in _PAIRS:
        if query in item and response in item:
            made = said(*(_text(item[key], f"{name}.{key}", where) for key in (query, response)))
            system: list[Message] = []
            if item.get("system"):
                system = [{"role": "system", "content": _text(item["system"], f"{name}.system", where)}]
            return system + made
    return []


def _text(value: object, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise refused(f"{where}: {name} must be text, got {kind_of(value)}")
    check_unicode(value, name, where)
    return value


def _message(item: object, name: str, where: str) -> Message:
    """Return a message without nulls, whose content is text, a list of parts that are text, or None for a tool call."""
    fields: dict[str, Any] = without_nulls(item) if isinstance(item, Mapping) else {}
    for ours, other in (("role", "from"), ("content", "value")):
        if ours not in fields and other in fields:
            fields[ours] = fields.pop(other)
    if not isinstance(fields.get("role"), str):
        raise UserError(
            f"{where}: {name} must be an object with a text `role` and a `content` (or `from` and `value`), got "
            f"{kind_of(item)}; correct or remove this row",
            key="data.dataset",
        )
    role = _ROLE_OF.get(fields["role"].strip().lower(), "")
    if not role:
        raise UserError(
            f"{where}: {name} has the unknown role {kind_of(fields['role'])}; known are "
            f"{', '.join(_ROLE_OF)}. Rename the role, or remove this row",
            key="data.dataset",
        )
    if role == "call":
        fields |= {"tool_calls": fields.get("tool_calls", fields.get("content")), "content": None}
        role = "assistant"
    fields["role"] = role
    _read_trained(fields, name, where)
    _read_calls(fields, name, where)
    _read_reasoning(fields, name, where)
    fields["content"] = _content(fields, name, where)
    made: Message = fields  # type: ignore[assignment]
    return made


def _content(fields: dict[str, Any], name: str, where: str) -> object:
    content, role = fields.get("content"), fields["role"]
    if role == "tool" and not isinstance(content, str | None) and not _has_parts(content):
        try:
            content = json.dumps(content, ensure_ascii=False)
        except TypeError:  # bytes or a date of a Parquet file
            raise refused(f"{where}: the content of {name} must be text or JSON, got {kind_of(content)}") from None
    if isinstance(content, str):
        check_unicode(content, f"{name}.content", where)
        return content
    if isinstance(content, list) and content:
        return [_part(part, f"{name}.content[{i}]", where) for i, part in enumerate(content)]
    if not content and role == "assistant" and fields.get("tool_calls"):
        return None
    got = kind_of(content) if "content" in fields else "null or none"
    wanted = "text or a list of text parts" + (", or tool calls instead" if role == "assistant" else "")
    raise refused(f"{where}: the content of {name} (role {role}) must be {wanted}, got {got}")


def _read_trained(fields: dict[str, Any], name: str, where: str) -> None:
    """Replace the spellings of "not trained on" in an assistant's message by ``trained: False``.

    No other message is trained on, so what says so is left out there; what says the contrary stays, and is named among
    the keys that are not used.
    """
    said_so = {key: fields.pop(key) for key in _TRAINED if key in fields}
    for key, value in said_so.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise UserError(
                f"{where}: {name}.{key} must be 1 or true (the message is trained on), or 0 or false (it is not), got "
                f"{kind_of(value)}; there are no weights in between. Correct or remove this row",
                key="data.dataset",
            )
    if len({bool(value) for value in said_so.values()}) > 1:
        raise refused(f"{where}: {' and '.join(f'{name}.{key}' for key in said_so)} contradict each other")
    if fields["role"] != "assistant":
        fields |= {key: value for key, value in said_so.items() if value and key != "trained"}
    elif said_so and not any(said_so.values()):
        fields["trained"] = False


def _read_calls(fields: dict[str, Any], name: str, where: str) -> None:
    """Replace tool calls of any form, and OpenAI's former ``function_call``, by objects with a ``function`` each."""
    for key in ("function_call", "tool_calls"):
        if key not in fields:
            continue
        value = fields.pop(key)
        if value in (None, "", [], {}):
            continue
        if fields["role"] != "assistant":
            raise refused(f"{where}: {name} (role {fields['role']}) has {key}; only the assistant calls tools")
        calls = json_value(value) if isinstance(value, str) else value
        calls = calls if isinstance(calls, list) else [value]
        fields["tool_calls"] = [_call(call, f"{name}.{key}", where) for call in calls]


def _call(given: object, name: str, where: str) -> dict[str, Any]:
    call: Any = json_value(given) if isinstance(given, str) else given
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise refused(
            f"{where}: {name} must be calls of tools, objects with a `name` and `arguments` (or the JSON text of such "
            f"objects), got {kind_of(given)}"
        )
    made = {key: value for key, value in function.items() if key != "parameters"}
    arguments = function.get("arguments", function.get("parameters")) or {}
    if not isinstance(json_value(arguments) if isinstance(arguments, str) else arguments, Mapping):
        raise refused(
            f"{where}: the arguments of {name} must be an object, or the JSON text of one, got {kind_of(arguments)}"
        )
    around = {key: value for key, value in call.items() if key != "function"} if function is not call else {}
    return {"type": "function", **around, "function": made | {"arguments": arguments}}


def _read_reasoning(fields: dict[str, Any], name: str, where: str) -> None:
    """Replace the spellings of what the assistant thinks, parts of its content included, by ``reasoning_content``."""
    if fields["role"] != "assistant":
        return
    thoughts = {key: fields.pop(key) for key in REASONING if key in fields}
    if isinstance(content := fields.get("content"), list):
        is_thought = [isinstance(part, Mapping) and part.get("type") in REASONING for part in content]
        texts = [
            part.get(part["type"], part.get("text")) for part, is_one in zip(content, is_thought, strict=True) if is_one
        ]
        if texts:
            thoughts["content"] = "".join(_text(text, f"{name}.content", where) for text in texts)
            rest = [part for part, is_one in zip(content, is_thought, strict=True) if not is_one]
            fields["content"] = rest or None
    texts = [_text(value, f"{name}.{key}", where) for key, value in thoughts.items() if value]
    if len(set(texts)) > 1:
        raise refused(f"{where}: {name} has several different thoughts, in {' and '.join(thoughts)}; keep one")
    if texts:
        fields["reasoning_content"] = texts[0]


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
    check_unicode(text, name, where)
    return {"type": "text", "text": text}


def text_of(content: object) -> Any:
    """Return the text of a message's content: that of its parts, one after the other, if it is a list of them."""
    return "".join(part["text"] for part in content) if isinstance(content, list) else content
