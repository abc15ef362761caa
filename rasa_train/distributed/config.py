"""The section ``distributed:`` of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ..errors import UserError

Strategy = Literal["ddp", "zero1", "zero2", "zero3", "fsdp"]


class DistributedConfig(BaseModel):
    """Section ``distributed:``. May change from one start of a run to the next."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    strategy: Strategy = "ddp"
    """What is divided among the workers: nothing (ddp), optimizer state (zero1), and gradients (zero2), and all weights
    (zero3, fsdp). One process is the case of one worker, whatever this says."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What is kept in host memory: optimizer state (zero1 to zero3), or the weights as well (zero3, fsdp)."""
    timeout_seconds: PositiveInt = 600
    """How long a worker waits for another before it gives up: when they meet, and in every exchange."""
    resident_size: NonNegativeInt | None = None
    """zero3: tensors of at most this many elements are not divided. Default: the largest of the adapter, so that only
    base weights are gathered."""
    gpu_memory_gib: PositiveFloat | None = None
    """Memory of one GPU in GiB, for the advice of ``--check``. Default: that of the GPU that is there."""

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
