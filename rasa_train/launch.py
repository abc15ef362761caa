"""From a recipe to worker processes. What has to happen once per job happens here, before any worker starts."""

from __future__ import annotations

from typing import Any

from .data.prepare import prepare
from .model import load_config, load_tokenizer
from .recipe.load import dump_recipe
from .recipe.schema import Recipe
from .run_dir import RunDirectory, write_text


def launch(recipe: Recipe, *, fresh: bool = False) -> dict[str, Any] | None:
    """Check and prepare everything, then train. Returns the summary, or None when the run was complete already.

    Raises:
        UserError: the recipe cannot be carried out, or the run directory holds another run.
        Stopped: a stop was asked for; the state is saved.
    """
    directory = RunDirectory(recipe.output_dir)
    directory.create()
    with directory.lock():
        if not fresh:
            directory.check_same_run(dump_recipe(recipe))
            if directory.summary.exists():
                return None
        # Wrong input ends here, before the old run is deleted and before the weights are loaded.
        load_config(recipe.model)
        prepare(recipe.data, load_tokenizer(recipe.model))
        if fresh:
            directory.clear()
            directory.create()
        write_text(directory.recipe, dump_recipe(recipe))

        from .train import run  # here, so that a wrong recipe is told without loading accelerate

        return run(recipe)
