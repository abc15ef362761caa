"""Rows of texts and labels become what the tokenizer itself makes of them, with the right answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_data import write_lines
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rasa_train.data.built_in import GLUE
from rasa_train.data.config import DataConfig, ValidationConfig
from rasa_train.data.prepare import PreparedData, prepare, prepare_texts
from rasa_train.errors import UserError
from rasa_train.models.task import Head, TaskConfig

Jsonl = Callable[[Iterable[Any]], str]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "it", "was", "good", "bad", "very", "not"]


@pytest.fixture(scope="module")
def bert() -> PreTrainedTokenizerFast:
    """A tokenizer with BERT's form of texts and pairs."""
    backend = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}, "[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    options = {"pad_token": "[PAD]", "model_max_length": 40, "model_input_names": names}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def prepared(tokenizer: Any, path: str, problem: Any = None, labels: Any = None, **data: Any) -> PreparedData:
    task = TaskConfig(name="classification", problem=problem, labels=labels)
    return prepare(DataConfig(dataset=path, num_workers=1, **data), tokenizer, task=task)


def sentence(rng: random.Random, most: int = 12) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))


@pytest.mark.parametrize("columns", [("text",), ("sentence",), ("sentence1", "sentence2"), ("premise", "hypothesis"),
                                     ("question", "sentence"), ("question1", "question2")])  # fmt: skip
@pytest.mark.parametrize("max_length", [4096, 11])
def test_tokens_are_the_tokenizers_own(columns: tuple[str, ...], max_length: int, bert: Any, jsonl: Jsonl) -> None:
    rng = random.Random(0)
    rows = [{name: sentence(rng) for name in columns} | {"label": i % 3, "idx": i} for i in range(30)]
    data = prepared(bert, jsonl(rows), max_length=max_length)
    assert data.head == Head(("0", "1", "2")) and data.notes == []
    truncated = 0
    for example, row in zip(data.train, rows, strict=True):  # type: ignore[call-overload]
        texts = [row[name] for name in columns]
        expected = bert(*texts, truncation="longest_first", max_length=min(max_length, 40), return_token_type_ids=True)
        assert example.input_ids.tolist() == expected["input_ids"]
        assert example.token_types.tolist() == expected["token_type_ids"]
        assert example.labels.tolist() == [row["label"]]
        truncated += len(bert(*texts)["input_ids"]) > max_length
    assert data.stats.truncated == truncated and data.stats.supervised_tokens == len(data.train) == 30


def test_too_long_texts_can_be_dropped_but_not_when_they_are_judged(bert: Any, jsonl: Jsonl) -> None:
    path = jsonl([{"text": " ".join(["cat"] * n), "label": n % 2} for n in (3, 4, 50, 60)])
    data = prepared(bert, path, max_length=10, over_length="drop")
    assert (len(data.train), data.stats.dropped_over_length) == (2, 2)
    assert data.head is not None
    judged = prepare_texts(DataConfig(dataset=path, max_length=10, over_length="drop"), bert, data.head)
    assert judged.answers.tolist() == [[1], [0], [0], [0]] and judged.lengths.tolist() == [5, 6, 10, 10]


@pytest.mark.parametrize(
    ("problem", "given", "values", "labels", "answers"),
    [
        (None, None, ["no", "yes", "no"], ("no", "yes"), [[0], [1], [0]]),
        (None, None, [10, 9, 10], ("9", "10"), [[1], [0], [1]]),
        (None, None, [True, False, True], ("false", "true"), [[1], [0], [1]]),
        (None, ["bad", "good"], [1, 0, "good"], ("bad", "good"), [[1], [0], [1]]),
        (None, ["bad", "good"], [1.0, 0.0, 1.0], ("bad", "good"), [[1], [0], [1]]),
        (None, ["2", "1"], [1, 2, 1], ("2", "1"), [[1], [0], [1]]),
        ("multi_label", None, [["b"], [], ["a", "b"]], ("a", "b"), [[0, 1], [0, 0], [1, 1]]),
        ("multi_label", ["a", "b", "c"], [[2], [], ["a", 1]], ("a", "b", "c"), [[0, 0, 1], [0, 0, 0], [1, 1, 0]]),
        ("regression", None, [0.25, -1, 5], (), [[0.25], [-1], [5]]),
    ],
)
def test_answers(
    problem: Any, given: Any, values: list[Any], labels: Any, answers: Any, bert: Any, jsonl: Jsonl
) -> None:
    path = jsonl({"text": "cat", "label": value} for value in values)
    for _ in range(2):  # made, and found in the cache
        data = prepared(bert, path, problem, given)
        assert data.head == Head(labels, problem or "single_label")
        assert data.train.answers.tolist() == answers


def test_held_out_rows_have_the_labels_of_the_training_rows(bert: Any, tmp_path: Path) -> None:
    train = write_lines(tmp_path / "a.jsonl", [{"text": "cat", "label": name} for name in "abc"])
    dev = write_lines(tmp_path / "b.jsonl", [{"text": "mat", "label": name} for name in "cb"])
    data = prepared(bert, str(train), validation=ValidationConfig(dataset=str(dev)))
    assert data.validation is not None and data.validation.answers.tolist() == [[2], [1]]
    write_lines(dev, [{"text": "mat", "label": "d"}])
    with pytest.raises(UserError, match=r"b.jsonl:1: the label 'd' is not in the list of labels, a, b, c"):
        prepared(bert, str(train), validation=ValidationConfig(dataset=str(dev)))


def test_columns_are_named_or_recognised(bert: Any, jsonl: Jsonl) -> None:
    path = jsonl([{"a": "cat", "b": "mat", "c": 0, "d": 1}, {"a": "on", "b": "it", "c": 1, "d": 1}])
    data = prepared(bert, path, columns={"text": "a", "text_pair": "b", "label": "c"})
    assert data.train[0].input_ids.tolist() == bert("cat", "mat")["input_ids"]
    assert data.notes == ["columns of the data that are not used: d"]
    with pytest.raises(UserError, match=r"needs a text and its label.*this row has a, b, c, d.*data.columns: {text"):
        prepared(bert, path)
    with pytest.raises(UserError, match=r"jsonl:1: there is no column 'x'; this row has a, b, c, d"):
        prepared(bert, path, columns={"text": "x", "label": "c"})


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ({}, [("cat", 0), ("mat", 0)], "all rows have the label '0' in .*nothing to learn"),
        ({"labels": ["a", "b"]}, [("cat", 1), ("mat", 1)], "all rows have the label 'b' in the 2 training rows"),
        ({"labels": ["a", "b"]}, [("cat", 0), ("mat", 2)], "jsonl:2: the label 2 is not in the list"),
        ({"labels": ["a", "b"]}, [("cat", "A"), ("mat", "b")], "jsonl:1: the label 'A' is not in the list"),
        ({}, [("cat", 0), ("mat", 1), ("on", -1)], "jsonl:3: the label is -1, which marks rows without a label"),
        ({}, [("cat", 0), ("  ", 1)], "jsonl:2: column 'text' is an empty text"),
        ({}, [("cat", 0), (None, 1)], "jsonl:2: column 'text' must be text, got null"),
        ({}, [("cat", 0), ("mat", None)], "jsonl:2: the label null must be the name or number of a label"),
        ({}, [("cat", 0.5), ("mat", 1)], "jsonl:1: the label 0.5 is no label; for numbers set .* regression"),
        ({}, [("cat", ["a"]), ("mat", ["b"])], "jsonl:1: the label .* several labels set .* multi_label"),
        ({"problem": "multi_label"}, [("cat", "a")], "jsonl:1: the label 'a' must be a list of labels"),
        ({"problem": "multi_label"}, [("cat", []), ("mat", [])], "no row has a label"),
        ({"problem": "regression"}, [("cat", "5")], "jsonl:1: the label '5' must be a finite number"),
        ({"problem": "regression"}, [("cat", 1), ("mat", float("nan"))], "jsonl:2: the label nan must be"),
    ],
)  # fmt: skip
def test_wrong_rows_are_named(task: Any, rows: Any, message: str, bert: Any, jsonl: Jsonl) -> None:
    path = jsonl({"text": text, "label": label} for text, label in rows)
    with pytest.raises(UserError, match=message):
        prepared(bert, path, **task)


def test_a_limit_below_the_special_tokens_is_refused(bert: Any, jsonl: Jsonl) -> None:
    path = jsonl([{"text": "cat", "label": 0}, {"text": "mat", "label": 1}])
    with pytest.raises(UserError, match=r"data\.max_length: 2 leaves no room"):
        prepared(bert, path, max_length=2)


def test_rows_of_the_other_task_are_told_of_it(bert: Any, jsonl: Jsonl) -> None:
    with pytest.raises(UserError, match="or set task: classification, for texts and their labels"):
        prepare(DataConfig(dataset=jsonl([{"text": "cat", "label": 0}])), bert)
    with pytest.raises(UserError, match="or leave out task: classification for rows of queries and responses"):
        prepared(bert, jsonl([{"query": "cat", "response": "mat"}]))


def test_glue_is_as_on_the_hub() -> None:
    """Columns and the order of label names as on the set's page of the hub."""
    assert {name: (*one.texts, *one.labels) for name, one in GLUE.items()} == {
        "glue/sst2": ("sentence", "negative", "positive"),
        "glue/cola": ("sentence", "unacceptable", "acceptable"),
        "glue/mrpc": ("sentence1", "sentence2", "not_equivalent", "equivalent"),
        "glue/qqp": ("question1", "question2", "not_duplicate", "duplicate"),
        "glue/stsb": ("sentence1", "sentence2"),
        "glue/rte": ("sentence1", "sentence2", "entailment", "not_entailment"),
        "glue/qnli": ("question", "sentence", "entailment", "not_entailment"),
        "glue/mnli": ("premise", "hypothesis", "entailment", "neutral", "contradiction"),
    }


def test_glue_by_name(bert: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's set as the library ``datasets`` gives it, and without a network an answer that says what to do."""
    import datasets

    asked = []

    def load(name: str, subset: str, split: str, revision: str | None) -> Any:
        asked.append((name, subset, split))
        rows = [{"question1": "cat", "question2": "" if i == 1 else "mat", "label": i % 2, "idx": i} for i in range(4)]
        return datasets.Dataset.from_list(rows[: 4 if split == "train" else 2])

    with pytest.raises(UserError, match=r"glue.*cannot be reached.*load_dataset\('nyu-mll/glue', 'qqp'\)"):
        prepared(bert, "glue/qqp")
    monkeypatch.setattr(datasets, "load_dataset", load)
    data = prepared(bert, "glue/qqp", validation=ValidationConfig(dataset="glue/qqp"))
    assert data.head == Head(("not_duplicate", "duplicate")) and data.train.answers.tolist() == [[0], [1], [0], [1]]
    assert asked == [("nyu-mll/glue", "qqp", "train"), ("nyu-mll/glue", "qqp", "validation")]
    with pytest.raises(UserError, match=r"task\.problem: glue/stsb is regression, got multi_label"):
        prepared(bert, "glue/stsb", "multi_label")
    with pytest.raises(UserError, match=r"data\.subset: glue/qqp names the subset already"):
        prepared(bert, "glue/qqp", subset="qqp")


def test_a_set_of_many_rows_is_encoded_in_processes(bert: Any, jsonl: Jsonl) -> None:
    path = jsonl({"text": " ".join(WORDS[: 1 + i % 9]), "label": "ab"[i % 2]} for i in range(600))
    task = TaskConfig(name="classification")
    config = DataConfig(dataset=path, num_workers=2)
    data = prepare(config, bert, task=task, pool_threshold=256)
    assert data.train.answers[:, 0].tolist() == [0, 1] * 300
    assert data.train.lengths.tolist() == [3 + i % 9 for i in range(600)]
    assert np.array_equal(data.train.select([5])[0].input_ids, data.train[5].input_ids)
