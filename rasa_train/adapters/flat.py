"""Trained operands of one group of linears in one buffer, which has one gradient to add up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


class Flat:
    """Tensors of these shapes that lie one after the other in ``buffer``, of dtype ``dtype`` on the device of ``like``.

    They are filled by ``put``; what has come together in the buffer's gradient (fp32, as a parameter's would be) goes
    back, by ``gradients``, to where the values that were put came from.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, like: Tensor) -> None:
        self.buffer = like.new_zeros(sum(map(math.prod, shapes)), dtype=dtype)
        self.views = blocks(self.buffer, shapes)
        self._sources: list[tuple[GradientEdge, Callable[[Tensor], Tensor]]] = []

    @torch.no_grad()
    def put(self, place: Tensor, values: Tensor) -> None:
        """Copy ``values`` to ``place``, a view of the buffer. Before the first use of the buffer in a graph."""
        place.copy_(values)
        if values.requires_grad:
            size, stride, offset = place.size(), place.stride(), place.storage_offset()
            self._sources.append((get_gradient_edge(values), lambda flat: flat.as_strided(size, stride, offset)))

    def train(self) -> None:
        """Let gradients come together from here on, where there is anything to train."""
        if self._sources and torch.is_grad_enabled():
            self.buffer.requires_grad_(True)
            self.buffer.grad_dtype = torch.float32

    def gradients(self) -> Iterator[tuple[GradientEdge, Tensor]]:
        """What has come together, and where in the graph of the values it belongs."""
        if self.buffer.grad is not None:
            for edge, part in self._sources:
                yield edge, part(self.buffer.grad)


def blocks(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The tensors of these shapes that lie in ``flat`` one after the other."""
    parts = torch.split(flat, [math.prod(shape) for shape in shapes])  # type: ignore[no-untyped-call]
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
