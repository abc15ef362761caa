"""What a run leaves in ``summary.json``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, NotRequired, TypedDict

from .. import process

if TYPE_CHECKING:
    from .trainer import Trainer


class Summary(TypedDict):
    """The content of ``summary.json``."""

    method: str
    trainable_parameters: int
    effective_rank: dict[str, int]
    steps: int
    epochs: float
    examples: int
    tokens: int
    supervised_tokens: int
    seconds: float
    loss: float | None
    """Loss of the last step that was not skipped; None if all were."""
    skipped_steps: int
    validation_loss: float | None
    peak_memory_bytes: int
    strategy: str
    kernels: str
    """``liger`` if its kernels computed norms, rotary embedding and SwiGLU, else ``none``."""
    fast_path: bool
    """Whether linears that share an input were computed together, from factors that were packed once per step."""
    compiled: bool
    """Whether the decoder layers were compiled."""
    versions: dict[str, str]
    workers: int
    examples_by_dataset: NotRequired[dict[str, int]]
    """Number of examples of each set in an epoch, if there are several."""
    validation_loss_by_dataset: NotRequired[dict[str, float]]
    """Loss of the held-out examples of each set, where ``validation_loss`` is that of several."""
    base_difference: NotRequired[float]
    """Relative difference that ``model.quantization`` makes, if it holds the base in fewer bits."""
    evaluation: NotRequired[dict[str, object] | None]
    stopped_early: bool
    """Whether ``training.early_stopping`` ended the run before its last step."""
    best: NotRequired[dict[str, object] | None]
    """With ``training.keep_best``, the best step, its epoch, the measure and its value; None if none was finite."""


def summarise(run: Trainer) -> Summary:
    """Return the summary of a run that has ended."""
    summary: Summary = {
        "method": run.recipe.adapter.method,
        "trainable_parameters": run.model.trained,
        "effective_rank": run.model.ranks,
        "steps": run.progress.step,
        "epochs": run.progress.step / run.steps_per_epoch,
        "examples": len(run.data.train),
        "tokens": run.progress.tokens,
        "supervised_tokens": run.progress.supervised_tokens,
        "seconds": run.progress.seconds,
        "loss": run.progress.loss,
        "skipped_steps": run.progress.skipped,
        "validation_loss": run.progress.validation_loss,
        "peak_memory_bytes": run.progress.peak_memory_bytes,
        "strategy": run.recipe.distributed.strategy,
        "kernels": run.model.kernels,
        "fast_path": run.model.fast_path,
        "compiled": run.model.compiled,
        "versions": process.versions(),
        "workers": run.accelerator.num_processes,
        "stopped_early": run.stopped_early,
    }
    if run.training.keep_best:
        watched = run.progress.watched
        best = watched.best if watched else None
        summary["best"] = {**asdict(best), "measure": run.training.keep_best} if best else None
    if len(run.data.datasets) > 1:
        summary["examples_by_dataset"] = run.data.examples_by_dataset
    if run.progress.validation_loss_by_dataset:
        summary["validation_loss_by_dataset"] = run.progress.validation_loss_by_dataset
    if run.base_difference is not None:
        summary["base_difference"] = run.base_difference
    if run.training.evaluate:
        scores = run.progress.evaluation
        summary["evaluation"] = asdict(scores) if scores else None
    return summary
