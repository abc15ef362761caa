"""Resources and speed of this machine for a run, for ``rasa-train check``."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from ..data.prepare import PreparedData
from ..io.run_dir import RunDirectory
from ..io.scratch import scratch_directory
from ..recipe.schema import Recipe, TrackingConfig
from ..stop import StopSignal
from ..training.run import run

STEPS, SEQUENCES = 3, 8
"""Size of the trial run. Its first steps are slower than the rest, so only the last one is measured."""
MOST_FLOPS = {"cpu": 1e12, "cuda": 1e15}
"""Most operations of a trial run, by kind of device; more would take longer than a check should."""
MOST_BYTES = 8 << 30
"""Most bytes of the base in a trial run; a larger base takes too long to read."""


class Device(NamedTuple):
    """A GPU, or the machine if it has no GPU."""

    name: str
    memory_bytes: int


class Trial(NamedTuple):
    """What a few steps have shown."""

    seconds: float
    """Estimated seconds of the whole run on this machine."""
    finite: bool
    """Whether any step had a finite loss and gradient."""


def devices() -> list[Device]:
    """Return each GPU, or the machine if it has no GPU."""
    if not torch.cuda.is_available():
        return [Device("cpu", host_memory())]
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [Device(gpu.name, gpu.total_memory) for gpu in found]


def host_memory(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes of memory that the processes of this machine can have: a container's limit if that is lower."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in (cgroups / "memory.max", cgroups / "memory" / "memory.limit_in_bytes"):  # versions 2 and 1
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            found = min(found, int(limit.read_text()))
    return found


def disk_free(path: Path) -> int:
    """Return the number of bytes that are free where ``path`` is going to be."""
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free


def trial(recipe: Recipe, data: PreparedData, parameters: int, steps: int) -> Trial | None:
    """Train a few steps of ``SEQUENCES`` sequences, in a directory that is deleted, to see whether the loss is finite,
    and how long ``steps`` take on this machine by the tokens per second of the last of them. Returns None if the trial
    would take too long.

    Args:
        parameters: number of parameters of the base.
    Raises:
        UserError: the steps cannot be trained.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = STEPS * min(SEQUENCES, recipe.training.batch_size) * int(data.train.lengths.max())
    size = parameters * (4 if recipe.model.dtype == "float32" else 2)
    if 6 * parameters * tokens > MOST_FLOPS[kind] or size > MOST_BYTES or recipe.distributed.offload != "none":
        return None
    short = {"max_steps": STEPS, "batch_size": min(SEQUENCES, recipe.training.batch_size), "evaluate": None}
    with scratch_directory("check") as directory, contextlib.redirect_stderr(io.StringIO()):
        changed = {"output_dir": str(directory), "training": recipe.training.model_copy(update=short)}
        tried = recipe.model_copy(update=changed | {"tracking": TrackingConfig()})
        run(tried, StopSignal(), replace(data, validation=None))
        rows = RunDirectory(directory).rows()
    per_step = data.stats.tokens / len(data.train) * min(recipe.training.batch_size, len(data.train))
    finite = any(row["loss"] is not None for row in rows)
    return Trial(steps * per_step / float(rows[-1]["tokens_per_second"]), finite)
