"""One buffer for the trained operands of a group of linears, so that only one gradient has to be accumulated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge


class Flat:
    """Tensors of the given shapes, stored one after the other in ``buffer`` with ``dtype`` on the device of ``like``.

    ``put`` fills the tensors. Gradients then reach the source values in one of two ways. After ``train`` the buffer is
    a leaf: it accumulates the gradients of many backward passes (in fp32, as a parameter would), and ``gradients``
    yields the sums. After ``join`` the buffer is part of the values' graph, and each backward pass goes through it.
    """

    handle: Tensor
    """The buffer as a differentiable argument."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, like: Tensor) -> None:
        self.buffer = like.new_zeros(sum(map(math.prod, shapes)), dtype=dtype)
        self.views = blocks(self.buffer, shapes)
        self.handle = self.buffer
        self._values: list[Tensor] = []
        self._parts: list[Callable[[Tensor], Tensor]] = []
        self._edges: list[GradientEdge] = []

    @torch.no_grad()
    def put(self, place: Tensor, values: Tensor) -> None:
        """Copy ``values`` to ``place``, a view of the buffer. Must be called before the buffer is used in a graph."""
        place.copy_(values)
        if values.requires_grad:
            size, stride, offset = place.size(), place.stride(), place.storage_offset()
            self._values.append(values)
            self._parts.append(lambda flat: flat.as_strided(size, stride, offset))

    def train(self) -> None:
        """Accumulate gradients from now on, if any of the values is trained. The values are not kept, because the edges
        of their graph are enough."""
        if self._values and torch.is_grad_enabled():
            self._edges = [get_gradient_edge(values) for values in self._values]
            self.buffer.requires_grad_(True)
            self.buffer.grad_dtype = torch.float32
        self._values = []

    def join(self) -> None:
        """Make the buffer part of the graph of the values, if any of them is trained."""
        if self._values and torch.is_grad_enabled():
            self.handle = _Join.apply(self.buffer, self._parts, *self._values)  # type: ignore[no-untyped-call]
        self._values = []

    def gradients(self) -> Iterator[tuple[GradientEdge, Tensor]]:
        """Yield the edges of the values' graph, each with its accumulated gradient."""
        if self.buffer.grad is not None:
            for edge, part in zip(self._edges, self._parts, strict=True):
                yield edge, part(self.buffer.grad)


class _Join(torch.autograd.Function):
    """The filled buffer as a differentiable function of the values in it."""

    @staticmethod
    def forward(ctx: Any, buffer: Tensor, parts: list[Callable[[Tensor], Tensor]], *values: Tensor) -> Tensor:
        ctx.parts, ctx.dtypes = parts, [value.dtype for value in values]
        return buffer.view_as(buffer)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat = grad.contiguous()
        return None, None, *(part(flat).to(dtype) for part, dtype in zip(ctx.parts, ctx.dtypes, strict=True))


@dataclass(frozen=True)
class Packed:
    """A group whose operands are packed, and the function that computes all its members from them."""

    function: type[torch.autograd.Function]
    """Function of x (..., in), the dropout probability, ``operands`` and the buffer of ``flat``; it returns y of all
    members."""
    operands: Any
    flat: Flat
    dtype: torch.dtype

    def outputs(self, x: Tensor, p: float) -> tuple[Tensor, ...]:
        """Compute y of all members for x (..., in), each entry of which is dropped with probability ``p``."""
        results: tuple[Tensor, ...] = self.function.apply(x, p, self.operands, self.flat.handle)  # type: ignore[no-untyped-call]
        # Shaped here, because a model may add to y in place, and autograd forbids that for a view that a function made.
        return tuple(y.view(*x.shape[:-1], -1) for y in results)


def blocks(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return views of ``flat`` with the given shapes, one after the other."""
    parts = torch.split(flat, [math.prod(shape) for shape in shapes])  # type: ignore[no-untyped-call]
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
