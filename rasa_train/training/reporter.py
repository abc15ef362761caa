"""Progress of a run for a person who watches it: a bar in a terminal, plain lines anywhere else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NotRequired, TypedDict

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ..errors import shown


class MetricsRow(TypedDict):
    """A line of ``metrics.jsonl``: one optimizer step."""

    step: int
    """Number of optimizer steps done, from 1."""
    epoch: float
    """Number of passes over the data done so far."""
    loss: float | None
    """Mean over the supervised tokens of the global batch; None for a skipped step."""
    lr: float
    grad_norm: float | None
    """L2 norm of all gradients before clipping; None for a skipped step."""
    skipped: int
    """1 for a step that changed nothing because its loss or a gradient was not finite, else 0."""
    tokens: int
    supervised_tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    """Most memory that this worker has held so far."""
    seconds: float
    validation_loss: NotRequired[float]
    """Mean over the supervised tokens of the held-out set, where it was measured."""
    validation_loss_by_dataset: NotRequired[dict[str, float]]
    """The same for each set that has held-out examples, if there are several."""


class Reporter:
    """Progress of one run on stderr. Prints nothing on any worker but the first."""

    def __init__(self, total_steps: int, every: int, accelerator: Accelerator) -> None:
        self.total, self.every, self.started_at = total_steps, every, 0
        self.console = Console(stderr=True, quiet=not accelerator.is_main_process, highlight=False)
        self.seconds = 0.0
        self.bar: Progress | None = None
        self.task: TaskID | None = None

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def start(self, done: int, message: str | None) -> None:
        """Print ``message`` and show the bar before the first step; ``done`` steps were done earlier."""
        self.started_at = done
        if message:
            self.say(message)
        if self.console.is_terminal and not self.console.quiet:
            columns = (
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("", total=self.total, completed=done)
            self.bar.start()

    def say(self, message: str) -> None:
        """Print a message on a line of its own, above the bar."""
        self.console.print(shown(message), markup=False, soft_wrap=not self.console.is_terminal)

    def step(self, row: MetricsRow) -> None:
        """Report that a step is done."""
        step, loss, speed = (
            row["step"],
            math.nan if row["loss"] is None else row["loss"],
            f"{row['tokens_per_second']:,.0f} tok/s",
        )
        self.seconds += row["seconds"]
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=step, description=f"loss {loss:.4f}  {speed}")
        elif step % self.every == 0 or step in (1, self.total):
            left = clock((self.total - step) * self.seconds / (step - self.started_at))
            self.say(f"step {step}/{self.total}  loss {loss:.4f}  lr {row['lr']:.2e}  {speed}  {left} left")


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row for trackers, which take numbers: a value by set becomes ``KEY/SET`` for each set."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        found |= {f"{key}/{name}": one for name, one in value.items()} if isinstance(value, dict) else {key: value}
    return found


def clock(seconds: float) -> str:
    """Format a time as ``1:02:03``, or ``2:03`` under an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
