"""Exchanges between all workers of a run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


def sum_over_workers(accelerator: Accelerator, values: list[float]) -> list[float]:
    """Return element-wise sums over all workers, in fp64."""
    if accelerator.num_processes == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    dist.all_reduce(total)
    return [float(v) for v in total.tolist()]


def average(tensors: list[Tensor], workers: int) -> None:
    """Replace each tensor by its mean over all workers, in place, in one exchange."""
    if not tensors:
        return
    together = torch.cat([tensor.flatten() for tensor in tensors]).div_(workers)
    dist.all_reduce(together)
    parts = torch.split(together, [tensor.numel() for tensor in tensors])  # type: ignore[no-untyped-call]
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def stop_agreed(accelerator: Accelerator, reason: str) -> bool:
    """Whether any worker was asked to stop (has a ``reason``). Every worker must call it at the same step."""
    return sum_over_workers(accelerator, [float(bool(reason))])[0] > 0


def from_first(accelerator: Accelerator, value: T) -> T:
    """Return the first worker's ``value``, which JSON can express, on every worker."""
    return gather(accelerator, value if accelerator.is_main_process else None)[0]  # type: ignore[return-value]


def gather(accelerator: Accelerator, value: T) -> list[T]:
    """Return the ``value`` of each worker, by rank. It must be one that JSON can express: torch's own exchange of
    objects unpickles what it receives, which whoever gets between two workers could replace by a program."""
    if accelerator.num_processes == 1:
        return [value]
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(accelerator.device)
    sizes = torch.zeros(accelerator.num_processes, dtype=torch.int64, device=accelerator.device)
    sizes[accelerator.process_index] = len(mine)
    dist.all_reduce(sizes)
    padded = mine.new_zeros(int(sizes.max()))
    padded[: len(mine)] = mine
    every = [torch.empty_like(padded) for _ in range(accelerator.num_processes)]
    dist.all_gather(every, padded)
    return [json.loads(bytes(t[:size].tolist())) for t, size in zip(every, sizes.tolist(), strict=True)]
