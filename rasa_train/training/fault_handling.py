"""Protection of a long run: skipped steps, less computed at once when memory runs out, a full disk, a lost GPU."""

from __future__ import annotations

import errno
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..data.batching import Limit
from ..data.cache import TokenDataset
from ..errors import DeviceLost, UserError, first_line
from ..io.atomic import write_json
from ..io.run_dir import RunDirectory, numbered

WINDOW, SPIKE = 32, 2.0
"""A loss is a spike if it exceeds ``SPIKE`` times the median of the last ``WINDOW`` losses (at least half as many)."""


class Watch:
    """Counter of skipped steps that also notices spikes of the loss. Equal on all workers, as their losses are.

    Args:
        max_skipped: number of skipped steps in a row that ends the run.
    """

    def __init__(self, max_skipped: int, say: Callable[[str], None]) -> None:
        self.max_skipped, self.say = max_skipped, say
        self.in_a_row = 0
        self.recent: deque[float] = deque(maxlen=WINDOW)

    def skipped(self, step: int, loss: float, grad_norm: float) -> bool:
        """Whether ``step`` (counted from 1) changed nothing, because its loss or its gradient is not finite."""
        if not math.isfinite(loss + grad_norm):
            self.in_a_row += 1
            self.say(f"step {step}: loss {loss}, gradient norm {grad_norm}: skipped ({self.in_a_row} in a row)")
            return True
        self.in_a_row = 0
        if len(self.recent) >= WINDOW // 2 and loss > SPIKE * (usual := statistics.median(self.recent)):
            self.say(f"step {step}: the loss has jumped to {loss:.4f}, from about {usual:.4f}")
        self.recent.append(loss)
        return False

    def stop_if_hopeless(
        self,
        directory: RunDirectory,
        train: TokenDataset,
        batch: np.ndarray,
        step: int,
        *,
        first: bool,
    ) -> None:
        """End the run after ``max_skipped`` steps in a row; the ``first`` worker keeps the last batch for inspection.

        Raises:
            UserError: ``max_skipped`` steps in a row were skipped.
        """
        if self.in_a_row < self.max_skipped:
            return
        path = directory.skipped / f"step-{step:08d}.json"
        if first:
            examples = [(int(index), train[int(index)]) for index in batch]
            kept = [
                {"index": index, "input_ids": example.input_ids.tolist(), "labels": example.labels.tolist()}
                for index, example in examples
            ]
            path.parent.mkdir(exist_ok=True)
            write_json(path, {"step": step, "examples": kept})
        raise UserError(
            f"training.max_skipped: the loss or the gradient of {self.in_a_row} steps in a row was not finite, the "
            f"last of them step {step}; its examples are in {path}. {saved_at(directory)} Start over with a lower "
            "training.optimizer.lr, or look for what is odd in these examples.",
            key="training.max_skipped",
        )


class Room:
    """Limit on what a worker computes at once, which is lowered if steps run out of memory.

    A single shortage has passing causes: another process on the GPU, a batch of a rare shape, fragmented memory. So the
    step is repeated with less at once, and the next step begins with the usual limit again. If ``SHORTAGES`` of the
    last ``SHORTAGES_WITHIN`` steps ran out of memory, the smaller limit becomes the usual one. Equal on all workers.
    """

    SHORTAGES, SHORTAGES_WITHIN = 3, 100

    def __init__(self, limit: Limit, say: Callable[[str], None]) -> None:
        self.usual = limit
        """The limit that a step begins with."""
        self.say = say
        self._short: list[int] = []

    def finished(self, step: int, limit: Limit) -> None:
        """Record that ``step`` (counted from 1) was finished with this ``limit``."""
        if limit == self.usual:
            return
        self._short = [*(earlier for earlier in self._short if step - earlier < self.SHORTAGES_WITHIN), step]
        if len(self._short) == self.SHORTAGES:
            self.usual, self._short = limit, []
            self.say(f"{self.SHORTAGES} steps have run out of memory: a worker now computes at most {limit} at once")


def smaller(limit: Limit, batch: np.ndarray, lengths: np.ndarray, workers: int) -> Limit:
    """Return a limit of about half the largest micro-batch that ``limit`` makes of ``batch``.

    Raises:
        UserError: each micro-batch is one example already.
    """
    parts = [part for worker in limit.split(batch, lengths, workers) for part in worker]
    most = max(map(len, parts))
    if most == 1:
        raise UserError(
            f"out of memory with one sequence at a time (of {lengths[batch].max():,} tokens). Try "
            "training.activation_checkpointing: true, a smaller data.max_length, or distributed.strategy: "
            "zero3 or fsdp on more GPUs",
            key="training.micro_batch_size",
        )
    if limit.tokens:
        return replace(limit, tokens=max(int(lengths[part].sum()) for part in parts) // 2)
    return replace(limit, examples=most // 2)


BROKEN = (errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG)
"""Errors of a disk that accepts no data, however much room it has: a kernel makes a disk with an error read-only, and
``ulimit -f`` bounds the size of files."""


def disk_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def saved_at(directory: RunDirectory) -> str:
    """Return a sentence that says where the same command would go on."""
    if saved := numbered(directory.checkpoints):
        newest = saved[-1]
        return f"The run is saved up to step {int(newest.name.removeprefix('step-'))} ({newest})."
    return "The run has no checkpoint yet."


@contextmanager
def explained(directory: RunDirectory) -> Iterator[None]:
    """Say what is saved if the disk or the GPU fails inside the context.

    Raises:
        UserError: the disk is full, or accepts no data.
        DeviceLost: the GPU answers with an error.
    """
    try:
        yield
    except OSError as error:
        ours = any(directory.path in Path(str(name)).parents for name in (error.filename, error.filename2) if name)
        if not disk_full(error) and error.errno not in BROKEN and not ours:
            raise
        raise unwritable(directory, error) from None
    except torch.AcceleratorError as error:
        raise DeviceLost(f"the GPU failed: {first_line(error)}. {saved_at(directory)}") from error


def unwritable(directory: RunDirectory, error: OSError) -> UserError:
    remedies = {errno.EFBIG: "Raise the limit on the size of files (ulimit -f)"}
    remedy = "Make room" if disk_full(error) else remedies.get(error.errno or 0, "Check the disk")
    said = directory.unwritable(error)
    return UserError(f"{said}. {saved_at(directory)} {remedy}: the same command goes on from there.", key=said.key)
