"""One training run, from a recipe to an adapter. Every worker runs it."""

from __future__ import annotations

from ..data.prepare import PreparedData
from ..errors import Stopped
from ..recipe.schema import Recipe
from ..stop import StopSignal
from .summary import Summary
from .trainer import Trainer


def run(recipe: Recipe, stop: StopSignal, data: PreparedData | None = None) -> Summary | None:
    """Train as the recipe says, resuming the run in the run directory. Returns the summary;
    None on all workers but the first.

    Args:
        data: the prepared data of ``recipe.data``, for a caller that has it already.
    Raises:
        UserError: the model, the data or the adapter to start from cannot be used, or steps fail (``fault_handling``).
        Stopped: ``stop`` was asked for; the state is saved, and the same call goes on from there.
        DeviceLost: the GPU has failed.
    """
    trainer = Trainer(recipe, data)
    with trainer.running():
        trainer.setup()
        trainer.resume()
        for step, work in trainer.steps():
            row = trainer.step(step, work)
            trainer.validate(row)
            trainer.evaluate(row)
            trainer.judge(row)
            trainer.log(row)
            stopping = trainer.stop_agreed(stop)
            trainer.checkpoint(needed=stopping)
            if stopping:
                why = stop.reason or "another worker was asked to stop"
                raise Stopped(f"{why}: saved at step {row['step']}; the same command goes on from there")
        trainer.write_adapter()
    return trainer.finish()
