import gzip
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_data import rows_of, write_lines

from rasa_train.data import hub_source, row_files
from rasa_train.data.built_in import BUILT_IN
from rasa_train.data.columns import find_columns
from rasa_train.data.sources import find_source
from rasa_train.errors import UserError

ROWS = rows_of(5)


def read(path: Path | str, **options: str) -> list[Any]:
    return [row for _, row in find_source(str(path), **options)[0].rows()]


def save(path: Path, rows: list[dict[str, str]]) -> Path:
    """Writes rows in the way the name says."""
    kind = path.name.partition(".")[2]
    text = json.dumps(rows, indent=1) if kind.startswith("json") and "jsonl" not in kind else ""
    text = text or "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind.endswith("gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet"])
def test_reads_every_kind_of_file(tmp_path: Path, name: str) -> None:
    assert read(save(tmp_path / name, ROWS)) == ROWS


def test_json_file_may_hold_lines(tmp_path: Path) -> None:
    assert read(write_lines(tmp_path / "a.json", ROWS)) == ROWS


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_list_is_the_same_whatever_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, indent: int | None
) -> None:
    rows = [{"query": 'a "quoted", [odd] é\n' * i, "response": {"deep": [1, None, {"x": "}"}]}} for i in range(6)]
    path = tmp_path / "a.json"
    path.write_text("  " + json.dumps(rows, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8-sig")
    monkeypatch.setattr(row_files, "_BLOCK", block)
    found = [row for _, row in row_files._list_rows(path, path.open("rb"))]
    assert found == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n {"a": }]', r"a\.json:2: not JSON: Expecting value"),
        ('[{"a": 1}\n {"a": 2}]', r"a\.json:2: not JSON: expected ',' or '\]'"),
        ('[{"a": 1},\n{"a": 2}', r"a\.json:2: not JSON: expected ','"),
        ('[{"a": 1}, 3]', r"a\.json row 2: a row must be a JSON object .* got int"),
        ('{"data":\n [1]}', r"a\.json:1: not JSON: .* one list of objects"),
    ],
)
def test_broken_json_list_names_line_or_row(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"query": "x"', r"bad\.jsonl:3: not JSON: .*one JSON object a line"),
        (b"[1, 2]", r"bad\.jsonl:3: a row must be a JSON object .* got list"),
        (b'{"query": "caf\xe9"}', r"bad\.jsonl:3: not UTF-8 at byte 14"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b'{"query": "a"}\n\n' + line + b'\n{"query": "b"}\n')
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / "bad.jsonl")
    assert caught.value.key == "data.dataset"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
def test_a_row_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As much is read of one as of the largest, not what a small file unpacks to."""
    path = save(tmp_path / name, ROWS)
    monkeypatch.setattr(row_files, "_BLOCK", 8)
    monkeypatch.setattr(row_files, "MAX_ROW", 100 << 20)
    assert read(path) == ROWS
    broken = ("[" if ".jsonl" not in name else "").encode() + b'{"query": "' + b"a" * (2 << 20)
    path.write_bytes(gzip.compress(broken) if name.endswith("gz") else broken)
    monkeypatch.setattr(row_files, "MAX_ROW", 1 << 20)
    with pytest.raises(UserError, match="a row of more than 1 MiB"):
        read(path)


def test_byte_order_mark_blank_lines_and_windows_ends_are_tolerated(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"q": 1}\r\n\r\n  \n{"q": 2}')
    assert list(find_source(str(tmp_path / "a.jsonl"))[0].rows()) == [
        (f"{tmp_path}/a.jsonl:1", {"q": 1}),
        (f"{tmp_path}/a.jsonl:4", {"q": 2}),
    ]


def test_missing_file_suggests_close_names(tmp_path: Path) -> None:
    save(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(UserError, match=r"no file trian\.jsonl in .*did you mean train\.jsonl\?"):
        find_source(str(tmp_path / "trian.jsonl"))
    with pytest.raises(UserError, match=r"directory .* does not exist"):
        find_source(str(tmp_path / "nowhere" / "train.jsonl"))
    with pytest.raises(UserError, match=r"data\.subset is for sets of the hub"):
        find_source(str(tmp_path / "train.jsonl"), subset="main")
    (tmp_path / "a.csv").write_text("q,r")
    with pytest.raises(UserError, match=r"unknown kind of file; .*\.parquet"):
        find_source(str(tmp_path / "a.csv"))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_damaged_file_is_an_error_of_the_user(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=re.escape(str(path))):
        read(path)


def test_directory_of_files_by_split(tmp_path: Path) -> None:
    save(tmp_path / "train-00000-of-00002.parquet", ROWS[:2])
    save(tmp_path / "train-00001-of-00002.parquet", ROWS[2:4])
    save(tmp_path / "test.jsonl", ROWS[4:])
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".train.jsonl").write_text("an editor's copy")
    assert read(tmp_path) == ROWS[:4]
    assert read(tmp_path, split="test") == ROWS[4:]
    with pytest.raises(UserError, match=r"no file of split 'validation' among test.jsonl, train-00000") as caught:
        read(tmp_path, split="validation")
    assert caught.value.key == "data.split"


def test_directory_without_split_names_is_read_whole(tmp_path: Path) -> None:
    save(tmp_path / "b.jsonl", ROWS[2:])
    save(tmp_path / "a.jsonl.gz", ROWS[:2])
    assert read(tmp_path) == ROWS
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no data files"):
        read(tmp_path / "empty")


def test_directory_of_save_to_disk(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(str(tmp_path / "one"))
    assert read(tmp_path / "one") == ROWS
    datasets.DatasetDict({"train": whole, "test": whole.select([1])}).save_to_disk(str(tmp_path / "many"))
    assert read(tmp_path / "many") == ROWS
    assert read(tmp_path / "many", split="test") == [ROWS[1]]
    with pytest.raises(UserError, match="no split 'dev', there is train, test"):
        read(tmp_path / "many", split="dev")
    prints = [find_source(str(tmp_path / "many"), split=split)[0].fingerprint() for split in ("train", "test")]
    assert prints[0] != prints[1]


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    one, two = save(tmp_path / "a.jsonl", ROWS), save(tmp_path / "b.jsonl", ROWS)
    assert find_source(str(one))[0].fingerprint() == find_source(str(two))[0].fingerprint()
    two.write_text(two.read_text().replace("clips", "chips"))
    assert find_source(str(one))[0].fingerprint() != find_source(str(two))[0].fingerprint()


def test_built_in_sets_come_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(name: str, subset: str | None, **options: Any) -> datasets.Dataset:
        asked.append((name, subset, options))
        return datasets.Dataset.from_list([{"instruction": "q", "response": "r"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub_source, "_hub_answers", lambda *_: True)
    source, columns = find_source("magicoder", split="train[:1%]", revision="abc")
    where, row = next(source.rows())
    assert asked == [("ise-uiuc/Magicoder-Evol-Instruct-110K", None, {"split": "train[:1%]", "revision": "abc"})]
    assert find_columns(row, where, columns).extract(row, where) == ("q", "r")
    assert BUILT_IN["metamathqa"] == ("meta-math/MetaMathQA", {"query": "query", "response": "response"})
    assert "abc" in source.fingerprint()


def test_hub_that_cannot_be_reached_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_source, "_hub_answers", lambda *_: False)
    with pytest.raises(UserError, match=r"hub cannot be reached.*datasets\.load_dataset\('no/such'\)"):
        find_source("no/such")[0].fingerprint()
    assert datasets.config.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset 'no/such' doesn't exist"), "Check the spelling"),
        (ValueError('Unknown split "trian". Should be one of [train]'), "split trian.*Unknown split"),
    ],
)
def test_hub_refusals_are_explained(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub_source, "_hub_answers", lambda *_: True)
    with pytest.raises(UserError, match=message):
        next(find_source("no/such", split="trian")[0].rows())


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"query": "q", "response": "r", "type": "x"}, ("q", "r")),
        ({"instruction": "i", "input": "c", "output": "o"}, ("i\n\nc", "o")),
        ({"instruction": "i", "input": "", "response": "r", "output": "o"}, ("i", "r")),
        ({"prompt": "p", "completion": "c"}, ("p", "c")),
        ({"question": "q", "answer": "a"}, ("q", "a")),
        ({"problem": "p", "solution": "s", "level": 3}, ("p", "s")),
        ({"input_ids": [1, 2], "query": "q", "response": "r"}, ([1, 2], None)),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, ([1, 2], [-100, 2])),
    ],
)
def test_known_columns_are_recognised(row: dict[str, Any], parts: Any) -> None:
    assert find_columns(row, "f:1", None).extract(row, "f:1") == parts


def test_columns_that_are_named() -> None:
    row = {"id": 3, "frage": "q", "antwort": "r"}
    columns = find_columns(row, "f:1", {"query": "frage", "response": "antwort"})
    assert columns.extract(row, "f:1") == ("q", "r")
    with pytest.raises(UserError, match="f:1: there is no column 'reply'; this row has id, frage, antwort"):
        find_columns(row, "f:1", {"query": "frage", "response": "reply"})
    with pytest.raises(UserError, match="no known columns among id, frage, antwort") as caught:
        find_columns(row, "f:1", None)
    assert caught.value.key == "data.columns"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "q"}, "f:9: there is no column 'response'; this row has query"),
        ({"query": "q", "response": None}, "f:9: column 'response' must be text, got null"),
        ({"query": 12, "response": "r"}, "f:9: column 'query' must be text, got int 12"),
        ({"query": "q", "response": "x\ud83d"}, r"f:9: column 'response' holds '\\ud83d' at character 1"),
    ],
)
def test_rows_that_lack_something(row: dict[str, Any], message: str) -> None:
    columns = find_columns({"query": "", "response": ""}, "f:1", None)
    with pytest.raises(UserError, match=message):
        columns.extract(row, "f:9")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "must be a list, got str 'hi'"),
        ([], "empty conversation"),
        ([{"content": "x"}], r"messages\[0\] must be"),
    ],
)
def test_messages_of_the_wrong_form(messages: Any, message: str) -> None:
    columns = find_columns({"messages": []}, "f:1", None)
    with pytest.raises(UserError, match=message):
        columns.extract({"messages": messages}, "f:2")
