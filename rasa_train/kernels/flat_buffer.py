"""What a group of linears is computed with: its trained operands in one buffer, which has one gradient to add up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Packed:
    """A group whose operands are packed, and the function that computes all its members from them."""

    function: type[torch.autograd.Function]
    """Of x (..., in), the probability of dropout, ``operands`` and the buffer of ``flat``: y of all members."""
    operands: Any
    flat: Flat
    dtype: torch.dtype

    def outputs(self, x: Tensor, p: float) -> tuple[Tensor, ...]:
        """Compute y of all members, for x (..., in) of which each entry is dropped with probability ``p``."""
        result: tuple[Tensor, ...] = self.function.apply(x, p, self.operands, self.flat.buffer)  # type: ignore[no-untyped-call]
        return result


def blocks(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The tensors of these shapes that lie in ``flat`` one after the other."""
    parts = torch.split(flat, [math.prod(shape) for shape in shapes])  # type: ignore[no-untyped-call]
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
