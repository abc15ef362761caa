"""Everything that knows of more than one process: workers, sums over them, the agreed stop."""

from __future__ import annotations

import os
import resource
import signal
import sys
from importlib.metadata import version
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from . import __version__


def start(*, log_with: list[str] | None = None, project_dir: str | None = None, cpu: bool = False) -> Accelerator:
    """Join the process group the launcher made, or be the one worker.

    Raises:
        RuntimeError: accelerate sees another number of workers than the launcher started. That would train
            each of them on its own, without an error.
    """
    accelerator = Accelerator(
        cpu=cpu or not torch.cuda.is_available(),
        log_with=log_with or None,
        project_dir=project_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise RuntimeError(f"the launcher started {expected} workers, accelerate sees {accelerator.num_processes}")
    return accelerator


def sum_over_workers(accelerator: Accelerator, values: list[float]) -> list[float]:
    """Element-wise sums over all workers, in fp64."""
    if accelerator.num_processes == 1:
        return values
    total: Any = accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=accelerator.device), "sum")
    return [float(v) for v in total.tolist()]


def micro_batch_seed(seed: int, step: int, example: int) -> int:
    """Seed of the dropout masks of the micro-batch of ``step`` that begins with ``example``: the same on any number
    of workers, so there is no RNG state to save, and a resumed run draws what the uninterrupted one draws."""
    return ((seed * 1_000_003 + step) * 16_777_619 + example) % 2**63


class StopSignal:
    """Remembers SIGTERM and SIGUSR1 (SLURM's warning) until the step is done; the loop then saves and leaves."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any worker was asked to stop. Every worker must call it at the same step."""
        return sum_over_workers(accelerator, [float(self.reason is not None)])[0] > 0


def peak_memory_bytes() -> int:
    """Most memory this worker has held: on the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    others = ("torch", "transformers", "accelerate", "lion-pytorch")
    return {"rasa_train": __version__, **{name: version(name) for name in others}}
