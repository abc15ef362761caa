"""The run directory: the files that belong to a run, the check that it holds the same run, and the lock of its writer.

recipe.yaml  metrics.jsonl  checkpoints/step-00000123/  adapter/  summary.json
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from .atomic import write_text

OWN = ("summary.json", "adapter", "checkpoints", "skipped", "trackers", "metrics.jsonl", "recipe.yaml")
"""Files and directories that ``--fresh`` removes; anything else in the run directory belongs to the user. In this order
what is left at any moment is a run that is not complete, and the recipe tells which run."""

HARMLESS = {
    "output_dir",
    "tracking",
    "distributed",
    "data.num_workers",
    "data.cache_dir",
    "training.micro_batch_size",
    "training.micro_batch_tokens",
    "training.padding_free",
    "training.activation_checkpointing",
    "training.activation_offload",
    "training.compile",
    "training.checkpoint_every",
    "training.keep_last",
    "training.validate_every",
    "training.log_every",
    "training.evaluate",
    "training.max_skipped",
}
"""Keys of a recipe that may change between two starts of one run, because they do not alter what is computed."""


class RunDirectory:
    """Paths of one run, its metrics and its lock."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.summary = self.path / "summary.json"
        self.skipped = self.path / "skipped"

    def create(self) -> None:
        """Make the directory. Raises ``UserError`` if it cannot be written."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"output_dir: {self.path} cannot be written: {error.strerror}", key="output_dir") from None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the directory. Raises ``UserError`` if another run has locked it. A killed run leaves no lock behind."""
        with (self.path / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise UserError(f"output_dir: {self.path} is in use by {holder}", key="output_dir") from None
            file.truncate(0)
            file.write(f"process {os.getpid()}")
            file.flush()
            yield

    def clear(self) -> None:
        """Remove the run in this directory (``--fresh``), and nothing else."""
        for name in OWN:
            path = self.path / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def check_same_run(self, recipe_yaml: str, completed: Callable[[str], str], alike: Iterable[str] = ()) -> None:
        """Raise ``UserError`` with the differences if the run in this directory was started from a recipe that computes
        something else. ``completed`` writes out what the recipe of an older version leaves to defaults; ``alike`` names
        more keys that may differ."""
        if not self.recipe.exists():
            return
        old, new = (flatten(yaml.safe_load(text)) for text in (completed(self.recipe.read_text()), recipe_yaml))
        harmless = HARMLESS | set(alike)
        if new.get("training.loss_average") == "micro_batch":
            harmless.remove("training.micro_batch_size")
        changed = [
            f"  {key}: {old.get(key, '(absent)')} -> {new.get(key, '(absent)')}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and not any(f"{key}.".startswith(f"{name}.") for name in harmless)
        ]
        if changed:
            raise UserError(
                f"{self.path} holds a run of another recipe:\n" + "\n".join(changed) + "\n"
                "Choose another output_dir, or start over with --fresh (which deletes that run).",
                key="output_dir",
            )

    def start_metrics(self, last_step: int) -> list[int]:
        """Drop the lines after ``last_step`` (steps after the last checkpoint, which the resumed run repeats) and an
        incomplete last line. Returns the steps up to ``last_step`` that have no line."""
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        kept = [(step, line) for line in lines if (step := _step(line)) and step <= last_step]
        if lines:
            write_text(self.metrics, "".join(line + "\n" for _, line in kept))
        return sorted(set(range(1, last_step + 1)) - {step for step, _ in kept})

    def rows(self) -> list[Any]:
        """Return the metrics that this run has written: the JSON object of each step."""
        return [json.loads(line) for line in self.metrics.read_text().splitlines()] if self.metrics.exists() else []

    def log(self, row: Mapping[str, object]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def flatten(value: object, prefix: str = "") -> dict[str, object]:
    """Return a nested mapping with flat keys: ``{"adapter": {"r": 8}}`` -> ``{"adapter.r": 8}``."""
    if not isinstance(value, dict):
        return {prefix: value}
    items = [flatten(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in value.items()]
    return {key: v for item in items for key, v in item.items()}
