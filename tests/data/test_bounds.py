"""Data sets and chat templates of others that would fill the memory, or never end: each is refused, its row named."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_data import byte_level_bpe, write_lines

from rasa_train.data import chat, encode, prepare, row_files, tokenise
from rasa_train.data.columns import find_columns
from rasa_train.data.config import DataConfig
from rasa_train.data.encode import Encoder
from rasa_train.data.sources import find_source
from rasa_train.errors import UserError

CHATML = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
PAIR = {"query": "a", "response": "b"}


def read(path: Path) -> list[Any]:
    return [row for _, row in find_source(str(path))[0].rows()]


def made(path: Path | str, tokenizer: Any, **options: Any) -> Any:
    return prepare.prepare(DataConfig(dataset=str(path), num_workers=1, **options), tokenizer)


# Files


def test_a_parquet_file_of_900_bytes_unpacks_to_5_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "_UNPACKED", 64 << 20)
    path = tmp_path / "a.parquet"
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["a" * 5_000_000]))
    pq.write_table(pa.table({"query": texts, "response": ["b"] * 1000}), path, compression="zstd")
    assert path.stat().st_size < 1000
    with pytest.raises(UserError, match=r"a\.parquet row 14: .* more than 64 MiB, in a file of \d+ bytes"):
        read(path)


def test_a_parquet_row_is_a_list_of_10_million_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    numbers = pa.ListArray.from_arrays(pa.array([0, 2, 10_000_000], pa.int32()), np.zeros(10_000_000, np.int8))
    pq.write_table(pa.table({"input_ids": numbers}), path, compression="zstd")
    with pytest.raises(UserError, match=r"a\.parquet row 2: is a row of more than 16 MiB"):
        read(path)


def test_a_parquet_file_of_long_documents_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them together are more than the child process may use."""
    monkeypatch.setattr(row_files, "_MEMORY", 96 << 20)
    rows = [{"query": chr(97 + i % 26) * 1_000_000, "response": str(i)} for i in range(100)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", compression="none")
    found = find_source(str(tmp_path / "a.parquet"))[0].rows()
    assert all(row == expected for (_, row), expected in zip(found, rows, strict=True))


def test_a_saved_set_unpacks_to_gigabytes(tmp_path: Path) -> None:
    """The library reads all of a compressed Arrow file when it opens it."""
    rows = [{"query": "a" * 4_000_000, "response": "b"}] * 5
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    [file] = (tmp_path / "saved").glob("*.arrow")
    with pa.ipc.open_stream(file.read_bytes()) as reader:
        table = reader.read_all()
    with pa.ipc.new_stream(file, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        for _ in range(40):
            writer.write_table(table)
    assert file.stat().st_size < 1_000_000
    either = r"saved row (1: needs more than 512|\d+: the rows up to this one are more than 256) MiB"
    with pytest.raises(UserError, match=either):
        read(tmp_path / "saved")


def test_a_saved_set_names_a_file_elsewhere(tmp_path: Path) -> None:
    datasets.Dataset.from_list([PAIR]).save_to_disk(tmp_path / "saved")
    state = json.loads((tmp_path / "saved/state.json").read_text())
    (tmp_path / "saved/state.json").write_text(json.dumps(state | {"_data_files": [{"filename": "../secret.arrow"}]}))
    with pytest.raises(UserError, match=r"'\.\./secret\.arrow' is not the name of a file beside it"):
        read(tmp_path / "saved")


def test_a_damaged_arrow_file_does_not_end_this_process(tmp_path: Path) -> None:
    datasets.Dataset.from_list([PAIR] * 100).save_to_disk(tmp_path / "saved")
    [file] = (tmp_path / "saved").glob("*.arrow")
    content = bytearray(file.read_bytes())
    content[len(content) // 2 :] = b"\xff" * (len(content) - len(content) // 2)
    file.write_bytes(content)
    with pytest.raises(UserError, match="saved"):
        read(tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("line.jsonl", b'{"query": "' + b"a" * (17 << 20) + b'"}\n'),
        ("line.jsonl.gz", gzip.compress(b'{"query": "') + gzip.compress(b"a" * (1 << 20)) * 17),
        ("list.json.gz", gzip.compress(b'[{"query": "') + gzip.compress(b"a" * (1 << 20)) * 40),
    ],
)
def test_a_row_of_more_than_16_mebibytes(tmp_path: Path, name: str, body: bytes) -> None:
    (tmp_path / name).write_bytes(body)
    with pytest.raises(UserError, match=rf"{name}:1: .*a row of more than 16 MiB"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "start", "filler"),
    [("a.jsonl.gz", json.dumps(PAIR).encode() + b"\n", b"\n"), ("a.json.gz", b"[", b" ")],
)
def test_a_small_gzip_file_is_100_megabytes_of_nothing(tmp_path: Path, name: str, start: bytes, filler: bytes) -> None:
    (tmp_path / name).write_bytes(gzip.compress(start) + gzip.compress(filler * 1_000_000, 1) * 100)
    with pytest.raises(UserError, match=r"more than 1 MiB of (empty lines|spaces)"):
        read(tmp_path / name)


def test_a_row_has_a_million_columns(tmp_path: Path, bpe: Any) -> None:
    row = {f"c{i}" * 3: 1 for i in range(200_000)} | {"x" * 1_000_000: 1}
    with pytest.raises(UserError) as caught:
        made(write_lines(tmp_path / "a.jsonl", [row]), bpe)
    assert len(str(caught.value)) < 3000 and "and 199951 more" in str(caught.value)
    [note] = made(write_lines(tmp_path / "b.jsonl", [{"x" * 1_000_000: 1} | row | PAIR]), bpe).notes
    assert len(note) < 3000


def test_every_row_has_columns_of_its_own(tmp_path: Path, bpe: Any) -> None:
    columns = find_columns(PAIR, "f:1", None)
    for i in range(5000):
        columns.variables({**PAIR, f"c{i}": 1}, "f:1")
    assert len(columns.unused) == 1000


@pytest.mark.parametrize("depth", [300, 900])
def test_a_message_holds_lists_in_lists(tmp_path: Path, bpe: Any, depth: int) -> None:
    deep = "[" * depth + "]" * depth
    turns = '{"role": "user", "content": "a", "x": ' + deep + '}, {"role": "assistant", "content": "b"}'
    (tmp_path / "a.jsonl").write_text('{"messages": [' + turns + "]}\n")
    try:
        made(tmp_path / "a.jsonl", bpe)
    except UserError as error:
        assert "a.jsonl:1: " in str(error)


# Texts


def test_many_long_rows_are_tokenised_a_few_at_a_time() -> None:
    rows = ((f"f:{i}", {"query": "a" * 3_000_000, "response": "b"}) for i in range(20))
    sizes = [len(chunk) for chunk in tokenise.chunks(rows, find_columns(PAIR, "f:1", None))]
    assert sizes == [3] * 6 + [2]


@pytest.mark.parametrize("supervise", ["response", "paper", "all"])
@pytest.mark.parametrize("over_length", ["truncate", "drop"])
@pytest.mark.parametrize("kind", ["words", "spaces", "one word"])
def test_of_a_long_text_the_same_tokens_are_kept_as_if_all_were_tokenised(
    bpe: Any, monkeypatch: pytest.MonkeyPatch, supervise: Any, over_length: Any, kind: str
) -> None:
    text = {"words": "Natalia sold 48 clips. ### Instruction:\n é € ### Response:\n", "spaces": " ", "one word": "clip"}
    long = "a" + text[kind] * (40_000 // len(text[kind])) + "b"
    rows = [("f:1", ("How many?", long), {}), ("f:2", (long, "72"), {}), ("f:3", ("How many?", "72"), {})]

    def encoded(enough: int) -> Any:
        monkeypatch.setattr(encode, "_ENOUGH", enough)
        config = DataConfig(dataset="x", supervise=supervise, over_length=over_length, max_length=300)
        return Encoder(config, bpe, "pair").encode(rows)

    cut, whole = encoded(1), encoded(1 << 30)
    assert (cut.truncated, cut.dropped_over_length) == (whole.truncated, whole.dropped_over_length) != (0, 0)
    for one, other in zip(cut.examples, whole.examples, strict=True):
        assert (one.input_ids == other.input_ids).all() and (one.labels == other.labels).all()


def test_a_text_of_15_megabytes_makes_few_tokens_at_a_time(bpe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token takes about 150 bytes while it is made."""
    encoder = Encoder(DataConfig(dataset="x", supervise="paper"), bpe, "pair")
    tokens: list[int] = []
    tokens_of = encode.tokens_of
    monkeypatch.setattr(encode, "tokens_of", lambda encoding: (tokens.append(len(encoding)), tokens_of(encoding))[1])
    text = "### Instruction:\n### Response:\n" * 500_000
    [example] = encoder.encode([("f:1", (text, "b"), {})]).examples
    assert len(example.input_ids) == 4096 and max(tokens) < 100_000


# Chat templates

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "a loop in a loop": (LOOP, "computes for more than 0 s"),
    "a text of a gigabyte": ('{{ "a" * 10**9 }}', "MiB"),
    "a gigabyte that is only measured": ('{{ ("a" * 10**9)|length }}', "MiB of memory"),
    "a method that fills": ('{{ "a".rjust(10**9)|length }}', "MiB of memory"),
    "a text that doubles": (
        '{% set n = namespace(x="aa") %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}',
        "MiB of memory",
    ),
    "many short texts": ('{% for i in range(9999) %}{{ "a" * 5000 }}{% endfor %}', "(32 MiB of text|than 0 s)"),
    "a power": ("{{ (7 ** 100000000) % 7 }}", "computes for more than 0 s"),
    "a value that contains itself many times": (
        "{% set n = namespace(x=(1,)) %}{% for i in range(60) %}{% set n.x = (n.x, n.x) %}{% endfor %}"
        "{{ {n.x: 1}|length }}",
        "computes for more than 0 s",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_chat_template_never_ends_or_fills_the_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "_SECONDS", 0)
    tokenizer = byte_level_bpe()
    hostile, message = HOSTILE[name]
    tokenizer.chat_template = hostile + CHATML
    with pytest.raises(UserError, match=rf"chat template .*{message}.*chat_template\.jinja") as caught:
        made(write_lines(tmp_path / "a.jsonl", [PAIR]), tokenizer, template="chat")
    assert caught.value.key == "data.template"


def test_a_chat_template_hangs_on_one_row_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_SECONDS", 0)
    tokenizer = byte_level_bpe()
    tokenizer.chat_template = f"{{% if messages[0]['content'] == 'now' %}}{LOOP}{{% endif %}}{CHATML}"
    rows = [PAIR, PAIR, {"query": "now", "response": "b"}, PAIR]
    with pytest.raises(UserError, match=r"a\.jsonl:3: the tokenizer's chat template computes for more than 0 s"):
        made(write_lines(tmp_path / "a.jsonl", rows), tokenizer, template="chat")


def test_a_conversation_of_40_000_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_SECONDS", 0)
    tokenizer = byte_level_bpe()
    tokenizer.chat_template = CHATML
    turns = [{"role": role, "content": "a"} for _ in range(20_000) for role in ("user", "assistant")]
    with pytest.raises(UserError, match=r"a\.jsonl:1: .* computes for more than 0 s"):
        made(write_lines(tmp_path / "a.jsonl", [{"messages": turns}]), tokenizer, template="chat")


@pytest.mark.parametrize("enough", [1, 1 << 30])
def test_marks_of_the_assistants_turns_are_those_of_transformers(
    enough: int, bpe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_ENOUGH", enough)
    tokenizer = byte_level_bpe()
    tokenizer.chat_template = CHATML.replace(
        "{{ m['content'] }}\n",
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}\n{% endgeneration %}"
        "{% else %}{{ m['content'] }}\n{% endif %}",
    )
    turns = [{"role": role, "content": f"{role} says Étienne 15 € "} for role in ("user", "assistant") * 200]
    config = DataConfig(dataset="x", template="chat", max_length=3000)
    [example] = Encoder(config, tokenizer, "messages").encode([("f:1", turns, {})]).examples
    expected = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    assert list(example.input_ids) == expected["input_ids"][:3000]
    assert list(example.labels != -100) == [bool(mark) for mark in expected["assistant_masks"][:3000]]
    assert row_files.MAX_ROW >= 16 << 20


@pytest.mark.parametrize("target", [None, "/dev/zero"])
def test_a_pipe_or_a_device_as_the_data_is_not_read_for_ever(target: str | None, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    if target:
        path.symlink_to(target)
    else:
        os.mkfifo(path)
    with pytest.raises(UserError, match="is not a file"):
        find_source(str(path))
