"""What an earlier start has left in the run directory: whether it is the same run, on the same base, and complete."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..errors import UserError, say
from ..io.base_fingerprint import compare
from ..io.checksums import CHECKSUMS
from ..io.json_file import read_object
from ..io.run_dir import RunDirectory, numbered
from ..recipe.load import completed, dump_recipe
from ..recipe.schema import Recipe

START_OVER = "choose another output_dir, or start over with --fresh (which deletes that run)"


def is_complete(recipe: Recipe, directory: RunDirectory) -> bool:
    """Whether the directory holds this run, complete. If the run is not complete, this start goes on with it.

    Raises:
        UserError: the directory holds another run, or the base has changed since, or the rest of the run does not
            suffice to go on.
    """
    _check_recipe(recipe, directory)
    if not directory.summary.exists():
        return False
    if (problem := _lacking(directory)) is None:
        return True
    from ..training.checkpoint import newest  # here, because this takes seconds to import

    found = newest(directory.checkpoints, lambda text: None)
    if found is None:
        raise UserError(
            f"output_dir: {directory.path} has a summary.json, as a complete run has, but {problem}, and there is "
            f"no whole checkpoint to go on from: restore what is missing, {START_OVER}",
            key="output_dir",
        )
    say(f"note: summary.json says that the run is complete, but {problem}: it goes on from {found}", file=sys.stderr)
    directory.summary.unlink()
    return False


def _check_recipe(recipe: Recipe, directory: RunDirectory) -> None:
    """Raise ``UserError`` unless the run in the directory, if there is one, is of this recipe and on this base."""
    saved_states = [*reversed(numbered(directory.checkpoints)), directory.adapter]
    there = [path for path in (directory.summary, *saved_states) if path.exists()]
    if not directory.recipe.exists():
        if there:
            raise UserError(
                f"output_dir: {directory.path} holds {there[0].relative_to(directory.path)} but no recipe.yaml, so it "
                f"is not known which run this is of: put recipe.yaml back, {START_OVER}",
                key="output_dir",
            )
        return
    base = recipe.model
    compared = compare(_recorded(saved_states), base.name, base.revision)
    alike: set[str] = set()
    old = _named(directory)
    if old != (base.name, base.revision) and compared.compared and not compared.problem:
        alike = {"model.name", "model.revision"}
    directory.check_same_run(dump_recipe(recipe), completed, alike)
    if compared.problem:
        raise UserError(
            f"model.name: {base.name} is no longer the base that the run in {directory.path} was started on: its "
            f"{compared.problem}. Restore the base, {START_OVER}",
            key="model.name",
        )
    if alike:
        say(f"note: the base was {old[0]} and is {base.name}: the same weights, so the run goes on", file=sys.stderr)


def _recorded(directories: list[Path]) -> dict[str, Any]:
    """Return the identity of the base that the first readable adapter or checkpoint records; empty if there is none."""
    from ..adapters import saved  # here, so that a wrong recipe is reported sooner

    for path in directories:
        try:
            recorded = read_object(path / saved.CONFIG).get("base_tensors")
        except (FileNotFoundError, UserError):
            continue
        if isinstance(recorded, dict):
            return recorded
    return {}


def _named(directory: RunDirectory) -> tuple[str | None, str | None]:
    """Return name and revision of the base in the recipe of a run directory."""
    try:
        model = directory.stored_recipe()["model"]
        return model["name"], model.get("revision")
    except (OSError, KeyError, TypeError, AttributeError, UserError):
        return None, None  # ``check_same_run`` reports a damaged recipe


def _lacking(directory: RunDirectory) -> str | None:
    """Return what a run with a summary lacks; None if it is complete."""
    from ..adapters import saved

    try:
        read_object(directory.summary)
        if not directory.adapter.is_dir():
            return f"{directory.adapter} is missing"
        if not (directory.adapter / CHECKSUMS).exists():  # an older version wrote it
            saved.read_adapter(directory.adapter)
        elif problem := saved.damage(directory.adapter):
            return f"{directory.adapter} is damaged ({problem})"
    except (UserError, OSError) as error:
        return str(error)
    return None
