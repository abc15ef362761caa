"""One buffer for the trained operands of groups of linears: a few operations fill it for all layers, and each group has
only one gradient to accumulate."""

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
    """Tensors of the given shapes for each of ``rows`` groups, one row of ``buffer`` (rows, sum of sizes) for a group,
    with ``dtype`` on the device of ``like``.

    ``put`` fills a tensor of all rows. Gradients then reach the source values in one of two ways. After ``train`` each
    row is a leaf: it accumulates the gradients of many backward passes (in fp32, as a parameter would), and
    ``gradients`` yields the sums. After ``join`` the rows are part of the values' graph, and each backward pass goes
    through them.
    """

    views: list[Tensor]
    """The tensors, each (rows, *shape)."""
    handles: Sequence[Tensor]
    """The rows as differentiable arguments."""

    def __init__(self, rows: int, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, like: Tensor) -> None:
        self.buffer = like.new_zeros(rows, sum(map(math.prod, shapes)), dtype=dtype)
        self.views = blocks(self.buffer, shapes)
        self.handles = self.buffer.unbind()
        self._values: list[Tensor] = []
        self._parts: list[Callable[[Tensor], Tensor]] = []
        self._edges: list[GradientEdge] = []

    @torch.no_grad()
    def put(self, place: Tensor, values: Tensor) -> None:
        """Copy ``values`` to ``place``, a view of all rows. Must be called before the buffer is used in a graph."""
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
            for row in self.handles:
                row.requires_grad_(True)
                row.grad_dtype = torch.float32
        self._values = []

    def join(self) -> None:
        """Make the rows part of the graph of the values, if any of them is trained."""
        if self._values and torch.is_grad_enabled():
            joined: Tensor = _Join.apply(self.buffer, self._parts, *self._values)  # type: ignore[no-untyped-call]
            self.handles = joined.unbind()
        self._values = []

    def gradients(self) -> Iterator[tuple[GradientEdge, Tensor]]:
        """Yield the edges of the values' graph, each with its accumulated gradient."""
        found = [row.grad for row in self.handles]
        used = next((grad for grad in found if grad is not None), None)
        if used is not None:
            sums = torch.stack([torch.zeros_like(used) if grad is None else grad for grad in found])
            for edge, part in zip(self._edges, self._parts, strict=True):
                yield edge, part(sums)


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
    row: int
    """Row of ``flat`` that belongs to the group."""
    dtype: torch.dtype

    def outputs(self, x: Tensor, p: float) -> tuple[Tensor, ...]:
        """Compute y of all members for x (..., in), each entry of which is dropped with probability ``p``."""
        results: tuple[Tensor, ...] = self.function.apply(x, p, self.operands, self.flat.handles[self.row])  # type: ignore[no-untyped-call]
        # Shaped here, because a model may add to y in place, and autograd forbids that for a view that a function made.
        return tuple(y.view(*x.shape[:-1], -1) for y in results)


def blocks(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return views of ``flat`` (..., size) with the given shapes (..., *shape), one after the other."""
    parts = torch.split(flat, [math.prod(shape) for shape in shapes], -1)  # type: ignore[no-untyped-call]
    return [part.view(*flat.shape[:-1], *shape) for part, shape in zip(parts, shapes, strict=True)]
