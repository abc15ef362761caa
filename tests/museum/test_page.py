"""docs/MUSEUM.md is made from the museum's tests, which are many and each of another report."""

from __future__ import annotations

import runpy
from collections import Counter
from typing import Any

from tests.doc_pages import ROOT

MAKER: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "make_museum.py"))


def test_the_page_is_made_from_the_tests() -> None:
    assert MAKER["PAGE"].read_text() == MAKER["page"](), "make docs"


def test_every_report_is_another_one_and_has_a_room() -> None:
    files = {path.stem.removeprefix("test_"): path for path in MAKER["MUSEUM"].glob("test_*.py")}
    assert files.keys() - {"page"} == MAKER["ROOMS"].keys()
    reports = Counter(exhibit.report for name in MAKER["ROOMS"] for exhibit in MAKER["exhibits"](files[name]))
    assert [report for report, number in reports.items() if number > 1] == []
    assert len(reports) >= 60
