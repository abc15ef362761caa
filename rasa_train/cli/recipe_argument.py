"""The arguments of the commands that read a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from ..recipe import shipped
from .completion import nearby


def _recipes(incomplete: str) -> list[str]:
    """Return what a shell offers for RECIPE: shipped recipes, and existing YAML files and directories."""
    near = nearby(incomplete)
    files = [f"{path}/" if path.is_dir() else str(path) for path in near if path.is_dir() or path.suffix == ".yaml"]
    return [name for name in (*files, *shipped.runnable()) if name.startswith(incomplete)]


MISSING = "RECIPE is missing, for example: rasa-train configs/demo.yaml (--help lists the options)"
RecipeName = Annotated[
    str | None,
    typer.Argument(metavar="RECIPE", help="A YAML recipe, or the name of a shipped one.", autocompletion=_recipes),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="section.key=value", help="Values to replace in the recipe.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")]
