"""The summary of a finished run: the content of ``summary.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NotRequired, TypedDict

from ..evaluate.suites import HEADLINE


class Score(TypedDict):
    """A suite's headline metric, in [0, 1], after a step."""

    step: int
    epoch: float
    value: float


class Evaluations(TypedDict):
    """What ``training.evaluate`` has found."""

    suite: str
    metric: str
    best: Score
    last: Score


class Summary(TypedDict):
    """The content of ``summary.json``."""

    method: str
    trainable_parameters: int
    effective_rank: dict[str, int]
    steps: int
    epochs: float
    examples: int
    tokens: int
    supervised_tokens: int
    seconds: float
    loss: float | None
    """Loss of the last step that was not skipped; None if all were."""
    skipped_steps: int
    validation_loss: float | None
    peak_memory_bytes: int
    strategy: str
    versions: dict[str, str]
    workers: int
    base_difference: NotRequired[float]
    """Relative difference that ``model.base`` makes, if it holds the base in fewer bits."""
    evaluation: NotRequired[Evaluations | None]


def best_of(metrics: Path) -> Evaluations | None:
    """Return the best and the last of the ``eval_SUITE`` values in a run's metrics; None if there are none."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    scored = [(row, key) for row in rows for key in row if key.startswith("eval_")]
    if not scored:
        return None
    key = scored[-1][1]
    own = [Score(step=row["step"], epoch=row["epoch"], value=row[key]) for row, name in scored if name == key]
    return {
        "suite": key.removeprefix("eval_"),
        "metric": HEADLINE[key.removeprefix("eval_")],
        "best": max(own, key=lambda point: point["value"]),
        "last": own[-1],
    }
