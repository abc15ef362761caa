"""Equal examples, and the first examples of a set."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_data import rows_of, write_lines

from rasa_train.data.cache import TokenDataset
from rasa_train.data.config import DataConfig
from rasa_train.data.duplicates import distinct
from rasa_train.data.prepare import prepare
from rasa_train.errors import UserError

Jsonl = Callable[[list[Any]], str]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RASA_TRAIN_CACHE", str(tmp_path / "cache"))


def content(dataset: TokenDataset) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(tuple(example.input_ids.tolist()), tuple(example.labels.tolist())) for example in dataset]


def tokens(*examples: list[int], labels: list[int] | None = None) -> list[dict[str, Any]]:
    return [{"input_ids": ids, "labels": labels or ids} for ids in examples]


def test_the_first_of_equal_examples_stays(jsonl: Jsonl) -> None:
    rows = tokens([1, 2, 3], [4, 5], [1, 2, 3], [1, 2], [4, 5], [1, 2, 3])
    rows.insert(3, {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]})  # the tokens, but not the labels
    path = jsonl(rows)
    kept = prepare(DataConfig(dataset=path, deduplicate=True), None)
    assert [ids for ids, _ in content(kept.train)] == [(1, 2, 3), (4, 5), (1, 2, 3), (1, 2)]
    assert content(kept.train) == list(dict.fromkeys(content(prepare(DataConfig(dataset=path), None).train)))
    assert (kept.stats.duplicates, kept.stats.rows, kept.stats.examples, kept.stats.tokens) == (3, 7, 4, 10)
    assert "3 training examples equal an earlier one and are dropped" in kept.notes
    plain = prepare(DataConfig(dataset=path), None)
    assert (plain.stats.duplicates, plain.stats.examples) == (0, 7)
    assert plain.key != kept.key


def test_equal_examples_of_several_sets_and_of_the_held_out_one(tmp_path: Path) -> None:
    sets = [tokens([1, 2], [3, 4], [1, 2]), tokens([3, 4], [5, 6], [7, 8])]
    paths = [str(write_lines(tmp_path / f"{i}.jsonl", rows)) for i, rows in enumerate(sets)]
    held = str(write_lines(tmp_path / "held.jsonl", tokens([7, 8], [9, 10])))
    mix: Any = {"mix": [{"dataset": path} for path in paths], "validation": {"dataset": held}}
    drop = {"deduplicate": True}
    kept = prepare(DataConfig.model_validate(mix | drop), None)
    assert [ids for ids, _ in content(kept.train)] == [(1, 2), (3, 4), (5, 6)]
    assert (kept.stats.duplicates, kept.stats.held_out_examples) == (2, 1)
    assert kept.validation is not None and len(kept.validation) == 2
    told = prepare(DataConfig(**mix), None)
    assert (len(told.train), told.stats.held_out_examples) == (6, 1)
    assert any("1 training examples are held-out examples" in note for note in told.notes)
    again = str(write_lines(tmp_path / "again.jsonl", tokens([3, 4], [1, 2])))
    with pytest.raises(UserError, match=r"every example of .*again\.jsonl equals a held-out example"):
        prepare(DataConfig.model_validate({**mix, "mix": [{"dataset": paths[0]}, {"dataset": again}], **drop}), None)


def test_a_share_that_is_held_out_has_no_copy_of_what_is_trained_on(jsonl: Jsonl) -> None:
    rows = [example for i in range(40) for example in tokens([i, i + 1], [i, i + 1])]
    config = DataConfig.model_validate({"dataset": jsonl(rows), "deduplicate": True, "validation": {"size": 10}})
    prepared = prepare(config, None)
    assert prepared.validation is not None
    assert (len(prepared.train), len(prepared.validation)) == (30, 10)
    assert set(content(prepared.train)).isdisjoint(content(prepared.validation))


def test_views_of_views_are_compared_too(jsonl: Jsonl) -> None:
    whole = prepare(DataConfig(dataset=jsonl(tokens([1, 2], [3, 4], [1, 2], [5, 6]))), None).train
    found = distinct([whole.select([3, 2]), whole.select([0, 1, 3])], None, ["a", "b"], drop=True)
    assert [content(view) for view in found.views] == [content(whole.select([3, 2])), content(whole.select([1]))]
    assert found.duplicates == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_no_more_rows_are_read_than_needed(tmp_path: Path, bpe: Any, workers: int) -> None:
    lines = rows_of(700)
    good = write_lines(tmp_path / "good.jsonl", lines)
    broken = write_lines(tmp_path / "broken.jsonl", lines[:300])
    with open(broken, "a") as file:
        file.write("not JSON\n" * 5)
    config = DataConfig(dataset=str(broken), max_examples=300, num_workers=workers)
    first = prepare(config, bpe)
    whole = prepare(DataConfig(dataset=str(good)), bpe)
    assert content(first.train) == content(whole.train)[:300]
    assert (first.stats.rows, first.stats.examples) == (300, 300)
    with pytest.raises(UserError, match=r"broken\.jsonl:301: not JSON"):
        prepare(config.model_copy(update={"max_examples": 301}), bpe)
    held = {"dataset": str(good)}
    both = prepare(DataConfig.model_validate({"dataset": str(broken), "max_examples": 7, "validation": held}), bpe)
    assert (len(both.train), len(both.validation or ())) == (7, 700)
    assert both.stats.held_out_examples == 7


def test_rows_that_are_dropped_do_not_count_as_examples(jsonl: Jsonl) -> None:
    rows = [example for i in range(1, 30) for example in (*tokens([0] * 9), *tokens([i, i]))]
    config = DataConfig(dataset=jsonl(rows), max_examples=10, max_length=5, over_length="drop")
    assert [ids for ids, _ in content(prepare(config, None).train)] == [(i, i) for i in range(1, 11)]
