"""The measurements that a run makes of itself, by their names in ``metrics.jsonl``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..data.built_in import GLUE
from ..errors import UserError

if TYPE_CHECKING:
    from .schema import Recipe

VALIDATION_LOSS = "validation_loss"


def measures(recipe: Recipe) -> list[str]:
    """Return the names of what a run of the recipe measures at intervals."""
    found = [VALIDATION_LOSS] if recipe.data.validation is not None else []
    if evaluate := recipe.training.evaluate:
        built_in = GLUE.get(recipe.data.dataset or "")
        problem = recipe.task.problem or (built_in and built_in.head.problem)
        # the scores of a regression are others than those of the suite that asks for them
        own = (evaluate.suite, problem) == ("classification", "regression")
        found.append(f"eval_{'regression' if own else evaluate.suite}")
    return found


def lower_is_better(measure: str) -> bool:
    """Whether a measurement is a loss; all others are scores."""
    return not measure.startswith("eval_")


def check_measures(recipe: Recipe) -> None:
    """Raise ``UserError`` if ``training.keep_best`` names nothing that the run measures, or if it lacks while
    ``training.early_stopping`` watches it."""
    named, stopping = recipe.training.keep_best, recipe.training.early_stopping
    there = measures(recipe)
    if named is None:
        if stopping is not None:
            raise UserError(
                f"training.early_stopping: patience: {stopping.patience} watches the measurement of "
                f"training.keep_best, which is not set; {_choose(there)}",
                key="training.early_stopping",
            )
    elif named not in there:
        raise UserError(
            f"training.keep_best: this run does not measure {named!r:.100}; {_choose(there)}", key="training.keep_best"
        )


def _choose(there: list[str]) -> str:
    if there:
        return f"set training.keep_best to {' or '.join(there)}"
    return (
        "it measures nothing while it trains: for keep_best: validation_loss add data.validation (for example "
        "{size: 0.05}), for keep_best: eval_SUITE add training.evaluate"
    )
