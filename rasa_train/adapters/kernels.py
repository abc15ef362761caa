"""The fast path: linears that share an input are one operation, and their factors are packed once a step.

A layer calls q_proj, k_proj and v_proj with one x (gate_proj and up_proj with another). Such linears are a ``Group``:

    z = drop(x) A^T                 A (R, in): the factors A_i of all members, one below the other
    y_i = x W_i^T + z_i Bd_i^T      Bd_i = diag(b_i) B_i diag(d_i), added into the base's output; z_i: columns of z

and backwards, with g_i = dy_i Bd_i:

    dx = sum_i dy_i W_i + drop^T(g A),    dA = g^T drop(x),    dBd_i = dy_i^T z_i

So x and each dy_i are read no more often than the arithmetic needs, z (tokens x R) is all that is kept beside x, and
nothing is cast, concatenated or scaled per token. Inside ``packed`` A and Bd_i are buffers in the dtype of W, made of
the methods' fp32 ``factors()`` once; their gradients (fp32, summed over micro-batches) go back through ``factors()``
once. Outside of it, and for an adapter that is no product of factors, the adapter's own ``forward`` is called: the
reference, which gives the same numbers and works wherever parameters have hooks or are partitioned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..precision import Narrow, NarrowLinear
from .base import Adapter, FactorAdapter, Factors
from .dropout import dropout

ALIGNMENT = 8
"""Trained ranks are padded (with zeros) to a multiple: 16 bytes a row in a 16-bit dtype, which matrix units want."""


class Linear(Protocol):
    """A linear with an adapter."""

    weight: Any  # Tensor; nn.Module's attributes are looser
    narrow: Narrow | None
    bias: Any
    transposed: bool
    adapter: Adapter


class Group:
    """Linears of one layer, in the order in which it calls them, each time with one and the same input.

    With packed factors the first one that is called computes for all, and the others find their result here. A layer
    that does otherwise still gets the right result: its linears are then computed one by one, by the plain path.
    """

    def __init__(self, members: Sequence[Linear]) -> None:
        self.members = tuple(members)
        self.packed: Packed | None = None
        self._together = True
        self._input: Tensor | None = None
        self._ready: dict[int, Tensor] = {}
        """By member that is still to be called: its output; without packed factors the input of its adapter."""
        self._fused = False

    def __call__(self, index: int, x: Tensor) -> Tensor:
        """y (..., out) of member ``index`` for x (..., in)."""
        if index not in self._ready or not _same(self._input, x):
            self._together &= index not in self._ready
            self._compute(range(len(self.members)) if self._together else (index,), x)
        ready = self._ready.pop(index)
        if not self._ready:
            self._input = None
        # Not before it is called: only then are its parameters there, if they are partitioned.
        return ready if self._fused else plain(self.members[index], x, ready)

    def _compute(self, indices: Sequence[int], x: Tensor) -> None:
        adapters = [self.members[index].adapter for index in indices]
        for adapter in adapters:
            watched(adapter, x)
        self._fused = self._together and self.packed is not None and x.dtype == self.packed.dtype
        if self._fused and self.packed is not None:
            ready = self.packed.outputs(x)
        else:
            # One mask for all, as in the packed form, so that a seed gives the same run on either path.
            ready = (adapters[0].drop(x),) * len(adapters)
        self._ready = dict(zip(indices, ready, strict=True))
        self._input = x


def _same(a: Tensor | None, b: Tensor) -> bool:
    """Whether it is one tensor. DeepSpeed gives each module a view of its input: not the object is the same, but the
    memory (which ``a`` holds, so nothing else can be there)."""
    return a is b or (a is not None and a.data_ptr() == b.data_ptr() and (a.shape, a.stride()) == (b.shape, b.stride()))


def watched(adapter: Adapter, x: Tensor) -> None:
    """Show the adapter its input, if its rule wants to see it."""
    if adapter.watches and adapter.training:
        adapter.watch(x)


def weight_of(member: Linear) -> Tensor:
    """W (out, in), whichever way it is stored."""
    if member.narrow is not None:
        return member.narrow.dense()
    weight: Tensor = member.weight
    return weight.t() if member.transposed else weight


def plain(member: Linear, x: Tensor, dropped: Tensor) -> Tensor:
    """y = W x + b + dW drop(x), by the adapter's own ``forward``."""
    weight = weight_of(member)
    if member.narrow is None:
        y = F.linear(x, weight, member.bias)
    else:
        y = NarrowLinear.apply(x, member.narrow)  # type: ignore[no-untyped-call]
        y = y if member.bias is None else y + member.bias
    update: Tensor = member.adapter(dropped, weight)
    return y + update.to(y.dtype)


@contextmanager
def packed(groups: Iterable[Group]) -> Iterator[None]:
    """Compute with packed factors inside; at the end hand the gradients of all that was computed to the parameters.

    The parameters must not change inside, and their own gradients are not complete before the end.
    """
    frozen: dict[Any, Tensor] = {}
    own = [group for group in groups if all(can_be_packed(member) for member in group.members)]
    try:
        for group in own:
            group.packed = Packed(group.members, frozen)
        yield
        edges, gradients = [], []
        for group in own:
            assert group.packed is not None
            for edge, gradient in group.packed.gradients():
                edges.append(edge)
                gradients.append(gradient)
        if edges:
            torch.autograd.backward(edges, gradients)
    finally:
        for group in own:
            group.packed = None


def can_be_packed(member: Linear) -> bool:
    """Whether it is a product of factors, computed in the dtype of W, beside a W that is frozen and whole."""
    adapter, weight = member.adapter, member.weight
    return (
        isinstance(adapter, FactorAdapter)
        and adapter.compute_dtype is None
        and not weight.requires_grad
        and (weight.dim() == 2 or member.narrow is not None)
        and not (member.bias is not None and member.bias.requires_grad)
    )


class Packed:
    """The factors of a group's members, in the dtype of their weights.

    What is trained lies in one flat buffer, so that a group has one gradient to add up. B that is frozen (VeRA's is
    large) is not multiplied out here: its Bd is made in each call, and not kept.

    Args:
        frozen: low-precision copies of frozen factors, which groups share; used and added to.
    """

    def __init__(self, members: Sequence[Linear], frozen: dict[Any, Tensor]) -> None:
        self.members, self.dtype = members, members[0].weight.dtype
        with torch.enable_grad():
            factors = [_factors(member) for member in members]
            # The fp32 factors are not kept: of them only the edges of their graph, where gradients go.
            products = [f.Bd if f.B.requires_grad else None for f in factors]
        self.frozen_B = [None if f.B.requires_grad else _low(f.B, self.dtype, frozen) for f in factors]
        first = factors[0].A
        common = not any(f.A.requires_grad for f in factors) and len({_key(f.A) for f in factors}) == 1
        ranks = [f.d.shape[-1] if common else _aligned(f.d.shape[-1]) for f in factors]
        ends = [ranks[0]] * len(ranks) if common else torch.tensor(ranks).cumsum(0).tolist()
        columns = [slice(end - rank, end) for end, rank in zip(ends, ranks, strict=True)]
        shapes = [] if common else [(ends[-1], first.shape[1])]
        shapes += [(len(f.B), rank) for f, rank in zip(factors, ranks, strict=True) if f.B.requires_grad]
        self.flat = first.new_zeros(sum(math.prod(shape) for shape in shapes), dtype=self.dtype)
        blocks = iter(_blocks(self.flat, shapes))
        A = _low(first, self.dtype, frozen) if common else next(blocks)
        Bds = [next(blocks) if Bd is not None else None for Bd in products]
        weights = [weight_of(member) if member.narrow is None else member.narrow for member in members]
        self.operands = Operands(weights, [m.bias for m in members], A, not common, Bds, columns)
        self._sources: list[tuple[GradientEdge, Callable[[Tensor], Tensor]]] = []
        with torch.no_grad():
            for f, Bd, place, own in zip(factors, products, Bds, columns, strict=True):
                if not common:
                    self._put(A[own.start : own.start + len(f.A)], f.A)
                if Bd is not None and place is not None:
                    self._put(place[:, : Bd.shape[1]], Bd)
        if self._sources and torch.is_grad_enabled():
            self.flat.requires_grad_(True)
            self.flat.grad_dtype = torch.float32  # summed over micro-batches as a parameter's gradient would be

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """y of all members, for x (..., in)."""
        adapter = self.members[0].adapter
        p = adapter.dropout if adapter.training else 0.0
        loose = [self._loose(i) for i, Bd in enumerate(self.operands.Bds) if Bd is None]
        result: tuple[Tensor, ...] = SharedInput.apply(x, p, self.operands, self.flat, *loose)  # type: ignore[no-untyped-call]
        return result

    def gradients(self) -> Iterator[tuple[GradientEdge, Tensor]]:
        """What has come together since the packing, and where in the graph of ``factors()`` it belongs."""
        if self.flat.grad is not None:
            for edge, part in self._sources:
                yield edge, part(self.flat.grad)

    def _put(self, place: Tensor, values: Tensor) -> None:
        place.copy_(values)
        if values.requires_grad:
            size, stride, offset = place.size(), place.stride(), place.storage_offset()
            self._sources.append((get_gradient_edge(values), lambda flat: flat.as_strided(size, stride, offset)))

    def _loose(self, index: int) -> Tensor:
        """Bd of a member whose B is frozen, differentiable in d and b."""
        B, f = self.frozen_B[index], _factors(self.members[index])
        assert B is not None
        return Factors(B, f.d.to(B.dtype), f.A, None if f.b is None else f.b.to(B.dtype)).Bd


class Operands(NamedTuple):
    """What ``SharedInput`` multiplies with: constants, or views of the flat buffer, where A comes before the Bd."""

    weights: list[Tensor | Narrow]
    biases: list[Tensor | None]
    A: Tensor
    trains_A: bool
    Bds: list[Tensor | None]
    """None: given to the function itself."""
    columns: list[slice]
    """Of z, for each member: disjoint, or the same for all."""


def _blocks(flat: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The matrices of these shapes that lie in ``flat`` one after the other."""
    parts = torch.split(flat, [math.prod(shape) for shape in shapes])  # type: ignore[no-untyped-call]
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _factors(member: Linear) -> Factors:
    assert isinstance(member.adapter, FactorAdapter)
    return member.adapter.factors()


def _aligned(r: int) -> int:
    return -(-r // ALIGNMENT) * ALIGNMENT


def _key(t: Tensor) -> tuple[Any, ...]:
    return t.data_ptr(), t.shape, t.stride()


def _low(t: Tensor, dtype: torch.dtype, copies: dict[Any, Tensor]) -> Tensor:
    """A frozen tensor in ``dtype``, once for all who ask with the same ``copies``."""
    key = (*_key(t), dtype)
    if key not in copies:
        copies[key] = t.detach().to(dtype).contiguous()
    return copies[key]


class SharedInput(torch.autograd.Function):
    """y_i = x W_i^T + bias_i + drop(x) A[columns_i]^T Bd_i^T for all i, differentiable in x and what is trained.

    x (..., in), W_i (out_i, in), A (R, in), Bd_i (out_i, columns_i), all of one dtype.

    Args:
        flat: the buffer that trained operands are views of; the gradient is laid out like it.
        loose: Bd of those members that have None in ``operands``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, operands: Operands, flat: Tensor, *loose: Tensor) -> tuple[Tensor, ...]:
        weights, biases, A, _, Bds, columns = operands
        rows, mask, factor = x.reshape(-1, x.shape[-1]), None, 1.0
        dropped = rows
        if p:
            dropped, mask, factor = dropout(rows, p)
        z = dropped @ A.t()
        results, more = [], iter(loose)
        for W, bias, Bd, own in zip(weights, biases, Bds, columns, strict=True):
            if isinstance(W, Narrow):
                y = W.product(rows)
                y = y if bias is None else y.add_(bias)
            else:
                y = F.linear(rows, W, bias)
            y.addmm_(z[:, own], (next(more) if Bd is None else Bd).t())
            results.append(y.view(*x.shape[:-1], len(W)))
        ctx.save_for_backward(dropped, mask, z, *loose)
        ctx.factor, ctx.operands, ctx.flat, ctx.lead = factor, operands, flat, x.shape[:-1]
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        dropped, mask, z, *loose = ctx.saved_tensors
        weights, _, A, trains_A, Bds, columns = ctx.operands
        needs_x, _, _, needs_flat, *_ = ctx.needs_input_grad
        shapes = [tuple(A.shape)] if trains_A else []
        shapes += [tuple(Bd.shape) for Bd in Bds if Bd is not None]
        # A member whose output is not used has no gradient: then what is not written must be zero.
        new = torch.empty_like if all(dy is not None for dy in dys) else torch.zeros_like
        d_flat, g = new(ctx.flat), new(z)
        places = iter(_blocks(d_flat, shapes))
        dA = next(places) if trains_A else None
        dx, d_loose, more, started = None, [], iter(loose), set()
        for dy, W, Bd, own in zip(dys, weights, Bds, columns, strict=True):
            place = None if Bd is None else next(places)
            Bd = next(more) if Bd is None else Bd
            if dy is None:
                d_loose += [None] if place is None else []
                continue
            dy = dy.reshape(-1, len(W))
            if own.start in started:  # columns that all share
                g[:, own].addmm_(dy, Bd)
            else:
                torch.mm(dy, Bd, out=g[:, own])
            started.add(own.start)
            if place is None:
                d_loose.append(dy.t() @ z[:, own])
            elif needs_flat:
                torch.mm(dy.t(), z[:, own], out=place)
            if not needs_x:
                continue
            if isinstance(W, Narrow):
                dx = W.gradient(dy) if dx is None else dx.add_(W.gradient(dy))
            else:
                dx = dy @ W if dx is None else dx.addmm_(dy, W)
        if dx is not None:
            dx = dx.addmm_(g, A) if mask is None else dx.addcmul_(g @ A, mask, value=ctx.factor)
            dx = dx.view(*ctx.lead, -1)
        if dA is not None and needs_flat:
            torch.mm(g.t(), dropped, out=dA)
        return (dx, None, None, d_flat if needs_flat else None, *d_loose)
