"""The shape of the package: who may import whom, and what is in the wheel."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from rasa_train import process
from rasa_train.process import version_of
from rasa_train.recipe.shipped import configs_dir

PACKAGE = Path(__file__).resolve().parents[1] / "rasa_train"

LAYERS = [
    ["cli", "peft"],
    ["demo", "api"],
    ["report", "check", "bench", "integrations"],
    ["analysis"],
    ["launch"],
    ["training"],
    ["evaluate"],
    ["merging"],
    ["recipe"],
    ["objectives"],
    ["data", "distributed", "optim", "methods"],
    ["adapters"],
    ["models", "lowrank"],
    ["io", "kernels"],
    ["process"],
    ["errors", "stop", "__init__"],
]
"""The folders and root modules, from the top to the bottom. One imports only from layers below its own, never from a
sibling."""
ROOT_MODULES = {"__init__", "api", "errors", "peft", "process", "stop"}
LINES_OF_A_FILE, LINES_OF_A_FUNCTION, PARAMETERS = 400, 60, 6


def component(module: str) -> str:
    """``methods.rasa`` -> ``methods``."""
    return module.partition(".")[0]


def imports(path: Path) -> set[str]:
    """Modules of the package (without its name) that a file imports anywhere, functions included."""
    here = path.relative_to(PACKAGE).with_suffix("").parts
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = here[: len(here) - node.level]
                names = [".".join((*base, *(node.module or "").split("."))).strip(".")]
                if node.module is None:
                    names = [".".join((*base, alias.name)) for alias in node.names]
            else:
                names = [node.module or ""] if (node.module or "").startswith("rasa_train") else []
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("rasa_train")]
        else:
            continue
        found |= {name.removeprefix("rasa_train").strip(".") or "__init__" for name in names}
    return found


def test_imports_point_downwards() -> None:
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    seen = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        own = component(module)
        seen.add(own)
        if own == "__init__":  # the public names are imported when they are used
            continue
        assert own in level, f"{path}: give {own} a place in LAYERS"
        for imported in imports(path):
            other = component(imported) if component(imported) in level else "__init__"
            assert other == own or level[other] > level[own], f"{module} must not import {imported}"
    assert seen == set(level), "every component was seen"


def test_only_distributed_knows_deepspeed() -> None:
    for path in PACKAGE.rglob("*.py"):
        names = {
            name
            for node in ast.walk(ast.parse(path.read_text()))
            for name in (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else []
            )
        }
        if any(name.startswith("deepspeed") for name in names):
            assert path.relative_to(PACKAGE) == Path("distributed/zero.py"), path


EXCEPTIONS = {
    ("kernels/varlen_attention.py", "varlen_attention"): "the signature is that of transformers' AttentionInterface",
    ("kernels/linear_cross_entropy.py", "forward"): "an autograd function takes its tensors one by one",
}
LIBRARIES = {"command", "jit"}
"""Decorators of functions whose parameters are a library's interface: options of a command, arguments of a kernel."""


def decorators(node: ast.FunctionDef) -> set[str]:
    calls = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    return {d.attr for d in calls if isinstance(d, ast.Attribute)}


def test_files_and_functions_stay_readable() -> None:
    """Bounds of the size of things. What a library asks for is exempt, and so are the named exceptions."""
    assert {path.stem for path in PACKAGE.glob("*.py")} <= ROOT_MODULES and len(ROOT_MODULES) <= 8
    beyond, seen = [], set()
    for path in PACKAGE.rglob("*.py"):
        name, text = path.relative_to(PACKAGE).as_posix(), path.read_text()
        if (lines := len(text.splitlines())) > LINES_OF_A_FILE:
            beyond.append(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef) or decorators(node) & LIBRARIES:
                continue
            lines = (node.end_lineno or 0) - node.lineno + 1
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            number = len([p for p in every if p.arg not in ("self", "cls", "ctx")])
            if lines > LINES_OF_A_FUNCTION or number > PARAMETERS:
                seen.add((name, node.name))
                if (name, node.name) not in EXCEPTIONS:
                    beyond.append(f"{name}: {node.name} has {lines} lines and {number} parameters")
    assert not beyond and seen == set(EXCEPTIONS), (beyond, set(EXCEPTIONS) - seen)


def test_the_wheel_holds_recipes_and_the_demo(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=PACKAGE.parent, check=True, capture_output=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    recipes = {f"rasa_train/configs/{p.relative_to(configs_dir())}" for p in configs_dir().rglob("*.yaml")}
    assert len(recipes) > 24 and recipes <= names and "rasa_train/configs/measured.json" in names
    assert {f"rasa_train/demo/model/{name}" for name in ("model.safetensors", "tokenizer.json")} <= names
    assert {f"rasa_train/report/page.{ending}" for ending in ("html", "css", "js")} <= names
    assert "rasa_train/py.typed" in names and not any(name.startswith("tests/") for name in names)


def test_a_package_without_metadata_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder on the import path is enough to run from, so a missing version must not end a run."""
    assert version_of("pytest") and version_of("no-such-package-at-all") is None
    monkeypatch.setattr(process, "version_of", lambda package: None if package == "accelerate" else "1")
    assert process.versions()["accelerate"] == "unknown" and process.versions()["torch"] == "1"
