"""The contract of a strategy. An ``Engine`` is one way to share a model among workers.

The training loop calls the same few methods whichever strategy it is: ``DataParallel`` (also one process), ``Zero``
(DeepSpeed, stages 1 to 3), ``FullyShard`` (torch's FSDP2). All of them give the gradients of one process: the sum over
workers of what each has computed.
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
    """One way to share a model among workers. ``prepare`` once, then for each step: ``backward`` for every
    micro-batch, ``step``, ``zero_grad``."""

    sharded: ClassVar[bool]
    """Workers hold parts of the trained tensors, or wait for each other in the forward pass."""
    first_reads: ClassVar[bool] = False
    """Before ``prepare`` only the first worker has values; those of the others are on the meta device until then."""

    def __init__(self, config: DistributedConfig, accelerator: Accelerator, max_grad_norm: float | None) -> None:
        self.config, self.accelerator = config, accelerator
        self.max_grad_norm = max_grad_norm or math.inf
        self.model: nn.Module
        """What is called with a batch; set by ``prepare``."""
        self.optimizer: torch.optim.Optimizer
        """Whose learning rate is set; made by ``prepare``."""

    @property
    def reads(self) -> bool:
        """Whether this worker reads the base, and the adapter to start from."""
        return self.accelerator.is_main_process or not self.first_reads

    def loading(self, dtype: torch.dtype, *, divide: bool) -> AbstractContextManager[None]:
        """Around the loading of the base in ``dtype``. ``divide``: weights may be divided as they are read."""
        return nullcontext()

    @abstractmethod
    def prepare(
        self, model: nn.Module, make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    ) -> None:
        """Place and divide the model, and the optimizer of what is trained in it."""

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of ``loss``; with the ``last`` micro-batch of a step, average over workers."""

    @abstractmethod
    def synchronizing(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch: gradients are exchanged with the ``last`` only."""

    @abstractmethod
    def step(self, loss: float) -> float:
        """Clip, update. Returns the L2 norm of all gradients before clipping, equal on all workers, as ``loss`` is.
        If one of them is not finite, nothing is updated: neither parameters nor the optimizer's state."""

    @abstractmethod
    def zero_grad(self) -> None: ...

    @abstractmethod
    def release(self) -> None:
        """After a forward pass that no backward pass follows: let go of what it has gathered."""

    @abstractmethod
    def whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor of the model. Every worker must call it."""

    @abstractmethod
    def optimizer_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """All of the optimizer's state of a parameter, by its key. Every worker must call it."""

    @abstractmethod
    def load_optimizer_state(self, states: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        """The reverse of ``optimizer_state``, for all parameters at once."""

    @torch.no_grad()
    def gathered(
        self, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors, one at a time, those of larger dtypes first. Every worker must go through all of them."""
        for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
            whole = self.whole(tensors[name])
            assert tuple(whole.shape) == tuple(shapes[name]), (name, tuple(whole.shape), shapes[name])
            yield name, whole

    def gathered_optimizer(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
        """``<state key>:<parameter name>`` and the whole tensor, one at a time. Every worker must go through all."""
        for name, parameter in parameters.items():
            for key, tensor in self.optimizer_state(parameter).items():
                yield f"{key}:{name}", torch.as_tensor(tensor)


def placed_state(optimizer: torch.optim.Optimizer, parameter: Tensor, state: Tensor) -> Tensor:
    """Move state to where ``optimizer`` wants it. The count of steps is on the CPU, unless a fused kernel counts."""
    fused = optimizer.param_groups[0].get("fused")
    return state.to(parameter.device) if fused or state.shape == parameter.shape else state
