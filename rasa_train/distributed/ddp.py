"""Data parallelism: every worker holds the whole model, and gradients are averaged once a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from .collectives import average
from .engine import Engine, placed_state

BUCKET = 64 << 20
"""Bytes of gradients that are exchanged at a time under ``ddp``."""


class DataParallel(Engine):
    """Engine whose workers each hold everything and average gradients. One process is the case of one worker."""

    def prepare(
        self, model: nn.Module, make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    ) -> None:
        self.model = model.to(self.accelerator.device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters)

    def synchronizing(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, loss: float) -> float:
        self._average_gradients()
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm))
        if math.isfinite(loss + norm):
            self.optimizer.step()
        return norm

    def _average_gradients(self) -> None:
        """Average the gradients once a step, in a few large exchanges. torch's DistributedDataParallel does not fit: it
        waits for the gradient of each parameter in each backward pass, and the gradients of packed factors come all at
        once, after the last backward pass."""
        if self.accelerator.num_processes == 1:
            return
        bucket: list[Tensor] = []
        size = 0
        for parameter in self.parameters:
            if parameter.grad is None:  # not reached by this worker's examples
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            size += parameter.grad.nbytes
            if size >= BUCKET:
                average(bucket, self.accelerator.num_processes)
                bucket, size = [], 0
        average(bucket, self.accelerator.num_processes)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def release(self) -> None:
        """Do nothing, because nothing was gathered."""

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor

    def optimizer_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return dict(self.optimizer.state.get(parameter, {}))

    def load_optimizer_state(self, states: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        for parameter, state in states.items():
            for key, tensor in state.items():
                self.optimizer.state[parameter][key] = placed_state(self.optimizer, parameter, tensor)
