"""The contract of a strategy. An ``Engine`` is one way to share a model among workers.

The training loop calls the same few methods whatever the strategy: ``DataParallel`` (also one process), ``Zero``
(DeepSpeed, stages 1 to 3), ``FullyShard`` (torch's FSDP2). All of them give the gradients that one process would
compute: the sum over workers of what each has computed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from .config import DistributedConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


class Engine(ABC):
    """One way to share a model among workers. Call ``prepare`` once, then for each step: ``backward`` for every
    micro-batch, ``step``, ``zero_grad``."""

    first_reads: ClassVar[bool] = False
    """Whether only the first worker has values before ``prepare``; until then the others' are on the meta device."""

    def __init__(self, config: DistributedConfig, accelerator: Accelerator, max_grad_norm: float | None) -> None:
        self.config, self.accelerator = config, accelerator
        self.capabilities = config.capabilities(accelerator.num_processes)
        self.max_grad_norm = max_grad_norm or math.inf
        self.model: nn.Module
        """The model that is called with a batch; set by ``prepare``."""
        self.optimizer: torch.optim.Optimizer
        """The optimizer whose learning rate is set; made by ``prepare``."""

    @property
    def sharded(self) -> bool:
        """Whether workers hold parts of the trained tensors, or wait for each other in the forward pass."""
        return self.capabilities.stage > 0

    @property
    def reads(self) -> bool:
        """Whether this worker reads the base, and the adapter to start from."""
        return self.accelerator.is_main_process or not self.first_reads

    def loading(self, dtype: torch.dtype, *, divide: bool) -> AbstractContextManager[None]:
        """Return a context for loading the base in ``dtype``. ``divide``: weights may be divided as they are read."""
        return nullcontext()

    @abstractmethod
    def prepare(
        self, model: nn.Module, make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    ) -> None:
        """Place and divide the model, and make the optimizer of its trained parameters."""

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of ``loss``; with the ``last`` micro-batch of a step, average them over workers."""

    @abstractmethod
    def synchronizing(self, last: bool) -> AbstractContextManager[None]:
        """Return a context for forward and backward of a micro-batch; only the ``last`` one exchanges gradients."""

    @abstractmethod
    def step(self, loss: float) -> float:
        """Clip the gradients and update the parameters. Returns the L2 norm of all gradients before clipping, which is
        equal on all workers, as ``loss`` is. If the norm or ``loss`` is not finite, nothing is updated: neither
        parameters nor the optimizer's state."""

    @abstractmethod
    def zero_grad(self) -> None: ...

    @abstractmethod
    def release(self) -> None:
        """Release the weights that a forward pass has gathered, if no backward pass follows it."""

    @abstractmethod
    def whole(self, tensor: Tensor) -> Tensor:
        """Return the whole of a tensor of the model. Every worker must call it."""

    @abstractmethod
    def optimizer_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the whole optimizer state of a parameter, by the key of the state. Every worker must call it."""

    @abstractmethod
    def load_optimizer_state(self, states: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        """Restore what ``optimizer_state`` returned, for all parameters at once."""

    @torch.no_grad()
    def gathered(
        self, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield whole tensors, one at a time, larger dtypes first. Every worker must go through all of them."""
        for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
            whole = self.whole(tensors[name])
            assert tuple(whole.shape) == tuple(shapes[name]), (name, tuple(whole.shape), shapes[name])
            yield name, whole

    def gathered_optimizer(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
        """Yield ``<state key>:<parameter name>`` and the whole tensor, one by one. Every worker must go through all."""
        for name, parameter in parameters.items():
            for key, tensor in self.optimizer_state(parameter).items():
                yield f"{key}:{name}", torch.as_tensor(tensor)


def placed_state(optimizer: torch.optim.Optimizer, parameter: Tensor, state: Tensor) -> Tensor:
    """Move state to where ``optimizer`` wants it. The step count stays on the CPU, unless a fused kernel counts."""
    fused = optimizer.param_groups[0].get("fused")
    return state.to(parameter.device) if fused or state.shape == parameter.shape else state
