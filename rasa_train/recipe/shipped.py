"""The shipped recipes and the measurements of them, for ``rasa-train list`` and the completion of a shell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict


def configs_dir() -> Path:
    """Return the directory of the shipped recipes: inside an installed package, beside the package in a checkout."""
    inside = Path(__file__).resolve().parents[1] / "configs"
    return inside if inside.is_dir() else Path(__file__).resolve().parents[2] / "configs"


def runnable() -> list[str]:
    """Return the names of the shipped recipes, the demo's first, without those that only serve others as a base."""
    found = [str(path.relative_to(configs_dir()).with_suffix("")) for path in configs_dir().rglob("*.yaml")]
    return sorted((name for name in found if not name.startswith("base/")), key=_place)


def listed() -> list[str]:
    """Return those of ``runnable`` that ``rasa-train list`` lists: all but those of the LoRA paper's tables, which
    ``configs/slides/README.md`` lists with the figures of the paper."""
    return [name for name in runnable() if not name.startswith("slides/")]


def _place(name: str) -> tuple[int, str]:
    return (0 if name.startswith("demo") else 1 + name.count("/"), name)


class Measured(TypedDict):
    """The measurements of a shipped recipe."""

    name: str
    method: str
    model: str
    r: int | None
    k: int | None
    """None, as ``r`` is, if the method does not have it."""
    trainable_parameters: int
    strategy: str
    workers: int
    memory_bytes: int
    """Memory of each worker as ``rasa-train check`` estimates it for the longest example that the recipe allows."""


def measured() -> list[Measured]:
    """Return a row for each of ``listed``, as ``scripts/measure_recipes.py`` wrote it."""
    rows: list[Measured] = json.loads((configs_dir() / "measured.json").read_text(encoding="utf-8"))
    return rows


def table() -> str:
    """Format ``measured`` for a person, 80 columns wide."""
    lines = [_line("recipe", "method", "base model", "r/k", "trained", "GiB")]
    for row in measured():
        model = row["model"].rpartition("/")[2].partition("-v0")[0]
        ranks = "/".join(str(number) for number in (row["r"], row["k"]) if number is not None) or "-"
        memory = f"{row['memory_bytes'] / 2**30:.1f}" + (f" x{row['workers']}" if row["workers"] > 1 else "")
        lines.append(_line(row["name"], row["method"], model, ranks, _count(row["trainable_parameters"]), memory))
    notes = [
        "",
        "GiB: memory of one GPU as `rasa-train check RECIPE` estimates it; x8: of each",
        "of 8 GPUs that share the base. To start a recipe of your own, copy one:",
        "`rasa-train copy demo my.yaml`. The tables of the LoRA paper are recipes, too:",
        "slides/..., listed in configs/slides/README.md.",
    ]
    return "\n".join(lines + notes)


def _line(name: str, method: str, model: str, ranks: str, trained: str, memory: str) -> str:
    return f"{name:<33}  {method:<7}  {model:<13} {ranks:>4}  {trained:>7}  {memory:>7}".rstrip()


def _count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"
