"""The result of every step and check, on disk as soon as it is known. Needs the standard library alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

OK, FAILED, TIMED_OUT, LEFT_OUT = "ok", "failed", "out of time", "left out"
NEEDS_GPU, NOT_INSTALLED = "needs a GPU", "not installed"
"""Outcomes. ``needs a GPU`` and ``not installed`` say that something could not run, not that it went wrong."""

EXIT_NEEDS_GPU = 77
"""Exit code of a worker none of whose checks can run here; the code that test harnesses use for a skipped test."""

Row = dict[str, Any]


class Results:
    """The files of one output directory.

    ``results.jsonl`` has a line for each step (``step``, ``outcome``, ``seconds``, ``figure``) and for each check of a
    step (``step``, ``check``, ``outcome``, ``seconds``, ``values``, ``why``). Where a name occurs twice the later line
    holds: steps that were left out can be run later into the same directory.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / "results.jsonl"
        self.log = directory / "steps.log"
        self.comparisons = directory / "bench.jsonl"

    def add(self, row: Row) -> None:
        """Append a line to results.jsonl."""
        _append(self.file, row)

    def add_comparison(self, row: Row) -> None:
        """Append a line to bench.jsonl."""
        _append(self.comparisons, row)

    def steps(self) -> dict[str, Row]:
        """The line of each step by its name."""
        return {row["step"]: row for row in _read(self.file) if "check" not in row}

    def checks(self, step: str | None = None) -> dict[str, Row]:
        """The line of each check by its name: all checks, or those of one step."""
        rows = [row for row in _read(self.file) if "check" in row]
        return {row["check"]: row for row in rows if step in (None, row["step"])}

    def comparison(self, step: str) -> Row | None:
        """What rasa-bench printed in this step, with its command; None if it printed nothing."""
        found = [row for row in _read(self.comparisons) if row["step"] == step]
        return found[-1] if found else None


def _append(file: Path, row: Row) -> None:
    with file.open("a") as opened:
        opened.write(json.dumps(row) + "\n")


def _read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
