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
    """Return the engine of ``config.strategy``. One worker has nothing to divide, unless it is to use host memory."""
    if config.strategy == "ddp" or (accelerator.num_processes == 1 and config.offload == "none"):
        return DataParallel(config, accelerator, max_grad_norm)
    return (FullyShard if config.strategy == "fsdp" else Zero)(config, accelerator, max_grad_norm)
