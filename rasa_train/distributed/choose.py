"""The choice of the engine for a strategy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .config import DistributedConfig
from .ddp import DataParallel
from .engine import Engine
from .fsdp import FullyShard
from .zero import Zero

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_engine(config: DistributedConfig, accelerator: Accelerator, max_grad_norm: float | None) -> Engine:
    """Return the engine of ``config.strategy``, or that of ddp if there is nothing to divide."""
    if not config.capabilities(accelerator.num_processes).stage:
        return DataParallel(config, accelerator, max_grad_norm)
    return (FullyShard if config.strategy == "fsdp" else Zero)(config, accelerator, max_grad_norm)
