"""Linears that share an input, with low-rank updates, as one operation on packed factors.

A layer calls q_proj, k_proj and v_proj with one x (gate_proj and up_proj with another). For such a group

    z = drop(x) A^T                 A (R, in): the factors A_i of all members, one below the other
    y_i = x W_i^T + z_i Bd_i^T      Bd_i = diag(b_i) B_i diag(d_i), added into the base's output; z_i: columns of z

and in the backward pass, with g_i = dy_i Bd_i:

    dx = sum_i dy_i W_i + drop^T(g A),    dA = g^T drop(x),    dBd_i^T = z_i^T dy_i

So x and each dy_i are read no more often than the arithmetic needs, only z (tokens x R) is kept beside x, and nothing
is cast, concatenated or scaled per token. On a GPU this holds with dropout too (``seeded_dropout``); elsewhere drop(x)
and its mask are kept instead of x. Bd_i is held transposed: a CPU computes z_i^T dy_i, which has few rows, up to twelve
times as fast as dy_i^T z_i, which has few columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import seeded_dropout
from .dropout import dropout
from .flat_buffer import Flat, Packed, blocks
from .quantized_weight import Narrow, add_gradient, full_sums, products


def pack_factors(
    factors: Sequence[Factors],
    weights: Sequence[list[Tensor | Narrow]],
    biases: Sequence[list[Tensor | None]],
    dtype: torch.dtype,
    frozen: dict[Any, Tensor],
) -> list[Packed]:
    """Pack the factors of groups of one form in the dtype of their weights. Must be called with gradients enabled; the
    caller must then call ``train`` or ``join`` of their buffer.

    A frozen B (VeRA's is large) is not multiplied out here: its Bd is computed in each call and not kept.

    Args:
        factors: for each member of a group its factors, fp32, with a leading dimension of groups.
        weights, biases: for each group those of its members.
        frozen: low-precision copies of frozen factors, which groups share; copies are taken from it and added to it.
    """
    # The fp32 factors are not kept, only the edges of their graph, to which gradients go.
    products = [f.Bd.mT if f.B.requires_grad else None for f in factors]
    first, rows = factors[0].A, len(weights)
    common = not any(f.A.requires_grad for f in factors) and len({_key(f.A) for f in factors}) == 1 and _shared(first)
    ranks = [f.d.shape[-1] if common else _aligned(f.d.shape[-1]) for f in factors]
    ends = [ranks[0]] * len(ranks) if common else list(accumulate(ranks))
    columns = [slice(end - rank, end) for end, rank in zip(ends, ranks, strict=True)]
    shapes: list[tuple[int, ...]] = [] if common else [(ends[-1], first.shape[-1])]
    for f, rank in zip(factors, ranks, strict=True):
        out = f.B.shape[-2]
        shapes += [(rank, out)] if f.B.requires_grad else [(rank,)] if f.b is None else [(rank,), (out,)]
    flat = Flat(rows, shapes, dtype, first)
    views = iter(flat.views)
    A = first if common else next(views)
    As = [_low(first[0], dtype, frozen)] * rows if common else list(A.unbind())
    members: list[Sequence[Tensor | Factors]] = []
    for f, Bt, own in zip(factors, products, columns, strict=True):
        if not common:
            flat.put(A[:, own.start : own.start + f.A.shape[-2]], f.A)
        if Bt is not None:
            place = next(views)
            flat.put(place[:, : Bt.shape[-2]], Bt)
            members.append(place.unbind())
            continue
        d, b = next(views), None if f.b is None else next(views)
        flat.put(d[:, : f.d.shape[-1]], f.d)
        if b is not None and f.b is not None:
            flat.put(b, f.b)
        Bs = [_padded(B, own.stop - own.start) for B in _rows_of(f.B, dtype, frozen)]
        bs = [None] * rows if b is None else b.unbind()
        members.append([Factors(*of) for of in zip(Bs, d.unbind(), As, bs, strict=True)])
    of_groups = zip(weights, biases, As, zip(*members, strict=True), strict=True)
    operands = [Operands(W, bias, A, not common, list(Bts), columns) for W, bias, A, Bts in of_groups]
    return [Packed(SharedInput, own, flat, row, dtype) for row, own in enumerate(operands)]


class Operands(NamedTuple):
    """The operands of ``SharedInput``: constants, or views of the flat buffer, in which A comes first."""

    weights: list[Tensor | Narrow]
    biases: list[Tensor | None]
    A: Tensor
    trains_A: bool
    Bts: list[Tensor | Factors]
    """Bd^T of each member. Where B is frozen, its factors instead: only d and b are trained and in the buffer."""
    columns: list[slice]
    """Columns of z of each member: disjoint, or the same for all members."""

    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of the trained operands, in the order of the buffer."""
        trained = [self.A] if self.trains_A else []
        for Bt in self.Bts:
            trained += [Bt] if isinstance(Bt, Tensor) else [Bt.d] if Bt.b is None else [Bt.d, Bt.b]
        return [tuple(t.shape) for t in trained]


def _aligned(r: int) -> int:
    return -(-r // ALIGNMENT) * ALIGNMENT


def _padded(B: Tensor, rank: int) -> Tensor:
    """Return B (out, R), padded with zeros to ``rank`` columns."""
    return B if B.shape[1] == rank else F.pad(B, (0, rank - B.shape[1]))


def _key(t: Tensor) -> tuple[Any, ...]:
    return t.data_ptr(), t.shape, t.stride()


def _shared(t: Tensor) -> bool:
    """Whether all groups have the same tensor, given (groups, ...)."""
    return len(t) == 1 or t.stride(0) == 0


def _rows_of(t: Tensor, dtype: torch.dtype, copies: dict[Any, Tensor]) -> list[Tensor]:
    """Return a frozen tensor (groups, ...) in ``dtype``, for each group its own."""
    return [_low(t[0], dtype, copies)] * len(t) if _shared(t) else list(t.detach().to(dtype).unbind())


def _low(t: Tensor, dtype: torch.dtype, copies: dict[Any, Tensor]) -> Tensor:
    """Return a frozen tensor in ``dtype``; all callers with the same ``copies`` share one copy."""
    key = (*_key(t), dtype)
    if key not in copies:
        copies[key] = t.detach().to(dtype).contiguous()
    return copies[key]


class SharedInput(torch.autograd.Function):
    """y_i = x W_i^T + bias_i + drop(x) A[columns_i]^T Bd_i^T for all i, differentiable in x and the trained operands.

    x (..., in), W_i (out_i, in), A (R, in), Bd_i (out_i, columns_i), y_i (tokens, out_i), all of one dtype.

    Args:
        flat: the buffer that the trained operands are views of; the gradient has the same layout.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, operands: Operands, flat: Tensor) -> tuple[Tensor, ...]:
        weights, biases, A, _, Bts, columns = operands
        rows = x.reshape(-1, x.shape[-1])
        draw = seeded_dropout.draw(rows, p, len(A))
        if draw is None:
            dropped, mask, factor = dropout(rows, p)
            z = dropped @ A.t()
        else:
            dropped, mask, factor = rows, None, 1.0  # the draw defines the mask and the factor
            z = torch.ops.rasa_train.project(rows, A, *draw)
        results = []
        for y, Bt, own in zip(products(rows, weights, biases), Bts, columns, strict=True):
            y.addmm_(z[:, own], Bt if isinstance(Bt, Tensor) else Bt.Bd.t())
            results.append(y)
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
        # A member whose output is not used has no gradient: the parts that are not written must then be zero.
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
            if own.start in started:  # all members share these columns
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
    """Write the gradients of d, and of b if there is one, to ``places``, given the gradient of diag(b) B diag(d).
    Overwrites ``dBd``."""
    terms = dBd.mul_(factors.B)
    if factors.b is None:
        torch.sum(terms, 0, out=places[0])
        return
    torch.mv(terms.t(), factors.b, out=places[0])
    torch.mv(terms, factors.d, out=places[1])


ALIGNMENT = 8
"""Ranks are padded with zeros to a multiple of this where it helps: rows are then a multiple of 16 bytes in a 16-bit
dtype, which matrix units need."""


class Factors(NamedTuple):
    """The factors of dW = diag(b) B diag(d) A: B (..., out, R), d (..., R), A (..., R, in), b (..., out), where ``...``
    is the site's ``lead``. Without b, every entry of b counts as 1."""

    B: Tensor
    d: Tensor
    A: Tensor
    b: Tensor | None = None

    @property
    def Bd(self) -> Tensor:
        """The product diag(b) B diag(d) (..., out, R). Scaling B is out x R work; scaling z = A x instead would be
        tokens x R work and round once more."""
        Bd = self.B * self.d.unsqueeze(-2)
        return Bd if self.b is None else Bd * self.b.unsqueeze(-1)
