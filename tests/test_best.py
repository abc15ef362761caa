"""The best step of a run: chosen by a measurement, kept, found again by every command; and runs that stop early."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rasa_train import RaSA, UserError, load_adapter
from rasa_train.evaluate.load import find_subjects
from rasa_train.training.best import Watched
from rasa_train.training.evaluation import Score
from rasa_train.training.trainer import Trainer

from .conftest import Cli

# Lion at this rate soon learns the 36 rows by heart, and the loss of the four others rises again.
STOPS = (
    "training.keep_best=validation_loss",
    "training.early_stopping={patience: 4}",
    "training.validate_every=1",
    "training.keep_last=1",
)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def decisions(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if "best" in line and line.startswith("step")]


def decided(values: list[float], patience: int) -> tuple[int, int]:
    """The best step and the last one, by the definition: the earliest lowest value, and the first step after
    ``patience`` others that are not lower than those before."""
    for last in range(1, len(values) + 1):
        lowest = values.index(min(values[:last])) + 1
        if last - lowest >= patience:
            return lowest, last
    return values.index(min(values)) + 1, len(values)


def steps_kept(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def test_try(recipe: Path, cli: Cli) -> None:
    done = cli("train", recipe, *STOPS)
    print(done.stderr, done.stdout)
    print([r.get("validation_loss") for r in rows(recipe.parent/"run")])
    print(steps_kept(recipe.parent / "run"), (recipe.parent/"run/summary.json").read_text())
    assert 0
