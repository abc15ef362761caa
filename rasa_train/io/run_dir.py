"""The run directory: the files that belong to a run, the check that it holds the same run, and the lock of its writer.

recipe.yaml  metrics.jsonl  checkpoints/step-00000123/  adapter/  summary.json
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError, first_line
from .atomic import remove, write_text
from .json_file import read_bytes, read_object
from .links import refuse_links_out
from .yaml_lines import MAX_BYTES, parse

OWN = ("summary.json", "adapter", "checkpoints", "skipped", "trackers", "metrics.jsonl", "recipe.yaml")
"""Files and directories that ``--fresh`` removes; anything else in the run directory belongs to the user. In this order
what is left at any moment is a run that is not complete, and the recipe tells which run."""

READ = ("recipe.yaml", "metrics.jsonl", "checkpoints", "adapter", "summary.json", "skipped", "evaluation")
"""Files and directories of a run that commands read or write."""
LARGEST_METRICS = 1 << 29
"""Bytes of the largest ``metrics.jsonl`` that is read, which is more than a million steps."""

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
    "training.kernels",
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
        """Make the directory. Raises ``UserError`` if it cannot be written, or if a link leads out of it."""
        self.refuse_links()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise self.unwritable(error) from None

    def refuse_links(self) -> None:
        """Raise ``UserError`` if one of the files and directories of the run is a link that leads out of it."""
        refuse_links_out(self.path, (*READ, ".lock"))
        if os.path.islink(trackers := self.path / "trackers"):  # what is in it belongs to the tracker
            refuse_links_out(self.path, [trackers.name])

    def unwritable(self, error: OSError) -> UserError:
        where = f" ({error.filename})" if isinstance(error.filename, str) and error.filename != str(self.path) else ""
        said = f"output_dir: {self.path} cannot be written: {error.strerror or error}{where}"
        return UserError(said, key="output_dir")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the directory, and remove what a killed run left half written or half removed. A killed run leaves no
        lock behind. Raises ``UserError`` if another run has locked it."""
        try:
            descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            raise self.unwritable(error) from None
        with open(descriptor, "r+") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:  # the other name may be somebody's file
                raise UserError(f"{self.path}/.lock is not a file of its own: remove it", key="output_dir")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise UserError(f"output_dir: {self.path} is in use by {holder}", key="output_dir") from None
            file.truncate(0)
            file.write(f"process {os.getpid()}")
            file.flush()
            own = [left for name in OWN for left in self.path.glob(f".{name}.*")]
            for left in [*own, *self.checkpoints.glob(".step-*")]:
                remove(left)
            yield

    def clear(self) -> None:
        """Remove the run in this directory (``--fresh``), and nothing else."""
        for name in OWN:
            remove(self.path / name)

    def check_same_run(self, recipe_yaml: str, completed: Callable[[str], str], alike: Iterable[str] = ()) -> None:
        """Raise ``UserError`` with the differences if the run in this directory was started from a recipe that computes
        something else. ``completed`` writes out what the recipe of an older version leaves to defaults; ``alike`` names
        more keys that may differ."""
        if not self.recipe.exists():
            return
        try:
            stored = yaml.safe_dump(self.stored_recipe(), sort_keys=False)
        except UserError as error:
            raise UserError(
                f"output_dir: {error}. Choose another output_dir, or start over with --fresh (which deletes the run "
                "there)",
                key="output_dir",
            ) from None
        old, new = (flatten(yaml.safe_load(text)) for text in (completed(stored), recipe_yaml))
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
        lines = self._lines()
        kept = [(step, line) for line in lines if (step := _step(line)) and step <= last_step]
        if lines:
            write_text(self.metrics, "".join(line + "\n" for _, line in kept))
        return sorted(set(range(1, last_step + 1)) - {step for step, _ in kept})

    def rows(self) -> list[Any]:
        """Return the metrics that this run has written: the JSON object of each step."""
        return [json.loads(line) for line in self._lines() if _step(line)]

    def _lines(self) -> list[str]:
        try:
            return self.read("metrics.jsonl", LARGEST_METRICS).decode(errors="replace").split("\n")
        except FileNotFoundError:
            return []

    def log(self, row: Mapping[str, object]) -> None:
        descriptor = os.open(self.metrics, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        with open(descriptor, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def read(self, name: str, largest: int) -> bytes:
        """Return the content of a file of the run.

        Raises:
            FileNotFoundError: the run has no such file.
            UserError: the file is a link that leads out of the directory, is too large, or cannot be read.
        """
        refuse_links_out(self.path, [name])
        return read_bytes(self.path / name, largest)

    def read_summary(self) -> dict[str, Any]:
        """Return the content of ``summary.json``. Raises as ``read``, and ``UserError`` if it is damaged."""
        refuse_links_out(self.path, [self.summary.name])
        return read_object(self.summary)

    def stored_recipe(self) -> dict[str, Any]:
        """Return the content of ``recipe.yaml``. Raises as ``read``, and ``UserError`` if it is damaged."""
        content = self.read(self.recipe.name, MAX_BYTES)
        try:
            value, _ = parse(content.decode(), str(self.recipe))
        except UnicodeDecodeError as error:
            raise UserError(f"{self.recipe} is damaged: it is not UTF-8 text: {error.reason}") from None
        except UserError as error:
            raise UserError(first_line(error)) from None  # the second line quotes the file
        if not isinstance(value, dict):
            raise UserError(f"{self.recipe} is damaged: it must hold a mapping, got {type(value).__name__}")
        return value


def _step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def step_number(checkpoint: Path) -> int:
    """Return the step that a checkpoint is named after."""
    return int(checkpoint.name.removeprefix("step-"))


def best_step(checkpoint: Path) -> int | None:
    """Return the step that was the best of a run at a checkpoint of it; None if it names none, or cannot be read."""
    try:
        watched = read_object(checkpoint / "trainer.json").get("watched")
        step = watched["best"]["step"] if isinstance(watched, dict) else None
    except (OSError, UserError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def numbered(checkpoints: Path) -> list[Path]:
    """Return what bears the name of a checkpoint, by step. It may be damaged, and need not be a directory."""
    found = [path for path in checkpoints.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(found, key=step_number)


def flatten(value: object, prefix: str = "") -> dict[str, object]:
    """Return a nested mapping with flat keys: ``{"adapter": {"r": 8}}`` -> ``{"adapter.r": 8}``."""
    if not isinstance(value, dict):
        return {prefix: value}
    items = [flatten(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in value.items()]
    return {key: v for item in items for key, v in item.items()}
