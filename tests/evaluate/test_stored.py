"""Results, responses and likelihoods on disk that are damaged, or that somebody else has written."""

from __future__ import annotations

import json
import os
import pickle
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from rasa_train.errors import UserError
from rasa_train.evaluate.generate import SampleFile
from rasa_train.evaluate.load import find_subjects
from rasa_train.evaluate.results import finished, result_path, writable, write_result

DEPENDS = {"protocol": {"a": 1}, "model": {"b": 2}}
RESULT = {
    "suite": "math",
    "checkpoint": "adapter",
    "step": 5,
    "epoch": None,
    "metrics": {"accuracy": 0.5},
    "questions": 2,
    "limit": None,
    **DEPENDS,
}


def test_a_result_is_found_again(tmp_path: Path) -> None:
    write_result(tmp_path, RESULT)
    assert finished(tmp_path, "math", "adapter", None, DEPENDS) == RESULT
    assert finished(tmp_path, "math", "adapter", 1, DEPENDS) is None
    assert finished(tmp_path, "code", "adapter", None, DEPENDS) is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "\0" * 100,
        "[" * 100_000,
        "{}",
        *(
            json.dumps({**RESULT, key: "x" if key != "suite" else 7})
            for key in RESULT
            if key not in ("limit", "checkpoint")
        ),
        json.dumps({**RESULT, "metrics": {"accuracy": "high"}}),
        json.dumps({**RESULT, "not_measured": 3}),
    ],
)
def test_a_damaged_result_is_one_line(content: str, tmp_path: Path) -> None:
    path = result_path(tmp_path, "math", "adapter")
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(UserError, match=r"adapter\.json.*Remove the file") as error:
        finished(tmp_path, "math", "adapter", None, DEPENDS)
    assert "\n" not in str(error.value)


def test_damaged_responses_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "adapter.samples.jsonl"
    file = SampleFile(path, DEPENDS)
    file.add({(0, 0): "first", (1, 0): "second"})
    bad = ["{", "[]", "7", '{"index": "0", "sample": 0, "response": ""}', '{"index": 2, "sample": 0, "response": 7}']
    with path.open("ab") as torn:
        torn.write("\n".join([*bad, "[" * 100_000]).encode() + b"\n\xff\xfe\n" + b'{"index": 3, "sam')
    again = SampleFile(path, DEPENDS)
    assert again.responses == {(0, 0): "first", (1, 0): "second"} and again.damaged == 7 and again.continued
    assert SampleFile(path, DEPENDS).damaged == 0, "they are gone"


@pytest.mark.parametrize("line", ["{", "[]", "7", "{}", '{"depends_on": []}', "\0", "[" * 100_000])
def test_responses_that_do_not_say_where_they_are_from_are_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"samples\.jsonl is damaged.*--fresh"):
        SampleFile(tmp_path / "samples.jsonl", DEPENDS)
    assert not SampleFile(tmp_path / "samples.jsonl", DEPENDS, fresh=True).responses


def test_a_place_for_results_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "evaluation").write_text("")
    with pytest.raises(UserError, match=r"evaluation cannot be written: .*--output"), writable(tmp_path / "evaluation"):
        pass


def test_results_are_not_written_through_a_link_out_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "victim").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("")
    (tmp_path / "run" / "evaluation").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match="evaluation is a link"):
        find_subjects(str(tmp_path / "run"), all_checkpoints=False, output=None)


class Planted:
    """A value that runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("table", ["unnamed", "likelihoods"])
def test_stored_likelihoods_of_others_run_no_code(table: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM, hash_args

    from rasa_train.evaluate.forgetting import _cached

    asked: list[int] = []

    class Model(LM):
        def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
            asked.append(len(requests))
            return [(-1.5, True) for _ in requests]

        def loglikelihood_rolling(self, requests: Any) -> Any:
            raise NotImplementedError

        def generate_until(self, requests: Any) -> Any:
            raise NotImplementedError

    request = Instance("loglikelihood", {}, ("question", "answer"), 0)
    cache, mark = tmp_path / "adapter.cache", tmp_path / "mark"
    planted = sqlite3.connect(cache)
    planted.execute(f"CREATE TABLE {table} (key TEXT PRIMARY KEY, value BLOB)")
    key = hash_args("loglikelihood", request.args)
    planted.execute(f"INSERT INTO {table} VALUES (?, ?)", (key, sqlite3.Binary(pickle.dumps(Planted(mark)))))
    planted.commit()
    planted.close()
    for _ in range(2):  # the second finds what the first has stored
        model = _cached(Model(), cache)
        assert model.loglikelihood([request]) == [(-1.5, True)]
        model.dbdict.close()
    assert asked == [1] and not mark.exists()
    cache.write_bytes(b"damaged" * 1000)
    model = _cached(Model(), cache)
    assert model.loglikelihood([request]) == [(-1.5, True)] and asked == [1, 1]
    model.dbdict.close()
