"""What the YAML files beside this one refer to: rows, prompts that are no template, scores of one question."""

from __future__ import annotations

from functools import cache
from typing import Any

import datasets

from rasa_train.data.encode import prompt_text
from rasa_train.evaluate.answers import Checker
from rasa_train.evaluate.passk import mean_pass_at_k
from rasa_train.evaluate.problems import Row, code_candidate, load, program
from rasa_train.evaluate.sandbox import Sandbox
from rasa_train.evaluate.score import score_code as verdicts_of
from rasa_train.evaluate.score import score_math as answers_of


def math_rows(data: str | None = None, **metadata: Any) -> dict[str, Any]:
    return {"test": datasets.Dataset.from_list(_same_keys(load("math", data)))}


def gsm8k_rows(data: str | None = None, **metadata: Any) -> dict[str, Any]:
    return {"test": datasets.Dataset.from_list(_same_keys(load("gsm8k", data)))}


def code_rows(data: str | None = None, **metadata: Any) -> dict[str, Any]:
    return {"test": datasets.Dataset.from_list(_same_keys(load("code", data)))}


def code_prompt(doc: Row) -> str:
    """The response begins with the problem's own prompt; the whole text without white space at its ends."""
    text: str = prompt_text("alpaca", doc["instruction"]) + doc["prompt"]
    return text.strip()


def score_math(doc: Row, results: list[str]) -> dict[str, float]:
    (row,) = answers_of([doc], results[:1], checker=_checker())
    return {
        "math_sympy": float(row["math_sympy"]),
        "math_sympy_or_string": float(row["math_sympy_or_string"]),
        "accuracy": float(row["correct"]),
    }


def score_code(doc: Row, results: list[Any]) -> dict[str, float]:
    responses = results[0] if isinstance(results[0], list) else results
    programs = [(doc["task_id"], program(doc, code_candidate(doc, text))) for text in responses]
    rows = verdicts_of(programs, Sandbox())
    return mean_pass_at_k([(len(rows), sum(row["passed"] for row in rows))])


@cache
def _checker() -> Checker:
    """One for all questions: to start it takes seconds."""
    return Checker(workers=1)


def _same_keys(rows: list[Row]) -> list[Row]:
    keys = set.intersection(*(set(row) for row in rows))
    return [{key: str(row[key]) for key in sorted(keys)} for row in rows]
