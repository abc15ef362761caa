"""One buffer for the trained operands of groups of linears: a few operations fill it for all layers, and each group has
only one gradient to accumulate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .operators import Operands
from .quantized_weight import Narrow


class Buffers:
    """Buffers of one dtype that are allocated once and filled again at each step, so that their addresses stay."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._held: dict[tuple[Any, ...], Flat] = {}
        self._number = 0

    def begin(self) -> None:
        """Begin a step: the same requests as before, in the same order, get the same buffers."""
        self._number = 0

    def take(self, rows: int, shapes: Sequence[tuple[int, ...]], like: Tensor) -> Flat:
        """Return the next buffer; the arguments are those of ``Flat``."""
        key = (self._number, rows, tuple(shapes), like.device)
        self._number += 1
        if key not in self._held:
            self._held[key] = Flat(rows, shapes, self.dtype, like)
        return self._held[key].cleared()


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
    rows: Sequence[Tensor]

    def __init__(self, rows: int, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, like: Tensor) -> None:
        self.buffer = like.new_zeros(rows, sum(map(math.prod, shapes)), dtype=dtype)
        self.views = blocks(self.buffer, shapes)
        self.rows = self.buffer.unbind()
        self.cleared()

    def cleared(self) -> Flat:
        """Forget the values that were put, and their gradients; return the buffer itself."""
        for row in self.rows:
            row.grad = None
        self.operands: list[Operands] = []
        self._values: list[Tensor] = []
        self._parts: list[Callable[[Tensor], Tensor]] = []
        self._edges: list[GradientEdge] = []
        return self

    def packed(
        self,
        kind: type[Operands],
        weights: Sequence[list[Tensor | Narrow]],
        biases: Sequence[list[Tensor | None]],
        seeded: bool,
        layouts: Sequence[tuple[Any, ...]],
    ) -> Flat:
        """Make the operands of each group, which are of one kind; return the buffer itself. ``train`` and ``join`` make
        the operands differentiable."""
        of_rows = zip(self.rows, weights, biases, layouts, strict=True)
        self.operands = [kind(row, own, bias, seeded, layout) for row, own, bias, layout in of_rows]
        return self

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
            for row in self.rows:
                row.requires_grad_(True)
                row.grad_dtype = torch.float32
        self._values = []

    def join(self) -> None:
        """Make the rows part of the graph of the values, if any of them is trained."""
        if self._values and torch.is_grad_enabled():
            joined: Tensor = _Join.apply(self.buffer, self._parts, *self._values)  # type: ignore[no-untyped-call]
            for operands, row in zip(self.operands, joined.unbind(), strict=True):
                operands.flat = row
        self._values = []

    def gradients(self) -> Iterator[tuple[GradientEdge, Tensor]]:
        """Yield the edges of the values' graph, each with its accumulated gradient."""
        found = [row.grad for row in self.rows]
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


def blocks(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return views of ``flat`` (..., size) with the given shapes (..., *shape), one after the other."""
    parts = torch.split(flat, [math.prod(shape) for shape in shapes], -1)  # type: ignore[no-untyped-call]
    return [part.view(*flat.shape[:-1], *shape) for part, shape in zip(parts, shapes, strict=True)]
