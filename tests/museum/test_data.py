"""Reports of other projects about rows, chat templates and masks, and what happens here instead."""

from __future__ import annotations

import datetime
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers.utils import chat_template_utils

from rasa_train.data.batching import collate
from rasa_train.data.config import DataConfig
from rasa_train.data.prepare import PreparedData, prepare
from rasa_train.errors import UserError
from rasa_train.recipe.load import load_recipe

from ..data.tiny_data import character_tokenizer, write_lines

CHAT = (
    "{% if tools %}[{{ tools | tojson }}]{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "required": ["at"]}}}


def chat(answer: Any = "Noon.", question: Any = "High tide?") -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def call(name: str, arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


def tokenizer(template: str = CHAT, **special: str) -> Any:
    made = character_tokenizer(**({"bos_token": "<s>", "eos_token": "</s>"} | special))
    made.chat_template = template
    return made


Prepared = Callable[..., PreparedData]


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    """Prepare these rows, or what is at ``dataset``, with the chat template."""

    def make(rows: list[Any] | None = None, with_tokenizer: Any = None, **options: Any) -> PreparedData:
        if rows is not None:
            options["dataset"] = str(write_lines(tmp_path / "rows.jsonl", rows))
        config = DataConfig.model_validate({"template": "chat"} | options)
        return prepare(config, with_tokenizer or tokenizer())

    return make


def marked(data: PreparedData, index: int = 0, with_tokenizer: Any = None) -> str:
    """The text of an example, with what is trained on marked »like this«."""
    example, decode = data.train[index], (with_tokenizer or tokenizer()).decode
    pairs = zip(example.labels, example.input_ids, strict=True)
    runs = [(loss, decode([i for _, i in run])) for loss, run in itertools.groupby(pairs, lambda p: bool(p[0] != -100))]
    return "".join(f"»{text}«" if loss else text for loss, text in runs)


def test_tools_of_a_row_reach_the_template(prepared: Prepared) -> None:
    """OpenRLHF/OpenRLHF#1079: fine-tuning gave only the messages to the template, and the tools of a row were dropped.

    Here: the template gets them, as a list, as JSON text, or as OpenAI's former functions.
    """
    text = f"[{json.dumps([TOOL])}]<user>High tide?</s><assistant>»Noon.</s>«"
    for column, tools in (
        ("tools", [TOOL]),
        ("tools", json.dumps([TOOL])),
        ("tools", [json.dumps(TOOL)]),
        ("functions", [TOOL["function"]]),
    ):
        data = prepared([{column: tools, "messages": chat()}])
        assert marked(data) == text
        assert data.notes == []
    for empty in ([], None, ""):
        assert marked(prepared([{"tools": empty, "messages": chat()}])).startswith("<user>")
    with pytest.raises(UserError, match=r"rows\.jsonl:1: column 'tools' must be a list of objects.*got str 'tide'"):
        prepared([{"tools": "tide", "messages": chat()}])
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .*surrogates not allowed"):
        prepared([{"tools": [{**TOOL, "about": "\ud83d"}], "messages": chat()}])


def test_columns_that_the_template_does_not_use_are_named(prepared: Prepared) -> None:
    """NVIDIA-NeMo/Megatron-Bridge#4072: a template without tools rendered rows with tools, and nothing said so.

    Here: a line names the columns that are not used, also when the tokens come from the cache; a column with nulls only
    is no loss.
    """
    rows = [{"messages": chat(), "empty": None}, {"messages": chat(), "tools": [TOOL], "id": 7}]
    without = tokenizer("{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}")
    for _ in range(2):
        data = prepared(rows, without, supervise="all")
        assert data.notes == ["columns of the data that are not used: id, tools"]
    named = {"messages": "messages", "tools": "tools"}
    assert prepared(rows, without, supervise="all", columns=named).notes == data.notes


def test_the_input_of_alpaca_is_part_of_the_question(prepared: Prepared) -> None:
    """sgl-project/SpecForge#720: of CodeAlpaca's rows only instruction and output were read, not the input.

    Here: input follows the instruction, also when the recipe names the columns, and is named as unused if it does not.
    """
    rows = [{"do": "Shorten.", "with": "The ferry leaves.", "out": "Ferry."}, {"do": "Sing.", "out": "La."}]
    named = {"query": "do", "input": "with", "response": "out"}
    data = prepared(rows, columns=named, template="plain")
    assert marked(data) == "<s>Shorten.\n\nThe ferry leaves.»Ferry.</s>«"
    assert marked(data, 1) == "<s>Sing.»La.</s>«"
    data = prepared(rows, columns={"query": "do", "response": "out"}, template="plain")
    assert data.notes == ["columns of the data that are not used: with"]
    with pytest.raises(UserError, match=r"data\.columns: no row of .* has a column 'whit'"):
        prepared(rows, columns=named | {"input": "whit"}, template="plain")


def test_arguments_of_other_tools_are_not_null(prepared: Prepared, tmp_path: Path) -> None:
    """axolotl-ai-cloud/axolotl#2909: a file with one schema gave every call the arguments of all tools, as nulls.

    Here: keys with nulls are left out, whatever the kind of file, so JSON lines and Parquet give the same tokens.
    """
    more = {"tools": [{**TOOL, "strict": True}, TOOL]}  # strict is null in the second
    rows = [
        {"messages": [*chat(), call("tide", {"at": "Husum"}), {"role": "tool", "content": "noon"}, *chat()], **more},
        {
            "messages": [*chat(), call("add", {"left": 3, "right": 4}), {"role": "tool", "content": "7"}, *chat()],
            **more,
        },
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    lines, table = prepared(rows), prepared(dataset=str(tmp_path / "rows.parquet"))
    assert '{"name": "tide", "arguments": {"at": "Husum"}}' in marked(lines)
    for i in range(2):
        assert marked(table, i) == marked(lines, i)


def test_json_arguments_are_not_encoded_twice(prepared: Prepared) -> None:
    """oumi-ai/oumi#2599: arguments that are JSON text were written as a quoted string of escapes by Qwen's template.

    Here: each template gets the form that it can write: an object, or text if it would print Python's words.
    """
    of_text = CHAT.replace("c.function | tojson", "'call ' + c.function.name + c.function.arguments")
    for arguments in ({"at": "Büsum"}, '{"at": "Büsum"}'):
        rows = [{"messages": [*chat(), call("tide", arguments), {"role": "tool", "content": "noon"}, *chat()]}]
        assert '»{"name": "tide", "arguments": {"at": "B' in marked(prepared(rows))
        assert '»call tide{"at": "B' in marked(prepared(rows, tokenizer(of_text)))


def test_parameters_of_a_tool_may_be_json_text(prepared: Prepared) -> None:
    """axolotl-ai-cloud/axolotl#3238: tools whose parameters differ in type fit into no schema, and text was refused.

    Here: parameters that are JSON text are read.
    """
    function = {"name": "tide", "parameters": json.dumps(TOOL["function"]["parameters"])}  # type: ignore[index]
    data = prepared([{"tools": [{"type": "function", "function": function}], "messages": chat()}])
    assert marked(data).startswith(f"[{json.dumps([TOOL])}]")


def test_content_in_parts_is_its_text(prepared: Prepared) -> None:
    """lm-sys/FastChat#3017: a content that is a list of parts, as OpenAI has it, failed in a template for text.

    Here: the template gets the text of the parts, or parts if it takes only these; anything else names its line.
    """
    parts = [{"type": "text", "text": "At "}, {"type": "text", "text": "noon."}]
    plain = "<user>High tide?</s><assistant>»At noon.</s>«"
    of_parts = tokenizer(CHAT.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}"))
    for takes in (tokenizer(), of_parts):
        for answer in (parts, "At noon.", ["At noon."]):
            assert marked(prepared([{"messages": chat(answer)}], takes)) == plain
    for found in ([], {"at": 12}, ["noon", 12], 12):  # what a tool gives back may be any JSON
        rows = [{"messages": [*chat(), call("tide", {}), {"role": "tool", "content": found}, *chat()]}]
        assert f"<tool>{json.dumps(found)}</s>" in marked(prepared(rows))
    alpaca = prepared([{"messages": chat(parts)}], template="alpaca")
    assert marked(alpaca).endswith("»At noon. </s>«")
    for wrong in ([{"type": "image_url", "image_url": {"url": "x"}}], [{"type": "text", "text": None}], 12, {"a": 1}):
        with pytest.raises(UserError, match=r"rows\.jsonl:2: .*messages\[1\].*(only text|must be text)"):
            prepared([{"messages": chat()}, {"messages": chat(wrong)}])


def test_a_tool_call_without_content_fits_a_template_that_reads_it(prepared: Prepared) -> None:
    """Blaizzy/mlx-vlm#1864: Qwen3-VL's template walked through the content of a tool call, which is null.

    Here: such a template gets an empty text; an answer without content and without calls stops the run with its line.
    """
    walks = CHAT.replace("{{ m.content }}", "{% for p in m.content + '' %}{{ p }}{% endfor %}")
    adds = CHAT.replace("{{ m.content }}", "{{ m.content + '' }}")
    rows = [{"messages": [*chat(), call("tide", {}), {"role": "tool", "content": "noon"}, *chat()]}]
    assert '»{"name": "tide", "arguments": {}}</s>«' in marked(prepared(rows, tokenizer(adds)))
    assert '»{"name": "tide", "arguments": {}}</s>«' in marked(prepared(rows, tokenizer(walks)))
    for answer in ({"role": "assistant", "content": None}, {"role": "assistant"}, {"role": "assistant", "content": []}):
        for more in ({}, {"tool_calls": []}, {"tool_calls": None}):
            with pytest.raises(UserError, match=r"rows\.jsonl:2: the content of messages\[1\] \(role assistant\)"):
                prepared([{"messages": chat()}, {"messages": [chat()[0], {**answer, **more}]}])


def test_a_template_without_marks_has_a_mask(prepared: Prepared) -> None:
    """marin-community/marin#7237: a template without generation marks gave a mask of zeros, and nothing was trained on.

    Here: the assistant's turns are found from the headers, and are the same tokens as with marks.
    """
    marks = CHAT.replace("{{ m.content }}</s>", "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
                         "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}")  # fmt: skip
    rows = [{"messages": [*chat(), *chat("Six.", "Low tide?")]}]
    text = "<user>High tide?</s><assistant>»Noon.</s>«<user>Low tide?</s><assistant>»Six.</s>«"
    assert marked(prepared(rows)) == marked(prepared(rows, tokenizer(marks))) == text


def test_a_template_that_begins_with_bos_gives_one(prepared: Prepared) -> None:
    """OpenRLHF/OpenRLHF#393: the template wrote the first token, and the tokenizer put another one before it.

    Here: the text of a template is tokenised as it is.
    """
    data = prepared([{"messages": chat()}], tokenizer("{{ bos_token }}" + CHAT))
    assert data.train[0].input_ids.tolist().count(tokenizer().bos_token_id) == 1


def test_the_end_is_learned_although_it_is_the_padding(prepared: Prepared) -> None:
    """huggingface/trl#6357: with pad = eos the mask was made from the padding's id, and the ends of answers left out.

    Here: the mask is made before padding, so the end of each turn is a target, and only padding is not attended to.
    """
    data = prepared([{"messages": chat()}, {"messages": [*chat(), *chat("Six.")]}])
    eos = tokenizer().eos_token_id
    for side in ("left", "right"):
        batch = collate([data.train[0], data.train[1]], pad_token_id=eos, side=side)  # type: ignore[arg-type]
        assert batch is not None
        assert (batch["labels"] == eos).sum(1).tolist() == [1, 2]
        assert batch["attention_mask"].sum(1).tolist() == data.train.lengths.tolist()


def test_an_answer_that_is_cut_off_whole_is_left_out_and_counted(prepared: Prepared) -> None:
    """bytedance/UniVR#13: truncation left rows without any target, and the mean over none was NaN.

    Here: such a row is dropped and counted.
    """
    data = prepared([{"messages": chat(question="?" * 60)}, {"messages": chat()}], max_length=40)
    assert (data.stats.dropped_unsupervised, data.stats.truncated, len(data.train)) == (1, 1, 1)


def test_another_template_is_other_tokens(prepared: Prepared) -> None:
    """MakazhanAlpamys/Soup#1067: the template was no part of the cache's key, so a run trained on another one's tokens.

    Here: the template is part of the key.
    """
    rows = [{"messages": chat()}]
    assert marked(prepared(rows)) != marked(prepared(rows, tokenizer(CHAT.replace("</s>", "!</s>"))))


@pytest.mark.parametrize("format", ['"%d %b %Y"', "'%d %b %Y'"])
def test_today_is_not_in_the_tokens(prepared: Prepared, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    """unslothai/unsloth#881: a date that the template chose turned up in the rows and in the trained model's answers.

    Here: the date is one and the same on every day, a line says which, and a column date_string replaces it.
    """

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Later:
            return cls(2031, 5, 4)

    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    llama = (
        "{% if date_string is not defined %}{% set date_string = strftime_now(FORMAT) %}{% endif %}{{ date_string }}"
    )
    dated = tokenizer(llama.replace("FORMAT", format) + CHAT)
    data = prepared([{"messages": chat()}, {"messages": chat(), "date_string": "1 May"}], dated)
    assert marked(data).startswith("26 Jul 2024<user>") and marked(data, 1).startswith("1 May<user>")
    assert data.notes == ["the chat template prints today's date: 26 Jul 2024 stands for it in all rows"]
    with pytest.raises(UserError, match="prints today's date in a format that it computes"):
        prepared([{"messages": chat()}], tokenizer("{% set f = '%d' %}{{ strftime_now(f) }}" + CHAT))


QUERIES = [{"query": f"Where is river {i}?", "response": "Here."} for i in range(3)]
HELD_OUT = [{"query": "HELD OUT?", "response": "Yes."}]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("rivers_train.jsonl", "rivers_test.jsonl"),
        ("train-00000-of-00001.jsonl", "validation-00000-of-00001.jsonl"),
        ("TrainSet.jsonl", "riversDev.jsonl"),
        ("data/train-0.jsonl", "data/test-0.jsonl"),
        ("train/0.jsonl", "val/0.jsonl"),
        ("training.jsonl", "evaluation.jsonl"),
    ],
)
def test_files_of_a_split_are_found_by_their_names(prepared: Prepared, tmp_path: Path, train: str, test: str) -> None:
    """huggingface/datasets#3027: of a directory with train.csv and test.csv, one split with the rows of both was made.

    Here: a file belongs to the split that its name, or its folder's, speaks of; validation takes the held-out ones.
    """
    for name, rows in ((train, QUERIES), (test, HELD_OUT)):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lines(path, rows)
    (tmp_path / "set" / "dataset_infos.json").write_text("{}")
    data = prepared(dataset=str(tmp_path / "set"), template="plain", validation={"dataset": str(tmp_path / "set")})
    assert len(data.train) == 3 and "HELD" not in "".join(marked(data, i) for i in range(3))
    assert data.validation is not None and len(data.validation) == 1


def test_validation_is_never_what_is_trained_on(prepared: Prepared, tmp_path: Path) -> None:
    """MakazhanAlpamys/Soup#680: rows of the validation split were trained on, and its loss looked good.

    Here: a validation set with a file, or the split, that is trained on is refused.
    """
    (tmp_path / "set").mkdir()
    train, other = (write_lines(tmp_path / "set" / f"{name}.jsonl", QUERIES) for name in ("a", "b"))
    write_lines(other, HELD_OUT)
    twin = write_lines(tmp_path / "twin.jsonl", QUERIES)
    for dataset, held_out in ((train, train), (train, twin), (train.parent, train.parent), (train.parent, other)):
        with pytest.raises(UserError, match=r"data\.validation: .* has the rows that are trained on.*size: 0\.05"):
            prepared(dataset=str(dataset), template="plain", validation={"dataset": str(held_out)})
    for dataset, message in (("demo", "has the rows"), ("own/set", r"data\.validation\.split must say which")):
        with pytest.raises(UserError, match=message):
            prepared(dataset=dataset, template="plain", validation={"dataset": dataset})
    with pytest.raises(UserError, match="has the rows"):
        prepared(dataset="own/set", template="plain", validation={"dataset": "own/set", "split": "train[:5%]"})
    (tmp_path / "set" / "train_test.jsonl").write_text("{}")
    with pytest.raises(UserError, match="speaks of several splits, test and train; rename it"):
        prepared(dataset=str(train.parent), template="plain")


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning-AI/pytorch-lightning#19058: checkpoints of ~/checkpoints went into a new directory named ~.

    Here: every path of a recipe, of an override and of `extends` is expanded, and names of columns are not.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    write_lines(tmp_path / "base.yaml", [{"adapter": {"method": "lora"}, "model": {"name": "~/m", "tokenizer": "~/t"}}])
    data = {"dataset": "~/d.jsonl", "cache_dir": "~", "columns": {"query": "~/q", "response": "~/r"}}
    recipe = {"extends": "~/base.yaml", "data": {**data, "validation": {"dataset": "~/v"}}}
    write_lines(tmp_path / "r.yaml", [recipe])
    loaded = load_recipe("~/r.yaml", ["output_dir=~/runs/one"]).recipe
    paths = (loaded.model.name, loaded.model.tokenizer, loaded.data.dataset, loaded.output_dir)
    assert paths == tuple(f"{tmp_path}/{name}" for name in ("m", "t", "d.jsonl", "runs/one"))
    assert (loaded.data.cache_dir, loaded.data.columns) == (str(tmp_path), data["columns"])
    assert loaded.data.validation and loaded.data.validation.dataset == f"{tmp_path}/v"
    with pytest.raises(UserError, match=r"output_dir: ~nobody-here/x: no home directory of nobody-here is known"):
        load_recipe("~/r.yaml", ["output_dir=~nobody-here/x"])
