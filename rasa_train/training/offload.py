"""Activations in host memory between the forward and backward pass: frees memory on a small GPU, costs bus time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..objectives.contract import Batch, Loss

LEAST = 2**16
"""Size of a tensor in bytes below which moving it is not worth a copy."""


@dataclass
class Moved:
    bytes: int = 0
    """Total size of the tensors that were moved to host memory."""


def with_offload(losses: Loss) -> Loss:
    """Return ``losses`` with the tensors that its backward pass needs held in host memory."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with offloaded(model):
            return losses(model, batch)

    return loss


@contextmanager
def offloaded(model: nn.Module, source: str = "cuda") -> Iterator[Moved]:
    """Copy what autograd saves inside the context to (pinned) host memory, and back when the backward pass asks for it.

    The weights of ``model`` stay where they are, whatever view of them is saved. Copies are queued on the stream that
    computes, so they stay in order with all other work; values do not change.

    Args:
        source: the kind of device whose tensors are moved.
    """
    held = [t for t in [*model.parameters(), *model.buffers()] if t.device.type == source]
    weights = {t.untyped_storage().data_ptr() for t in held}
    moved = Moved()

    def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        storage, size = tensor.untyped_storage(), tensor.numel() * tensor.element_size()
        expanded = size > storage.nbytes()  # a copy would be larger than the tensor's storage
        if tensor.device.type != source or size < LEAST or expanded or storage.data_ptr() in weights:
            return tensor
        moved.bytes += size
        host = torch.empty_like(tensor, device="cpu", pin_memory=source == "cuda")
        return tensor.device, host.copy_(tensor, non_blocking=True)

    def unpack(saved: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        return saved if isinstance(saved, Tensor) else saved[1].to(saved[0], non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield moved
