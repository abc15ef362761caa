"""What a server sees of a conversation, by transformers' own ``apply_chat_template``, compared with examples."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers.utils import chat_template_utils

from rasa_train.data.config import DataConfig
from rasa_train.data.encode import Encoded, Encoder, Example

Run = tuple[list[int], list[int]]  # the tokens before, and those that are trained


@contextmanager
def on_the_day() -> Iterator[None]:
    """The clock of the templates stands at the date that stands for today's."""

    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Day:
            return cls(2024, 7, 26)

    kept, chat_template_utils.datetime = chat_template_utils.datetime, Day
    try:
        yield
    finally:
        chat_template_utils.datetime = kept


def encoded(tokenizer: Any, messages: Sequence[Any], variables: Any = None, **options: Any) -> Encoded:
    """Encode one conversation."""
    config = DataConfig(**({"dataset": "x", "template": "chat"} | options))
    return Encoder(config, tokenizer, "messages").encode([("f:1", list(messages), variables or {})])


def prompt_ids(tokenizer: Any, messages: Sequence[Any], variables: Any = None) -> list[int]:
    """Tokens of the prompt that a server makes of these messages."""
    return whole_ids(tokenizer, messages, {"add_generation_prompt": True, **(variables or {})})


def whole_ids(tokenizer: Any, messages: Sequence[Any], variables: Any = None) -> list[int]:
    """Tokens of the messages without a prompt for another one. Where a template takes the arguments of a tool call as
    JSON text, the client gives it."""
    given = [{key: value for key, value in message.items() if key != "trained"} for message in messages]
    with on_the_day():
        try:
            made = tokenizer.apply_chat_template(given, tokenize=True, return_dict=False, **(variables or {}))
        except TypeError:
            given = [_with_text(message) for message in given]
            made = tokenizer.apply_chat_template(given, tokenize=True, return_dict=False, **(variables or {}))
    return list(made)


def runs(example: Example) -> list[Run]:
    """The runs of trained tokens, each with all the tokens before it."""
    ids, trained = example.input_ids.tolist(), (example.labels != -100).tolist()
    starts = [i for i, hit in enumerate(trained) if hit and not (i and trained[i - 1])]
    ends = [i + 1 for i, hit in enumerate(trained) if hit and not (i + 1 < len(trained) and trained[i + 1])]
    return [(ids[:start], ids[start:end]) for start, end in zip(starts, ends, strict=True)]


def verify(tokenizer: Any, messages: Sequence[Any], variables: Any, examples: Sequence[Example]) -> None:
    """Assert that each turn of the assistant is trained once, behind the tokens of its prompt, and that the trained
    tokens are those that the template writes for it, where it writes the prompt before them."""
    left = [run for example in examples for run in runs(example)]
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or not message.get("trained", True):
            continue
        prompt = prompt_ids(tokenizer, messages[:i], variables)
        found = [run for run in left if run[0] == prompt]
        assert len(found) == 1, (tokenizer.decode(prompt), [tokenizer.decode(run[0]) for run in left])
        left.remove(found[0])
        text, before = (tokenizer.decode(ids) for ids in (whole_ids(tokenizer, messages[: i + 1], variables), prompt))
        if text.startswith(before):
            answer = tokenizer.decode(found[0][1])
            rest = text[len(before) :].removeprefix(answer)
            assert text[len(before) :].startswith(answer)
            assert not rest.strip() or (rest.strip() in tokenizer.all_special_tokens and answer.endswith("|>")), rest
    assert not left


def _with_text(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    functions = [{**function, "arguments": json.dumps(function["arguments"])} for function in functions]
    return {**message, "tool_calls": [{"type": "function", "id": "call12345", "function": f} for f in functions]}
