"""A checkpoint of a run by its step, or the best one."""

from __future__ import annotations

import re
from pathlib import Path

from ..adapters.saved import CONFIG, damage
from ..errors import UserError, some
from ..io.checksums import CHECKSUMS
from ..io.run_dir import RunDirectory, best_step, numbered, step_number

BEST = "best"


def find_checkpoint(run: Path, which: str) -> Path:
    """Return the directory of a checkpoint.

    Args:
        run: output directory of a run.
        which: ``best`` for the best step by ``training.keep_best``, up to the newest checkpoint; or the number of a
            step.
    Raises:
        UserError: ``run`` is no run, or has no such checkpoint, or the checkpoint is damaged.
    """
    if which != BEST and not re.fullmatch(r"[0-9]{1,18}", which):
        raise UserError(f"the checkpoint must be best or the number of a step, got {which!r:.100}")
    if (run / CONFIG).is_file() or not (run / "recipe.yaml").is_file():
        raise UserError(f"checkpoint {which}: {run} is not a run: give the output_dir of one")
    RunDirectory(run).refuse_links()
    found = {step_number(path): path for path in numbered(run / "checkpoints")}
    if not found:
        raise UserError(f"checkpoint {which}: {run} has no checkpoints")
    named = (best_step(found[number]) for number in sorted(found, reverse=True))  # the newest may be damaged
    step = next((step for step in named if step is not None), None) if which == BEST else int(which)
    if step is None:
        training = RunDirectory(run).stored_recipe().get("training")
        kept = training.get("keep_best") if isinstance(training, dict) else None
        raise UserError(
            f"checkpoint best: {run} has none yet: {kept} was not measured, or was never finite"
            if kept
            else f"checkpoint best: {run} was trained without training.keep_best, so no step is known as the best; "
            f"give the number of a step: {_steps(found)}"
        )
    if step not in found:
        gone = "the best step" if which == BEST else "step"
        raise UserError(f"checkpoint {which}: {run} has no checkpoint of {gone} {step}; there is {_steps(found)}")
    lacking = [name for name in (CONFIG, CHECKSUMS) if not (found[step] / name).is_file()]
    if (problem := f"{lacking[0]} is missing" if lacking else damage(found[step])) is not None:
        raise UserError(f"checkpoint {which}: {found[step]} is damaged ({problem})")
    return found[step]


def _steps(found: dict[int, Path]) -> str:
    return some([str(step) for step in sorted(found)])
