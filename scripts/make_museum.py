"""Write docs/MUSEUM.md from the docstrings of tests/museum: public bug reports, and what happens here.

    python scripts/make_museum.py

A test of the museum begins with ``owner/repository#number: what went wrong there``, and goes on with ``Here: what
happens instead``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
MUSEUM = ROOT / "tests" / "museum"
PAGE = ROOT / "docs" / "MUSEUM.md"
ROOMS = {
    "models": "Base models",
    "training": "Training",
    "data": "Data",
    "merging": "Merging and exporting",
    "plugin": "Adapters in PEFT",
    "evaluation": "Evaluation and checks",
}
"""Titles of the page's sections, by the name of the test file."""
INTRODUCTION = """\
# A museum of bug reports

Bugs that users of other libraries have reported in public, and what happens with rasa_train. Each line is a test in
`tests/museum/`, which runs with every run of the test suite: {count} reports of {repositories} repositories. A report
here does not mean that the other library still behaves like that.

The page is made from the docstrings of these tests by `make docs`.
"""


class Exhibit(NamedTuple):
    report: str
    """``owner/repository#number``"""
    there: str
    here: str


def exhibits(path: Path) -> Iterator[Exhibit]:
    """Yield the reports of one test file, in its order.

    Raises:
        ValueError: a test's docstring does not have the form that this page needs.
    """
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
            continue
        text = " ".join((ast.get_docstring(node) or "").split())
        found = re.fullmatch(r"([\w.-]+/[\w.-]+#\d+): (.+?) Here: (.+)", text)
        if not found:
            raise ValueError(f"{path.name}: {node.name} does not name a report and what happens here")
        yield Exhibit(*found.groups())


def page() -> str:
    """Return the text of docs/MUSEUM.md."""
    rooms = {title: list(exhibits(MUSEUM / f"test_{name}.py")) for name, title in ROOMS.items()}
    every = [exhibit for room in rooms.values() for exhibit in room]
    repositories = {exhibit.report.partition("#")[0] for exhibit in every}
    parts = [INTRODUCTION.format(count=len(every), repositories=len(repositories))]
    for title, room in rooms.items():
        lines = [f"| {e.report} | {_cell(e.there)} | {_cell(e.here)} |" for e in room]
        parts.append("\n".join([f"## {title}\n", "| report | there | here |", "|---|---|---|", *lines]) + "\n")
    return "\n".join(parts)


def _cell(text: str) -> str:
    text = re.sub(r"``(.+?)``", r"`\1`", text).replace("|", "\\|")
    return text[0].upper() + text[1:]


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
