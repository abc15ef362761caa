"""The best step of a run by one of its measurements: which step it is, and whether the run has stopped improving.

Nothing but the values decides, and what is known of them is in every checkpoint. So a resumed run decides as an
undisturbed one does. The best step itself is a checkpoint, which is kept as long as another one names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..io.run_dir import best_step, numbered, step_number
from ..recipe.measures import lower_is_better
from .evaluation import Score


@dataclass(frozen=True)
class Watched:
    """What the measurements of ``training.keep_best`` have shown so far."""

    measure: str
    """Name of the measurement in ``metrics.jsonl``."""
    best: Score | None = None
    """The best value, the earliest of equal ones; None if no measurement was finite."""
    reference: float | None = None
    """Value of the last measurement that counted as an improvement."""
    waited: int = 0
    """Number of measurements since then."""

    def after(self, score: Score, min_delta: float = 0.0) -> Watched:
        """Return what is known after one more measurement. A value that is not finite is never the best."""
        if not math.isfinite(score.value):
            return replace(self, waited=self.waited + 1)
        gain = math.inf if self.reference is None else self._gain(score.value, self.reference)
        best = score if self.best is None or self._gain(score.value, self.best.value) > 0 else self.best
        if gain > min_delta:
            return replace(self, best=best, reference=score.value, waited=0)
        return replace(self, best=best, waited=self.waited + 1)

    def _gain(self, value: float, over: float) -> float:
        return over - value if lower_is_better(self.measure) else value - over


def superseded(checkpoints: Path, keep_last: int | None, due: Callable[[int], bool]) -> list[Path]:
    """Return the checkpoints that are to be removed: all but the newest ``keep_last`` and the best steps that these
    name. Where all are kept (None), these are the former best steps at which no checkpoint was ``due``."""
    found = numbered(checkpoints)
    named = {path: best_step(path) for path in found}
    if keep_last is None:
        former = {path for path in found[:-1] if named[path] == step_number(path) and not due(step_number(path))}
        kept = [path for path in found if path not in former]
    else:
        kept = found[-keep_last:]
    wanted = {named[path] for path in kept}
    return [path for path in found if path not in kept and step_number(path) not in wanted]
