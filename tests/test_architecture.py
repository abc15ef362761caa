"""docs/ARCHITECTURE.md and its picture say what the package is: its folders, its imports, its ``run`` and contract."""

from __future__ import annotations

import ast
import xml.etree.ElementTree as ET
from typing import Literal

import torch
from pydantic import PositiveInt
from transformers import AutoModelForCausalLM, LlamaConfig

from rasa_train import adapt
from rasa_train.adapters.contract import Built, FactorAdapter, Method, kaiming_uniform, zeros
from rasa_train.adapters.site import Site
from rasa_train.kernels.low_rank import Factors
from tests.doc_pages import ROOT, blocks
from tests.test_package import PACKAGE, component, imports

PAGE = ROOT / "docs" / "ARCHITECTURE.md"
PICTURE = ET.parse(ROOT / "docs" / "images" / "architecture.svg").getroot()
SVG = "{http://www.w3.org/2000/svg}"
FOLDERS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
RUN, CONTRACT = [block.text for block in blocks(PAGE) if block.language == "python"]


def heights() -> dict[str, float]:
    """How far down each folder is in the picture."""
    rooms = [group for group in PICTURE.iter(f"{SVG}g") if "data-room" in group.attrib]
    found = {room.attrib["data-room"]: float(room.find(f"{SVG}rect").attrib["y"]) for room in rooms}  # type: ignore[union-attr]
    assert len(found) == len(rooms), "a folder is drawn once"
    return found


def arrows() -> set[tuple[str, str]]:
    """All imports from one folder of the package by another."""
    found = set()
    for path in PACKAGE.glob("*/**/*.py"):
        own = path.relative_to(PACKAGE).parts[0]
        found |= {(own, other) for other in map(component, imports(path)) if other in FOLDERS - {own}}
    return found


def test_the_page_lists_the_folders() -> None:
    rows = [line.split("`")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `") and "/` |" in line]
    assert sorted(rows) == sorted(f"{name}/" for name in FOLDERS)
    assert len(PAGE.read_text().splitlines()) <= 120, "the page is to be read in five minutes"


def test_the_picture_shows_the_folders_and_their_names() -> None:
    assert heights().keys() == FOLDERS
    for room in PICTURE.iter(f"{SVG}g"):
        if name := room.get("data-room"):
            assert room.findtext(f"{SVG}text") == name


def test_imports_point_down_in_the_picture() -> None:
    height = heights()
    upwards = [(one, other) for one, other in arrows() if height[one] >= height[other]]
    assert upwards == []
    drawn = {
        (p.attrib["data-from"], p.attrib["data-to"]) for p in PICTURE.iter(f"{SVG}path") if "data-from" in p.attrib
    }
    assert drawn and drawn <= arrows(), "each arrow is an import that there is"


def test_run_is_quoted_whole() -> None:
    (code,) = [
        node
        for node in ast.parse((PACKAGE / "training" / "run.py").read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "run"
    ]
    assert ast.get_docstring(code)
    del code.body[0]
    assert ast.unparse(code) == ast.unparse(ast.parse(RUN))


def test_the_contract_of_the_page_is_a_method() -> None:
    names = {one.__name__: one for one in (Built, FactorAdapter, Factors, Method, Site, kaiming_uniform, zeros)}
    namespace = {**names, "Literal": Literal, "PositiveInt": PositiveInt, "__name__": __name__}
    exec(compile(CONTRACT, str(PAGE), "exec", dont_inherit=True), namespace)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = adapt(AutoModelForCausalLM.from_config(config), namespace["Plain"](r=2))  # type: ignore[operator]
    ids = torch.arange(12).view(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if name.endswith("adapter.B")]
    assert gradients and all(gradient is not None and gradient.any() for gradient in gradients)
