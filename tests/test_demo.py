"""The demo's problems are right and disjoint, its model is small and loads, and the whole of it runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rasa_train.data.config import DataConfig
from rasa_train.data.demo_problems import extract_answer, held_out, training_problems
from rasa_train.data.prepare import prepare
from rasa_train.demo.__main__ import remember
from rasa_train.demo.classify import _GOOD as GOOD
from rasa_train.demo.classify import compare, reviews, table
from rasa_train.models.config import ModelConfig
from rasa_train.report.runs import find_runs, read_run, read_runs


def test_problems_are_deterministic_disjoint_and_right() -> None:
    train, test = training_problems(), held_out()
    assert (train, test) == (training_problems(), held_out()) and (len(train), len(test)) == (3000, 400)
    assert not {p["query"] for p in train} & {p["query"] for p in test}
    sums = 0
    for problem in [*train, *test]:
        assert set(problem) == {"query", "response", "type"}
        answer = extract_answer(problem["response"])
        assert answer is not None and re.fullmatch(r"\d+", answer)
        assert problem["response"].splitlines()[-1] == f"The answer is: {answer}"
        for a, sign, b, c in re.findall(r"(\d+) ([-+*x]) (\d+) = (\d+)", problem["response"]):
            sums += 1
            assert {"+": int(a) + int(b), "-": int(a) - int(b)}.get(sign, int(a) * int(b)) == int(c)
    assert sums > 3000


@pytest.mark.parametrize(
    ("text", "answer"),
    [("The answer is: 5", "5"), ("The answer is: 5\nThe answer is: 6.", "6"), ("It is 5", None), ("", None)],
)
def test_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_the_model_is_small_and_needs_no_network() -> None:
    path = Path(ModelConfig(name="demo").name)
    assert sum(p.stat().st_size for p in path.iterdir()) < 5_000_000
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert model.num_parameters() < 2_000_000 and tokenizer.pad_token is None, "like Llama: no pad token"
    data = prepare(DataConfig(dataset="demo", max_length=192), tokenizer)
    assert data.stats.examples == 3000 and data.stats.truncated == 0
    first = data.train[0]
    assert first.input_ids[0] == tokenizer.bos_token_id and list(first.input_ids).count(tokenizer.bos_token_id) == 1
    assert first.input_ids[-1] == first.labels[-1] == tokenizer.eos_token_id


def test_the_report_knows_the_score_of_the_demo(tmp_path: Path) -> None:
    remember(tmp_path / "rasa", {"steps": 188, "epochs": 1.0, "exact_match": 0.75}, 200)
    assert read_run(tmp_path / "rasa", "rasa").best_and_last() == {"demo exact_match": (0.75, 0.75)}


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rasa_train.demo", "--output", str(tmp_path), "--questions", "50"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    base, lora, rasa = json.loads((tmp_path / "demo.json").read_text())
    assert base["exact_match"] < 0.1 and min(lora["exact_match"], rasa["exact_match"]) > 0.5
    assert abs(rasa["trainable_parameters"] / lora["trainable_parameters"] - 1) < 0.01
    assert "RaSA" in done.stdout and "exact match" in done.stdout
    for run in read_runs(find_runs([tmp_path])):
        row = rasa if run.name == "rasa" else lora
        assert run.best_and_last() == {"demo exact_match": (row["exact_match"], row["exact_match"])}
        assert run.last_loss == row["loss"]


def test_reviews_are_deterministic_disjoint_and_need_more_than_a_word() -> None:
    train = reviews(2, 300)
    dev = reviews(3, 300, train)
    assert (train, dev) == (reviews(2, 300), reviews(3, 300, train))
    assert not {row["text"] for row in train} & {row["text"] for row in dev}
    for row in [*train, *dev]:
        last = row["text"].split(" but ")[-1].split()[2:]  # after the DISH
        turned, word = last[1] in ("not", "never"), last[2 if last[1] in ("not", "never") else 1]
        assert row["label"] == ("positive" if (word in GOOD) != turned else "negative")


@pytest.mark.slow
def test_the_demo_of_classifiers(tmp_path: Path) -> None:
    results = compare(tmp_path, lambda line: None)
    assert list(results["methods"]) == ["full fine-tuning", "BitFit", "LoRA", "RaSA"]
    assert all(row["accuracy"] > results["majority"] for row in results["methods"].values())
    lora, rasa = (results["methods"][name]["trainable_parameters"] for name in ("LoRA", "RaSA"))
    assert abs(rasa / lora - 1) < 0.01
    assert "majority label" in table(results)
