"""The fast path: linears that share an input are one operation, and their factors are packed once a step.

A layer calls q_proj, k_proj and v_proj with one x (gate_proj and up_proj with another). Such linears are a ``Group``:

    z = drop(x) A^T                 A (R, in): the factors A_i of all members, one below the other
    y_i = x W_i^T + z_i Bd_i^T      Bd_i = diag(b_i) B_i diag(d_i), added into the base's output; z_i: columns of z

and backwards, with g_i = dy_i Bd_i:

    dx = sum_i dy_i W_i + drop^T(g A),    dA = g^T drop(x),    dBd_i^T = z_i^T dy_i

So x and each dy_i are read no more often than the arithmetic needs, z (tokens x R) is all that is kept beside x, and
nothing is cast, concatenated or scaled per token. On a GPU that holds with dropout too (``seeded``); elsewhere drop(x)
is kept instead of x, and its mask. Bd_i is held transposed: a CPU makes z_i^T dy_i, of few rows, up to twelve times as
fast as dy_i^T z_i, of few columns.

Inside ``packed`` A and Bd_i are buffers in the dtype of W, made of the methods' fp32 ``factors()`` once; their
gradients (fp32, summed over micro-batches) go back through ``factors()`` once. Outside of it the adapter's own
``forward`` is called: the reference, which gives the same numbers and works wherever parameters have hooks or are
partitioned. Block-diagonal updates have a fast path of the same kind, in ``blocks``; an adapter that is neither is
computed by its own ``forward`` always.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..precision import Narrow, NarrowLinear, add_gradient, full_sums, products
from . import seeded
from .base import ALIGNMENT, Adapter, FactorAdapter, Factors
from .blocks import BlockAdapter, pack_blocks
from .dropout import dropout
from .flat import Flat, Packed, blocks


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
            ready = self.packed.outputs(x, adapters[0].dropout if adapters[0].training else 0.0)
        else:
            # One mask for all, as in the packed form: where that does not make its own (``seeded``), it is the same.
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
    own = []
    try:
        for group in groups:
            group.packed = _pack(group.members, frozen)
            if group.packed is not None:
                own.append(group)
        yield
        edges, gradients = [], []
        for group in own:
            assert group.packed is not None
            for edge, gradient in group.packed.flat.gradients():
                edges.append(edge)
                gradients.append(gradient)
        if edges:
            torch.autograd.backward(edges, gradients)
    finally:
        for group in own:
            group.packed = None


def _pack(members: Sequence[Linear], frozen: dict[Any, Tensor]) -> Packed | None:
    """None unless all are of one form, computed in the dtype of W, beside a W that is frozen and whole."""
    if not all(_stands_still(member) for member in members):
        return None
    adapters = [member.adapter for member in members]
    weights = [member.narrow if member.narrow is not None else weight_of(member) for member in members]
    biases, dtype = [member.bias for member in members], members[0].weight.dtype
    with torch.enable_grad():
        factors = [adapter.factors() for adapter in adapters if isinstance(adapter, FactorAdapter)]
        of_blocks = [adapter.blocks() for adapter in adapters if isinstance(adapter, BlockAdapter)]
        if len(factors) == len(members):
            return pack_factors(factors, weights, biases, dtype, frozen)
    return pack_blocks(of_blocks, weights, biases, dtype) if len(of_blocks) == len(members) else None


def _stands_still(member: Linear) -> bool:
    weight, bias = member.weight, member.bias
    return (
        member.adapter.compute_dtype is None
        and not weight.requires_grad
        and (weight.dim() == 2 or member.narrow is not None)
        and not (bias is not None and bias.requires_grad)
    )


def pack_factors(
    factors: Sequence[Factors],
    weights: list[Tensor | Narrow],
    biases: list[Tensor | None],
    dtype: torch.dtype,
    frozen: dict[Any, Tensor],
) -> Packed:
    """Pack the factors of a group's members (fp32) in the dtype of their weights. Called with gradients enabled.

    B that is frozen (VeRA's is large) is not multiplied out here: its Bd is made in each call, and not kept.

    Args:
        frozen: low-precision copies of frozen factors, which groups share; used and added to.
    """
    # The fp32 factors are not kept: of them only the edges of their graph, where gradients go.
    products = [f.Bd.mT if f.B.requires_grad else None for f in factors]
    first = factors[0].A
    common = not any(f.A.requires_grad for f in factors) and len({_key(f.A) for f in factors}) == 1
    ranks = [f.d.shape[-1] if common else _aligned(f.d.shape[-1]) for f in factors]
    ends = [ranks[0]] * len(ranks) if common else torch.tensor(ranks).cumsum(0).tolist()
    columns = [slice(end - rank, end) for end, rank in zip(ends, ranks, strict=True)]
    shapes: list[tuple[int, ...]] = [] if common else [(ends[-1], first.shape[1])]
    for f, rank in zip(factors, ranks, strict=True):
        diagonals = [(rank,)] if f.b is None else [(rank,), (len(f.B),)]
        shapes += [(rank, len(f.B))] if f.B.requires_grad else diagonals
    flat = Flat(shapes, dtype, first)
    views = iter(flat.views)
    A = _low(first, dtype, frozen) if common else next(views)
    Bts: list[Tensor | Factors] = []
    for f, Bt, own in zip(factors, products, columns, strict=True):
        if not common:
            flat.put(A[own.start : own.start + len(f.A)], f.A)
        if Bt is not None:
            place = next(views)
            flat.put(place[: len(Bt)], Bt)
            Bts.append(place)
            continue
        B = _padded(_low(f.B, dtype, frozen), own.stop - own.start)
        d, b = next(views), None if f.b is None else next(views)
        flat.put(d[: len(f.d)], f.d)
        if b is not None and f.b is not None:
            flat.put(b, f.b)
        Bts.append(Factors(B, d, A, b))
    flat.train()
    operands = Operands(weights, biases, A, not common, Bts, columns)
    return Packed(SharedInput, operands, flat, dtype)


class Operands(NamedTuple):
    """What ``SharedInput`` multiplies with: constants, or views of the flat buffer, where A comes before the others."""

    weights: list[Tensor | Narrow]
    biases: list[Tensor | None]
    A: Tensor
    trains_A: bool
    Bts: list[Tensor | Factors]
    """Bd^T of each member; factors where B is frozen: what is trained, and in the buffer, is d and b."""
    columns: list[slice]
    """Of z, for each member: disjoint, or the same for all."""

    def shapes(self) -> list[tuple[int, ...]]:
        """Of what is trained, in the order of the buffer."""
        trained = [self.A] if self.trains_A else []
        for Bt in self.Bts:
            trained += [Bt] if isinstance(Bt, Tensor) else [Bt.d] if Bt.b is None else [Bt.d, Bt.b]
        return [tuple(t.shape) for t in trained]


def _aligned(r: int) -> int:
    return -(-r // ALIGNMENT) * ALIGNMENT


def _padded(B: Tensor, rank: int) -> Tensor:
    """B (out, R) with zeros up to ``rank`` columns."""
    return B if B.shape[1] == rank else F.pad(B, (0, rank - B.shape[1]))


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
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, operands: Operands, flat: Tensor) -> tuple[Tensor, ...]:
        weights, biases, A, _, Bts, columns = operands
        rows = x.reshape(-1, x.shape[-1])
        draw = seeded.draw(rows, p, len(A))
        if draw is None:
            dropped, mask, factor = dropout(rows, p)
            z = dropped @ A.t()
        else:
            dropped, mask, factor = rows, None, 1.0  # the draw says it
            z = torch.ops.rasa_train.project(rows, A, *draw)
        results = []
        for y, Bt, own in zip(products(rows, weights, biases), Bts, columns, strict=True):
            y.addmm_(z[:, own], Bt if isinstance(Bt, Tensor) else Bt.Bd.t())
            results.append(y.view(*x.shape[:-1], y.shape[1]))
        ctx.save_for_backward(dropped, mask, z)
        ctx.draw, ctx.factor, ctx.operands, ctx.flat, ctx.lead = draw, factor, operands, flat, x.shape[:-1]
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    @full_sums()
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        dropped, mask, z = ctx.saved_tensors
        weights, _, A, trains_A, Bts, columns = ctx.operands
        needs_x, _, _, needs_flat = ctx.needs_input_grad
        # A member whose output is not used has no gradient: then what is not written must be zero.
        new = torch.empty_like if all(dy is not None for dy in dys) else torch.zeros_like
        d_flat, g = new(ctx.flat), new(z)
        places = iter(blocks(d_flat, ctx.operands.shapes()))
        dA = next(places) if trains_A else None
        dx, started = None, set()
        for dy, W, Bt, own in zip(dys, weights, Bts, columns, strict=True):
            own_places = [next(places) for _ in range(1 if isinstance(Bt, Tensor) or Bt.b is None else 2)]
            if dy is None:
                continue
            dy = dy.reshape(-1, len(W))
            dense = Bt.t() if isinstance(Bt, Tensor) else Bt.Bd
            if own.start in started:  # columns that all share
                g[:, own].addmm_(dy, dense)
            else:
                torch.mm(dy, dense, out=g[:, own])
            started.add(own.start)
            if needs_flat and isinstance(Bt, Tensor):
                torch.mm(z[:, own].t(), dy, out=own_places[0])
            elif needs_flat:
                _diagonal_gradients(dy.t() @ z[:, own], Bt, own_places)
            if needs_x:
                dx = add_gradient(dx, dy, W)
        if dx is not None:
            if ctx.draw is not None:
                torch.ops.rasa_train.add_back(dx, g, A, *ctx.draw)
            elif mask is not None:
                dx.addcmul_(g @ A, mask, value=ctx.factor)
            else:
                dx.addmm_(g, A)
            dx = dx.view(*ctx.lead, -1)
        if dA is not None and needs_flat:
            if ctx.draw is not None:
                torch.ops.rasa_train.sum_parts(torch.ops.rasa_train.gradient(g, dropped, *ctx.draw), dA)
            else:
                torch.mm(g.t(), dropped, out=dA)
        return (dx, None, None, d_flat if needs_flat else None)


def _diagonal_gradients(dBd: Tensor, factors: Factors, places: list[Tensor]) -> None:
    """Those of d, and of b if there is one, into ``places``, for the gradient of diag(b) B diag(d). Uses ``dBd`` up."""
    terms = dBd.mul_(factors.B)
    if factors.b is None:
        torch.sum(terms, 0, out=places[0])
        return
    torch.mv(terms.t(), factors.b, out=places[0])
    torch.mv(terms, factors.d, out=places[1])
