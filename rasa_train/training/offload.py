"""Activations in host memory between the forward and backward pass: frees memory on a small GPU, costs bus time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor, nn

from ..objectives.contract import Batch, Loss

LEAST = 2**16
"""Size of a tensor in bytes below which moving it is not worth a copy."""


IN_FLIGHT = 2**29
"""Largest total size in bytes of the tensors whose memory on the device is kept until their copies are done."""


class Copy(Protocol):
    """A copy of a tensor to the host that has been queued."""

    def done(self) -> bool: ...

    def before_next(self) -> None:
        """Let what is queued on the current stream from now on begin after the copy, without waiting here."""

    def guard(self, tensor: Tensor) -> None:
        """Keep the memory of ``tensor`` from other uses until the copy is done, even if nothing holds the tensor."""


class SideCopy:
    """A copy on a stream of its own, after all that the current stream has been given so far."""

    def __init__(self, tensor: Tensor, host: Tensor) -> None:
        self._side, self._device = _side(tensor.device), tensor.device
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            host.copy_(tensor, non_blocking=True)
        self._event = self._side.record_event()

    def done(self) -> bool:
        return bool(self._event.query())

    def before_next(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def guard(self, tensor: Tensor) -> None:
        tensor.record_stream(self._side)


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class CopyAtOnce:
    def __init__(self, tensor: Tensor, host: Tensor) -> None:
        host.copy_(tensor)

    def done(self) -> bool:
        return True

    def before_next(self) -> None:
        pass

    def guard(self, tensor: Tensor) -> None:
        pass


@dataclass
class Saved:
    """A tensor that has been copied, or is being copied, to host memory."""

    device: torch.device
    host: Tensor
    copy: Copy
    original: Tensor | None
    """The tensor itself, as long as it is held."""

    def get(self) -> Tensor:
        if self.original is not None:  # the backward pass asks so early that nothing has to come back
            return self.original
        self.copy.before_next()
        return self.host.to(self.device, non_blocking=True)


class Moved:
    """The tensors that were moved to host memory, in the order of their copies.

    A tensor is held until its copy is done, since the memory of a tensor that nothing holds is used again. Once the
    tensors that are held have more than ``most`` bytes, the oldest are released early. The stream that computes then
    waits for their copies: whatever uses their memory next is queued on that stream later, so it finds the copies done.
    """

    def __init__(self, most: int = IN_FLIGHT) -> None:
        self.bytes = 0
        """Total size of all tensors that were moved."""
        self.held = 0
        """Total size of the tensors that are held."""
        self._most = most
        self._queue: deque[Saved] = deque()

    def add(self, saved: Saved) -> Saved:
        self.bytes += saved.host.nbytes
        self.held += saved.host.nbytes
        self._queue.append(saved)
        while self._queue and (self._queue[0].copy.done() or self.held > self._most):
            oldest = self._queue.popleft()
            oldest.copy.before_next()
            oldest.original = None
            self.held -= oldest.host.nbytes
        return saved

    def finish(self) -> None:
        """Leave each tensor that is still held to the graph, which releases it once it has been used."""
        for saved in self._queue:
            if saved.original is not None:
                saved.copy.guard(saved.original)
        self._queue.clear()
        self.held = 0


def with_offload(losses: Loss) -> Loss:
    """Return ``losses`` with the tensors that its backward pass needs held in host memory."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with offloaded(model):
            return losses(model, batch)

    return loss


@contextmanager
def offloaded(
    model: nn.Module, source: str = "cuda", copy: Callable[[Tensor, Tensor], Copy] | None = None, most: int = IN_FLIGHT
) -> Iterator[Moved]:
    """Copy what autograd saves inside the context to (pinned) host memory, and back when the backward pass asks for it.

    The weights of ``model`` stay where they are, whatever view of them is saved. Copies to the host are made on a
    second stream, beside the computation, and copies back on the stream that computes. Values do not change.

    Args:
        source: the kind of device whose tensors are moved.
        copy: queues a copy of its first tensor into its second. By default on a second stream if there is one.
        most: bytes that tensors may keep on the device while they are being copied.
    """
    copied = copy or (SideCopy if source == "cuda" else CopyAtOnce)
    held = [t for t in [*model.parameters(), *model.buffers()] if t.device.type == source]
    weights = {t.untyped_storage().data_ptr() for t in held}
    moved = Moved(most)

    def pack(tensor: Tensor) -> Tensor | Saved:
        storage, size = tensor.untyped_storage(), tensor.numel() * tensor.element_size()
        expanded = size > storage.nbytes()  # a copy would be larger than the tensor's storage
        if tensor.device.type != source or size < LEAST or expanded or storage.data_ptr() in weights:
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=source == "cuda")
        return moved.add(Saved(tensor.device, host, copied(tensor, host), tensor))

    def unpack(saved: Tensor | Saved) -> Tensor:
        return saved.get() if isinstance(saved, Saved) else saved

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield moved
    finally:
        moved.finish()
