"""What the YAML files of e2e, samsum and wikisql refer to: rows and prompts."""

from __future__ import annotations

import json
from typing import Any

import datasets

from rasa_train.data.encode import prompt_text
from rasa_train.evaluate.nlg_sets import load
from rasa_train.evaluate.problems import Row


def e2e_rows(data: str | None = None, **metadata: Any) -> dict[str, Any]:
    return _rows("e2e", data)


def samsum_rows(data: str | None = None, **metadata: Any) -> dict[str, Any]:
    return _rows("samsum", data)


def wikisql_rows(data: str | None = None, **metadata: Any) -> dict[str, Any]:
    return _rows("wikisql", data)


def alpaca_prompt(doc: Row) -> str:
    return prompt_text("alpaca", doc["query"])


def together(doc: Row, results: list[str]) -> dict[str, float]:
    """Refuse: there is no mean over the questions that is the published score."""
    raise RuntimeError("the scores of this task are those of all texts together: run rasa-eval --suite instead")


def _rows(suite: str, data: str | None) -> dict[str, Any]:
    """Return the rows with everything but the query as JSON, since a table's column may hold text and numbers."""
    rows = [
        {key: value if key == "query" else json.dumps(value) for key, value in row.items()} for row in load(suite, data)
    ]
    return {"test": datasets.Dataset.from_list(rows)}
