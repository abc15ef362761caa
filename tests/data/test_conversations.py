"""Rows of the forms that people have, made by hand in their shape, and what of them is trained on in templates of
well-known families. The text must be that of transformers for the conversation as OpenAI's interface has it."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_data import character_tokenizer, write_lines

from rasa_train.data.columns import Columns, find_columns
from rasa_train.data.config import DataConfig
from rasa_train.data.encode import Encoder
from rasa_train.data.prepare import prepare
from rasa_train.data.sources import find_source
from rasa_train.data.template_names import names_used
from rasa_train.errors import UserError

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}"
    "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def tool(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": text, **more}


def call(name: str, arguments: Any, number: str = "call00001") -> dict[str, Any]:
    return {"type": "function", "id": number, "function": {"name": name, "arguments": arguments}}


PARAMETERS = {"type": "object", "properties": {"port": {"type": "string"}}, "required": ["port"]}
TIDE = {"name": "tide", "description": "Time of high tide", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": TIDE}]
ASK = "When is high tide at Husum?"
HUSUM = {"port": "Husum"}
CALL_TEXT = '<tool_call>\n{"name": "tide", "arguments": {"port": "Husum"}}\n</tool_call>'
LISTED = f"You may call these functions: <tools>{json.dumps(TOOLS)}</tools>"

# name: (template, row, the conversation as OpenAI's interface has it, its tools, the texts that are trained on)
FORMS: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]], Any, list[str]]] = {
    "openai": (
        "qwen2_5",
        {
            "messages": [
                system("Be brief."),
                user(ASK),
                assistant(None, tool_calls=[call("tide", json.dumps(HUSUM))]),
                tool('{"time": "12:40"}', tool_call_id="call00001"),
                assistant("At 12:40.", weight=0),
                user("And then?"),
                assistant("At 0:55.", weight=1),
            ],
            "tools": TOOLS,
            "parallel_tool_calls": False,
        },
        [
            system("Be brief."),
            user(ASK),
            assistant("", tool_calls=[call("tide", HUSUM)]),
            tool('{"time": "12:40"}'),
            assistant("At 12:40."),
            user("And then?"),
            assistant("At 0:55."),
        ],
        TOOLS,
        [f"{CALL_TEXT}<|im_end|>", "At 0:55.<|im_end|>"],
    ),
    "hermes": (
        "qwen2_5",
        {
            "id": "7",
            "conversations": [
                {"from": "system", "value": LISTED},
                {"from": "human", "value": ASK},
                {"from": "gpt", "value": CALL_TEXT},
                {"from": "tool", "value": '<tool_response>\n{"time": "12:40"}\n</tool_response>'},
                {"from": "gpt", "value": "At 12:40."},
            ],
            "tools": json.dumps(TOOLS),
        },
        [system(LISTED), user(ASK), assistant(CALL_TEXT), tool('{"time": "12:40"}'), assistant("At 12:40.")],
        None,
        [f"{CALL_TEXT}<|im_end|>", "At 12:40.<|im_end|>"],
    ),
    "sharegpt": (
        "llama3_1",
        {
            "conversations": [
                {"from": "human", "value": ASK},
                {"from": "function_call", "value": json.dumps({"name": "tide", "arguments": HUSUM})},
                {"from": "observation", "value": "12:40"},
                {"from": "gpt", "value": "At 12:40."},
            ],
            "system": "Be brief.",
            "tools": json.dumps([TIDE]),
        },
        [system("Be brief."), user(ASK), assistant("", tool_calls=[call("tide", HUSUM)]), tool("12:40"),
         assistant("At 12:40.")],
        TOOLS,
        ['{"name": "tide", "parameters": {"port": "Husum"}}<|eot_id|>', "At 12:40.<|eot_id|>"],
    ),
    "llama-factory": (
        "qwen2_5",
        {
            "instruction": "And at Dover?",
            "input": "Today.",
            "output": "At 11:05.",
            "system": "Be brief.",
            "history": [[ASK, "At 12:40."], ["Thanks.", "You are welcome."]],
        },
        [system("Be brief."), user(ASK), assistant("At 12:40."), user("Thanks."), assistant("You are welcome."),
         user("And at Dover?\n\nToday."), assistant("At 11:05.")],
        None,
        ["At 12:40.<|im_end|>", "You are welcome.<|im_end|>", "At 11:05.<|im_end|>"],
    ),
    "alpaca": (
        "llama3",
        {"instruction": "Shorten.", "input": "The ferry leaves.", "output": "Ferry.", "text": None},
        [user("Shorten.\n\nThe ferry leaves."), assistant("Ferry.")],
        None,
        ["Ferry.<|eot_id|>"],
    ),
    "dolly": (
        "lfm2",
        {"instruction": "What leaves?", "context": "The ferry leaves.", "response": "The ferry.", "category": "qa"},
        [user("What leaves?\n\nThe ferry leaves."), assistant("The ferry.")],
        None,
        ["The ferry.<|im_end|>"],
    ),
    "preference": (
        "gemma",
        {
            "prompt": "What leaves?",
            "chosen": [user("What leaves?"), assistant("The ferry.")],
            "rejected": [user("What leaves?"), assistant("Nothing.")],
            "score_chosen": 8.5,
        },
        [user("What leaves?"), assistant("The ferry.")],
        None,
        ["The ferry.<end_of_turn>"],
    ),
    "thoughts": (
        "qwen3",
        {"messages": [user("2 + 2?"), assistant("4", reasoning="Two and two.")], "source": "x"},
        [user("2 + 2?"), assistant("4", reasoning_content="Two and two.")],
        None,
        ["<think>\nTwo and two.\n</think>\n\n4<|im_end|>"],
    ),
    "thoughts in the content": (
        "qwen2_5",
        {
            "system": "Think first.",
            "conversations": [
                {"from": "user", "value": "2 + 2?"},
                {"from": "assistant", "value": "<think>\nTwo and two.\n</think>\n\n4"},
            ],
        },
        [system("Think first."), user("2 + 2?"), assistant("<think>\nTwo and two.\n</think>\n\n4")],
        None,
        ["<think>\nTwo and two.\n</think>\n\n4<|im_end|>"],
    ),
    "thoughts of a query": (
        "gptoss",
        {"question": "2 + 2?", "reasoning_content": "Two and two.", "answer": "4"},
        [user("2 + 2?"), assistant("4", thinking="Two and two.")],
        None,
        ["<|channel|>analysis<|message|>Two and two.<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"],
    ),
}  # fmt: skip


@lru_cache
def encoder(template: str) -> tuple[Any, Encoder]:
    found = importlib.util.find_spec("trl")
    path = Path(found.origin or "").parent / "chat_templates" / f"{template}.jinja" if found else Path("none")
    if not path.is_file():
        pytest.skip("trl, which has the templates of models, is not installed")
    tokenizer = character_tokenizer(bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = path.read_text()
    return tokenizer, Encoder(DataConfig(dataset="x", template="chat"), tokenizer, "messages")


def examples(path: Path, template: str) -> tuple[list[str], list[list[str]], Columns]:
    """The texts of a file's examples, and of each the texts that are trained on."""
    tokenizer, encode = encoder(template)
    (where, row), *_ = find_source(str(path))[0].rows()
    columns = find_columns(row, where, None, encode.chat.names if encode.chat else ())
    encoded = encode.encode([(where, columns.extract(row, where), columns.variables(row, where))])
    texts, trained = [], []
    for example in encoded.examples:
        texts.append(tokenizer.decode(example.input_ids))
        runs = itertools.groupby(zip(example.labels, example.input_ids, strict=True), lambda pair: bool(pair[0] >= 0))
        trained.append([tokenizer.decode([token for _, token in run]).rstrip() for is_on, run in runs if is_on])
    return texts, trained, columns


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_every_form_train_the_right_text(tmp_path: Path, form: str) -> None:
    template, row, conversation, tools, trained = FORMS[form]
    given = {key: value for key, value in row.items() if value is not None}
    lines, table = write_lines(tmp_path / "rows.jsonl", [given]), tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([given]), table)
    found, spans, columns = examples(lines, template)
    expected = encoder(template)[0].apply_chat_template(conversation, tools=tools, tokenize=False)
    expected = re.sub(r"(?<=Current date: )[\d-]+", "2024-07-26", expected)  # today's
    assert [expected] == [text + expected.removeprefix(text) for text in found]  # the end may be cut after its token
    assert spans == [trained]
    assert examples(table, template)[:2] == (found, spans)
    unused = {
        "openai": ["parallel_tool_calls"],
        "hermes": ["id", "tools"],
        "dolly": ["category"],
        "preference": ["rejected (the chosen answers are trained on)", "score_chosen"],
        "thoughts": ["source"],
    }
    assert sorted(columns.unused) == unused.get(form, [])  # fmt: skip


PAIR = [user("q"), assistant("r")]


def extracted(row: dict[str, Any], wanted: Any = ("messages.tool_calls", "messages.reasoning_content")) -> Any:
    return find_columns(row, "f:1", None, wanted).extract(row, "f:1")


@pytest.mark.parametrize(
    "row",
    [
        {"conversation": [{"human": "q", "assistant": "r"}]},
        {"conversation": [{"input": "q", "output": "r"}], "id": 1},
        {"dialog": [{"role": "prompter", "content": "q"}, {"role": "Bot", "content": "r"}]},
        {"conversations": json.dumps([{"from": "human", "value": "q"}, {"from": "model", "value": "r"}])},
        {"messages": json.dumps(PAIR)},
        {"conversations": PAIR, "system": ""},
        {"prompt": "q", "chosen": "r", "rejected": "s"},
        {"chosen": "\n\nHuman: q\n\nAssistant: r", "rejected": "\n\nHuman: q\n\nAssistant: s"},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " r".strip(), "rejected": "s"},
        {"prompt": [user("q")], "chosen": [assistant("r")], "rejected": [assistant("s")]},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "r"}, "rejected": {}},
        {"messages": PAIR, "chosen": PAIR, "rejected": []},
        {"prompt": [user("q")], "completion": [assistant("r")]},
        {"messages": [{**user("q"), "weight": 0}, assistant("r", weight=1.0, train=True, trainable=None)]},
        {"messages": [user("q"), assistant([{"type": "text", "text": "r"}])]},
    ],
)  # fmt: skip
def test_other_spellings_are_the_same_conversation(row: dict[str, Any]) -> None:
    made = extracted(row)
    assert [(m["role"], m["content"] if isinstance(m["content"], str) else "r") for m in made] == [
        ("user", "q"),
        ("assistant", "r"),
    ]
    assert all(message.keys() == {"role", "content"} for message in made)


@pytest.mark.parametrize("system_column", ["system", "system_prompt"])
def test_system_prompts_of_a_column(system_column: str) -> None:
    row = {system_column: "s", "question": "q", "response": "r"}
    assert extracted(row) == [system("s"), *PAIR]
    assert extracted({**row, system_column: ""}) == ("q", "r")
    same = {system_column: "s", "messages": [system("s"), *PAIR]}
    assert extracted(same) == [system("s"), *PAIR]
    with pytest.raises(UserError, match=rf"f:1: column '{system_column}' has a system prompt, and the conversation ha"):
        extracted({**same, system_column: "t"})


@pytest.mark.parametrize("spelling", ["weight", "train", "training", "trainable", "loss", "loss_weight"])
def test_messages_that_are_not_trained_on(spelling: str) -> None:
    turns = [user("a"), assistant("b"), *PAIR]
    for no in (0, 0.0, False):
        made = extracted({"messages": [{**turn, spelling: no} if i == 1 else turn for i, turn in enumerate(turns)]})
        assert made == [user("a"), assistant("b", trained=False), *PAIR]
    for wrong in (0.5, 2, -1, "0", float("nan"), [0]):
        with pytest.raises(UserError, match=rf"f:1: messages\[1\]\.{spelling} must be 1 or true"):
            extracted({"messages": [user("a"), assistant("b", **{spelling: wrong}), *PAIR]})
    with pytest.raises(UserError, match="f:1: none of the assistant's messages is trained on"):
        extracted({"messages": [user("a"), assistant("b", **{spelling: 0})]})
    with pytest.raises(UserError, match=r"contradict each other"):
        extracted({"messages": [user("a"), assistant("b", **{spelling: 0, "trained": True})]})


def test_what_comes_before_a_preferred_answer_is_not_trained_on() -> None:
    prompt = [user("a"), assistant("b"), user("q")]
    expected = [user("a"), assistant("b", trained=False), *PAIR]
    assert extracted({"prompt": prompt, "chosen": [assistant("r")], "rejected": [assistant("s")]}) == expected
    assert extracted({"messages": prompt, "chosen": "r", "rejected": "s"}) == expected
    assert extracted({"prompt": prompt, "completion": [assistant("r")]}) == expected


def test_calls_of_every_form_are_one() -> None:
    plain = {"name": "tide", "arguments": HUSUM}
    text = json.dumps(plain)
    for given in (
        {"tool_calls": [call("tide", HUSUM)]},
        {"tool_calls": json.dumps([plain])},
        {"tool_calls": [text]},
        {"tool_calls": [plain]},
        {"tool_calls": [{"name": "tide", "parameters": HUSUM}]},
        {"function_call": plain},
        {"function_call": {"name": "tide", "arguments": json.dumps(HUSUM)}},
    ):
        for result in ({"role": "function", "name": "tide"}, {"role": "tool"}, {"role": "observation"}):
            turns = [user("q"), assistant(None, **given), {**result, "content": "12:40"}, assistant("r")]
            made = extracted({"messages": turns})
            assert [message["role"] for message in made] == ["user", "assistant", "tool", "assistant"]
            (found,) = made[1]["tool_calls"]
            arguments = found["function"]["arguments"]
            assert (found["type"], found["function"]["name"]) == ("function", "tide")
            assert (json.loads(arguments) if isinstance(arguments, str) else arguments) == HUSUM
    two = [
        user("q"),
        {"role": "tool_call", "content": json.dumps([plain, plain])},
        tool("1"),
        tool("2"),
        assistant("r"),
    ]
    assert len(extracted({"messages": two})[1]["tool_calls"]) == 2
    assert extracted({"messages": [user("q"), assistant("", tool_calls=[{"name": "f"}])]})[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {}}}
    ]


def test_thoughts_of_every_spelling() -> None:
    for given in ({"reasoning_content": "t"}, {"reasoning": "t"}, {"thinking": "t", "reasoning": None},
                  {"content": [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "r"}]}):  # fmt: skip
        made = extracted({"messages": [user("q"), {**assistant("r"), **given}]})[1]
        assert made["reasoning_content"] == "t"
        assert made.keys() == {"role", "content", "reasoning_content"}
    pair = {"question": "q", "thinking": "t", "answer": "r"}
    assert extracted(pair) == [user("q"), assistant("r", reasoning_content="t")]
    assert extracted(pair, ()) == ("q", "r")  # the template knows no thoughts, and the column is named as unused
    with pytest.raises(UserError, match="has several different thoughts"):
        extracted({"messages": [user("q"), assistant("r", reasoning="a", thinking="b")]})


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "narrator", "content": "x"}, *PAIR], r"messages\[0\] has the unknown role str 'narrator'; known"),
        ([user("q"), user("q"), assistant("r")], "message 2 of the conversation, the user's, follows another message"),
        ([assistant("r"), *PAIR], "message 1 .*the assistant's, has nothing to answer"),
        ([system("s"), assistant("r")], "message 2 .*the assistant's, has nothing to answer"),
        ([*PAIR, system("s"), *PAIR], "message 3 .*a system message, must come before the user's first"),
        ([user("q"), tool("t"), assistant("r")], "message 2 .*a tool's, must follow the assistant's call"),
        ([*PAIR, user("q")], "ends with a message of the user"),
        ([user("q"), assistant(None, tool_calls=[call("f", {})]), tool("t")], "ends with a message of the tool"),
        ([system("s")], "ends with a message of the system"),
        ([user(None), assistant("r")], r"content of messages\[0\] \(role user\) must be text"),
        ([user("q"), assistant(None)], r"content of messages\[1\] \(role assistant\) must be text"),
        ([user("q"), assistant([{"type": "input_audio", "input_audio": {}}])], "only text is trained on"),
        ([user("q"), assistant(None, tool_calls=[call("f", '{"a": ')])], "arguments of .*tool_calls must be an object"),
        ([user("q"), assistant(None, tool_calls=[call("f", [1])])], "arguments of .*tool_calls must be an object"),
        ([user("q"), assistant(None, tool_calls="f(1)")], "must be calls of tools, .*got str 'f\\(1\\)'"),
        ([user("q"), assistant(None, tool_calls=[{"function": {}}])], "must be calls of tools"),
        ([{**user("q"), "tool_calls": [call("f", {})]}, assistant("r")], "only the assistant calls tools"),
        ([user("q"), assistant("r", reasoning={"a": 1})], r"messages\[1\].reasoning must be text"),
        ([user("q"), assistant("r", reasoning="\ud83d")], "half of a surrogate pair"),
        (["q", "r"], r"messages\[0\] must be an object"),
        ([{"from": "human", "text": "q"}, assistant("r")], r"content of messages\[0\]"),
        ([{"human": "q", "assistant": None}], r"messages\[0\].assistant must be text, got null"),
        ([{"role": 3, "content": "q"}], r"messages\[0\] must be an object"),
        ("[1", "must be a list"),
    ],
)  # fmt: skip
def test_conversations_that_nobody_had(messages: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"f:1: .*{message}") as caught:
        extracted({"messages": messages})
    assert "remove this row" in str(caught.value)


@pytest.mark.parametrize("history", [["q", "r"], [["q"]], [["q", None]], "q", {"q": "r"}, [[["q"], "r"]]])
def test_histories_of_the_wrong_form(history: Any) -> None:
    with pytest.raises(UserError, match=r"f:1: .*history.* must be"):
        extracted({"instruction": "q", "output": "r", "history": history})


def test_a_preferred_answer_to_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"f:1: message 1 .*nothing to answer"):
        extracted({"chosen": "r", "rejected": "s"})
    with pytest.raises(UserError, match=r"f:1: .*a text without an answer is no conversation"):
        extracted({"text": "once upon a time"})


def test_columns_may_name_the_parts() -> None:
    row = {
        "q": "q",
        "r": "r",
        "c": "x",
        "s": "s",
        "h": [["a", "b"]],
        "why": "t",
        "good": "r",
        "bad": "z",
        "all": PAIR[:1],
    }
    named = {"query": "q", "response": "r", "context": "c", "system": "s", "history": "h", "reasoning": "why"}
    config = DataConfig.model_validate({"dataset": "x", "columns": named, "template": "chat"})
    columns = find_columns(row, "f:1", config.columns, ["messages.reasoning"])
    assert columns.extract(row, "f:1") == [
        system("s"), user("a"), assistant("b"), user("q\n\nx"), assistant("r", reasoning_content="t")
    ]  # fmt: skip
    for more in ({"query": "q"}, {"conversations": "all"}):
        named = {"chosen": "good", "rejected": "bad", **more}
        config = DataConfig.model_validate({"dataset": "x", "columns": named})
        columns = find_columns(row, "f:1", config.columns)
        assert columns.extract(row, "f:1") == PAIR
        columns.variables(row, "f:1")
        assert "bad (the chosen answers are trained on)" in columns.unused


def test_a_developer_speaks_as_the_system_where_the_template_knows_no_developers() -> None:
    """Qwen2.5's template leaves out a message whose role it does not know."""
    parts = [{"role": "developer", "content": "Be brief."}, *PAIR]
    for template, text in (("qwen2_5", "<|im_start|>system\nBe brief."), ("gptoss", "Instructions\n\nBe brief.")):
        tokenizer, encode = encoder(template)
        (example,) = encode.encode([("f:1", parts, {})]).examples
        assert text in tokenizer.decode(example.input_ids)


def test_keys_of_messages_that_the_template_ignores_are_named(tmp_path: Path) -> None:
    """Also from the cache; a call of a tool that no template would write stops the run."""
    tokenizer = character_tokenizer(bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT
    rows = [{"messages": [user("q"), assistant("r", reasoning="t", name="Ann", weight=1, refusal=None)], "id": 3}]
    config = DataConfig(dataset=str(write_lines(tmp_path / "rows.jsonl", rows)), template="chat")
    note = "columns of the data that are not used: id, messages.name, messages.reasoning_content"
    assert [prepare(config, tokenizer).notes[:1] for _ in range(2)] == [[note]] * 2
    tokenizer.chat_template = CHAT.replace("m.tool_calls", "[]")
    rows = [*rows, {"messages": [user("q"), assistant("r", tool_calls=[call("f", {})])]}]
    config = DataConfig(dataset=str(write_lines(tmp_path / "rows.jsonl", rows)), template="chat")
    with pytest.raises(UserError, match=r"rows\.jsonl:2: the assistant calls a tool, and the template does not know"):
        prepare(config, tokenizer)


def test_the_context_of_dolly_is_not_found_under_an_older_key(tmp_path: Path) -> None:
    """Older versions left the context out, and kept their tokens under a key that says nothing of it."""
    tokenizer = character_tokenizer(bos_token="<s>", eos_token="</s>")
    row = {"instruction": "i", "response": "r"}
    keys = []
    for columns in (None, {"query": "instruction", "response": "response"}):
        for more in ({}, {"context": "c"}):
            path = write_lines(tmp_path / "rows.jsonl", [row | more])
            made = prepare(DataConfig(dataset=str(path), template="plain", columns=columns), tokenizer)
            keys.append(made.key)
            text = "<s>i\n\ncr</s>" if more and not columns else "<s>ir</s>"
            assert tokenizer.decode(made.train[0].input_ids) == text
    assert len(set(keys)) == 4


@pytest.mark.parametrize(
    ("template", "keys"),
    [
        ("{% for m in messages %}{{ m['role'] }}{{ m.get('reasoning') }}{% endfor %}", {"role", "reasoning"}),
        ("{% set all = messages[1:] %}{% for m in all %}{{ m.content }}{% endfor %}{{ tools.name }}", {"content"}),
        ("{% macro show(x) %}{{ x.name }}{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}", {"name"}),
        ("{{ messages[0].content }}{{ messages[-1]['thinking'] }}", {"content", "thinking"}),
        ("{% for m in messages %}{% for c in m.tool_calls %}{{ c.name }}{% endfor %}{% endfor %}", {"tool_calls"}),
        ("{% for m in messages | reverse %}{{ m | tojson }}{% endfor %}", {"*"}),
        ("{% for m in messages %}{% for k, v in m.items() %}{{ k }}{% endfor %}{% endfor %}", {"*"}),
        ("{{ messages | map(attribute='content') | join }}", {"content"}),
        ("{{ broken", set()),
    ],
)  # fmt: skip
def test_keys_of_messages_that_a_template_reads(template: str, keys: set[str]) -> None:
    found = {name.removeprefix("messages.") for name in names_used(template) if name.startswith("messages.")}
    assert found == keys


HOSTILE: list[Any] = [
    None, "", "x", "[{", "[1]", '{"name": 1}', "\ud83d", 0, -1, 1.5, float("nan"), True, [], [[]], [None], ["x"],
    [{}], {}, {"": None}, {"role": "user"}, {"from": "gpt"}, {"function": "f"}, {"type": "text"}, b"x",
]  # fmt: skip


def mutated(value: Any) -> Any:
    """Each value that differs from this one in one place, at any depth."""
    yield from HOSTILE
    inner = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    for key, one in list(inner):
        rest = (
            value[:key] + value[key + 1 :] if isinstance(value, list) else {k: v for k, v in value.items() if k != key}
        )
        yield rest
        for other in mutated(one):
            if isinstance(value, list):
                yield [*value[:key], other, *value[key + 1 :]]
            else:
                yield {**value, key: other}


@pytest.mark.parametrize("form", FORMS)
def test_damage_anywhere_in_a_row_is_an_error_of_the_row_or_none(form: str) -> None:
    row = FORMS[form][1]
    columns = find_columns(row, "f:1", None, ["tools", "messages.tool_calls", "messages.thinking"])
    for damaged in mutated(row):
        if not isinstance(damaged, dict):
            continue
        try:
            parts, variables = columns.extract(damaged, "f:9"), columns.variables(damaged, "f:9")
        except UserError as error:
            assert str(error).startswith("f:9: ")
            assert error.key in ("data.dataset", "data.columns", "data.template")
            continue
        assert isinstance(variables.get("tools", []), list)
        turns = parts if isinstance(parts, list) else [user(parts[0]), assistant(parts[1])]
        assert turns[-1]["role"] == "assistant"
        for message in turns:
            assert message["role"] in ("system", "developer", "user", "assistant", "tool")
            assert isinstance(message["content"], str | list) or message["tool_calls"]
            assert isinstance(message.get("reasoning_content", ""), str)
            assert message.get("trained", False) is False
            for made in message.get("tool_calls", []):
                assert isinstance(made["function"]["name"], str)
