"""The section ``distributed:`` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ..errors import UserError

Strategy = Literal["ddp", "zero1", "zero2", "zero3", "fsdp"]
Offload = Literal["none", "optimizer", "all"]


@dataclass(frozen=True)
class Capabilities:
    """What a strategy divides among the workers, and what follows from that for the rest of the package."""

    stage: Literal[0, 1, 2, 3]
    """0: nothing is divided; 1: the optimizer state; 2: the gradients as well; 3: all weights as well."""
    offloads: tuple[Offload, ...] = ("none",)
    """What can be kept in host memory."""
    divides_adapter: bool = False
    """Whether the trained weights are divided as well as those of the base."""
    divides_as_it_loads: bool = False
    """Whether no worker ever holds the whole base in memory."""
    gathers_the_rest_at_once: bool = False
    """Whether all parameters outside the repeated layers are whole at one time, instead of one after the other."""
    own_masters: bool = False
    """Whether the optimizer steps on a copy of its own of what is trained."""

    @property
    def divides_weights(self) -> bool:
        return self.stage == 3


STRATEGIES: dict[Strategy, Capabilities] = {
    "ddp": Capabilities(0),
    "zero1": Capabilities(1, ("none", "optimizer"), own_masters=True),
    "zero2": Capabilities(2, ("none", "optimizer"), own_masters=True),
    "zero3": Capabilities(3, ("none", "optimizer", "all"), divides_as_it_loads=True, own_masters=True),
    "fsdp": Capabilities(3, ("none", "all"), divides_adapter=True, gathers_the_rest_at_once=True),
}
"""The capabilities of each strategy. Each divides at least as much as the one before."""


class DistributedConfig(BaseModel):
    """Section ``distributed:``. It may change from one start of a run to the next."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    strategy: Strategy = "ddp"
    """What is divided among the workers. ``ddp``: nothing; ``zero1``: the optimizer state; ``zero2``: the gradients as
    well; ``zero3`` and ``fsdp``: all weights as well. A single process trains as one worker, whatever the strategy."""
    offload: Offload = "none"
    """What is kept in host memory. ``optimizer``: the optimizer state (zero1 to zero3); ``all``: the weights as well
    (zero3, fsdp)."""
    timeout_seconds: PositiveInt = 600
    """Seconds that a worker waits for another before it gives up, when the workers meet and in every exchange."""
    resident_size: NonNegativeInt | None = None
    """Size in elements up to which zero3 does not divide a tensor. Default: the size of the adapter's largest tensor,
    so that only base weights are gathered."""
    gpu_memory_gib: PositiveFloat | None = None
    """Memory in GiB of a GPU that is to train. ``rasa-train check RECIPE`` compares the run with it. Default: this
    machine's GPUs, or its own memory if it has none."""

    @model_validator(mode="after")
    def _offload_fits(self) -> DistributedConfig:
        if self.offload not in STRATEGIES[self.strategy].offloads:
            possible = [name for name, capabilities in STRATEGIES.items() if self.offload in capabilities.offloads]
            raise UserError(
                f"distributed.offload: {self.offload} needs distributed.strategy to be one of {', '.join(possible)}, "
                f"got {self.strategy}",
                key="distributed.offload",
            )
        return self

    def capabilities(self, workers: int) -> Capabilities:
        """Return what is divided among so many workers. One worker has nothing to divide, unless it is to use host
        memory."""
        return STRATEGIES["ddp" if workers == 1 and self.offload == "none" else self.strategy]
