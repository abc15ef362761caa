"""Files for contributors: what they say of the package is so, and they are in the source distribution."""

from __future__ import annotations

import re
import tomllib

import yaml

import rasa_train
from tests.doc_pages import ROOT
from tests.test_package import LAYERS, LINES_OF_A_FILE, LINES_OF_A_FUNCTION, PARAMETERS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0" and citation["title"] == PROJECT["project"]["name"]
    assert citation["version"] == PROJECT["project"]["version"] == rasa_train.__version__
    assert citation["license"] == PROJECT["project"]["license"]
    (paper,) = citation["references"]
    assert paper["title"] == "RaSA: Rank-Sharing Low-Rank Adaptation" and "2503.12576" in paper["url"]


def test_the_source_distribution_has_the_files_for_contributors() -> None:
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert {"examples", "CONTRIBUTING.md", "CITATION.cff", "AGENTS.md"} <= set(included)
    assert all((ROOT / name).exists() for name in included)


def test_the_layers_of_agents_are_those_of_the_test() -> None:
    text = (ROOT / "AGENTS.md").read_text()
    assert len(text.splitlines()) <= 60
    (listed,) = re.findall(r"From the top:\n(.*?)\.\n`LAYERS`", text, re.DOTALL)
    layers = [{name.strip(" `\n").removesuffix(".py") for name in layer.split(",")} for layer in listed.split(";")]
    assert layers == [set(layer) - {"peft", "__init__"} for layer in LAYERS]


def test_the_bounds_are_those_of_the_test() -> None:
    bounds = (
        f"at most {LINES_OF_A_FILE} lines, a function at most {LINES_OF_A_FUNCTION} lines and {PARAMETERS} parameters"
    )
    for page in ("AGENTS.md", "CONTRIBUTING.md"):
        assert bounds in (ROOT / page).read_text()


def test_every_make_target_for_developers_is_explained() -> None:
    described = re.findall(r"`make ([a-z-]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(targets) - set(described) <= {"help", "demo", "clean", "sbom", "gpu-check-wheels"}
