"""Every direct dependency is justified in docs/DEPENDENCIES.md and pinned in constraints.txt."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9-]", requirement)[0].lower() for requirement in requirements}


def test_each_dependency_is_justified_and_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = names(project["dependencies"])
    text = (ROOT / "docs" / "DEPENDENCIES.md").read_text()
    assert set(re.findall(r"^\| ([a-z-]+) \| ", text, re.MULTILINE)) - {"package"} == direct and len(direct) > 10
    for extra in ("eval", "tracking"):
        assert all(name in text for name in names(project["optional-dependencies"][extra]))
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert direct <= {name.lower() for name in pinned}
