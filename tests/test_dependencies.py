"""Every direct dependency is justified in docs/DEPENDENCIES.md and pinned in constraints.txt; all are pinned by hash in
requirements.lock, and of licences that are allowed."""

from __future__ import annotations

import re
import runpy
import tomllib
from email.message import Message
from importlib.metadata import Distribution, distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

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


def locked() -> dict[str, list[str]]:
    """Requirement without its marker -> its hashes."""
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {line.split()[0].lower(): re.findall(r"--hash=sha256:([0-9a-f]{64})(?![0-9a-f])", line) for line in lines}


def test_the_lock_has_every_dependency_with_its_hashes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [requirement for extra in project["optional-dependencies"].values() for requirement in extra]
    found = locked()
    assert names([*project["dependencies"], *extras]) <= {pin.partition("==")[0] for pin in found}
    assert all("==" in pin and "+" not in pin and hashes for pin, hashes in found.items()) and len(found) > 100
    pins = [line.split(";")[0].strip().lower() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    assert {pin for pin in pins if "==" in pin} <= found.keys()
    assert "://" not in (ROOT / "requirements.lock").read_text(), "no index is named"


LICENCES: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "check_licences.py"))


def test_licences_of_what_is_installed() -> None:
    assert LICENCES["refused"](distributions()) == []


@pytest.mark.parametrize(
    ("fields", "fine"),
    [
        ({"License-Expression": "MIT AND Apache-2.0 WITH LLVM-exception"}, True),
        ({"License-Expression": "MIT AND GPL-3.0-only"}, False),
        ({"Classifier": "License :: OSI Approved :: GNU Affero General Public License v3"}, False),
        ({"License": "MPL-2.0 AND MIT"}, True),
        ({}, False),
    ],
)
def test_other_licences_are_refused(fields: dict[str, str], fine: bool) -> None:
    metadata = Message()
    for key, value in {"Name": "some-package", **fields}.items():
        metadata[key] = value
    package: Distribution = SimpleNamespace(metadata=metadata, version="1")  # type: ignore[assignment]
    assert (LICENCES["refused"]([package]) == []) == fine
