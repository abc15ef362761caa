"""The table at the end, for a terminal with 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from .results import FAILED, LEFT_OUT, NEEDS_GPU, OK, Results

WIDTH = 80
COLUMNS = (17, 12, 8)
"""Widths of the step, its outcome and its seconds; the rest is its figure."""


def table(results: Results, names: Sequence[str]) -> str:
    """The steps that were asked for, and why checks failed."""
    steps = results.steps()
    lines = [_line("step", "outcome", "seconds", "what matters"), "-" * WIDTH]
    for name in names:
        row = steps[name]
        seconds = "" if row["outcome"] == LEFT_OUT else f"{row['seconds']:.0f}"
        lines += _wrapped(name, row["outcome"], seconds, row["figure"])
    failures = [row for row in results.checks().values() if row["step"] in names and row["outcome"] == FAILED]
    for row in failures:
        said = f"{row['step']}, {row['check']}: {row['why']}"
        lines += ["", *textwrap.wrap(said, WIDTH, subsequent_indent="  ", break_on_hyphens=False)]
    return "\n".join(lines)


def succeeded(results: Results, names: Sequence[str], tiny: bool) -> bool:
    """Whether every step that ran ended well. Without a GPU that is fine in a tiny run alone."""
    fine = {OK, LEFT_OUT, *([NEEDS_GPU] if tiny else [])}
    steps = results.steps()
    return all(steps[name]["outcome"] in fine for name in names)


def _wrapped(name: str, outcome: str, seconds: str, figure: str) -> list[str]:
    room = WIDTH - sum(COLUMNS) - 2
    first, *others = textwrap.wrap(figure, room, break_on_hyphens=False) or [""]
    return [_line(name, outcome, seconds, first), *(_line("", "", "", other) for other in others)]


def _line(name: str, outcome: str, seconds: str, figure: str) -> str:
    a, b, c = COLUMNS
    return f"{name:<{a}}{outcome:<{b}}{seconds:>{c}}  {figure}".rstrip()
