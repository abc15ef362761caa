"""The section ``distributed:`` of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ..errors import UserError

Strategy = Literal["ddp", "zero1", "zero2", "zero3", "fsdp"]


class DistributedConfig(BaseModel):
    """Section ``distributed:``. It may change from one start of a run to the next."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    strategy: Strategy = "ddp"
    """What is divided among the workers. ``ddp``: nothing; ``zero1``: the optimizer state; ``zero2``: the gradients as
    well; ``zero3`` and ``fsdp``: all weights as well. A single process trains as one worker, whatever the strategy."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What is kept in host memory. ``optimizer``: the optimizer state (zero1 to zero3); ``all``: the weights as well
    (zero3, fsdp)."""
    timeout_seconds: PositiveInt = 600
    """Seconds that a worker waits for another before it gives up, when the workers meet and in every exchange."""
    resident_size: NonNegativeInt | None = None
    """Size in elements up to which zero3 does not divide a tensor. Default: the size of the adapter's largest tensor,
    so that only base weights are gathered."""
    gpu_memory_gib: PositiveFloat | None = None
    """Memory of one GPU in GiB, for the advice of ``--check``. Default: the memory of this machine's GPU."""

    @model_validator(mode="after")
    def _offload_fits(self) -> DistributedConfig:
        possible = {"none": None, "optimizer": ("zero1", "zero2", "zero3"), "all": ("zero3", "fsdp")}[self.offload]
        if possible and self.strategy not in possible:
            raise UserError(
                f"distributed.offload: {self.offload} needs distributed.strategy to be one of {', '.join(possible)}, "
                f"got {self.strategy}",
                key="distributed.offload",
            )
        return self
