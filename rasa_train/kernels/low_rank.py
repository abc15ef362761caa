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

from . import seeded_dropout
from .dropout import kept_scale, masked, masked_without_values
from .flat_buffer import Buffers, Flat, blocks
from .operators import Operands, define
from .quantized_weight import Narrow, add_gradient, products


def pack_factors(
    factors: Sequence[Factors],
    weights: Sequence[list[Tensor | Narrow]],
    biases: Sequence[list[Tensor | None]],
    into: Buffers,
    frozen: dict[Any, Tensor],
) -> Flat:
    """Pack the factors of groups of one form in the dtype of ``into``. Must be called with gradients enabled; the
    caller must then call ``train`` or ``join`` of the buffer.

    A frozen B (VeRA's is large) is not multiplied out here: its Bd is computed in each call and not kept.

    Args:
        factors: for each member of a group its factors, fp32, with a leading dimension of groups.
        weights, biases: for each group those of its members.
        into: where the buffer is taken from.
        frozen: low-precision copies of frozen factors, which groups share; copies are taken from it and added to it.
    """
    # The fp32 factors are not kept, only the edges of their graph, to which gradients go.
    products = [f.Bd.mT if f.B.requires_grad else None for f in factors]
    first, rows = factors[0].A, len(weights)
    common = not any(f.A.requires_grad for f in factors) and len({_key(f.A) for f in factors}) == 1 and _shared(first)
    ranks = [f.d.shape[-1] if common else _aligned(f.d.shape[-1]) for f in factors]
    A = _low(first[0], into.dtype, frozen) if common else None
    Bs = [
        [None] * rows if f.B.requires_grad else [_padded(B, rank) for B in _rows_of(f.B, into.dtype, frozen)]
        for f, rank in zip(factors, ranks, strict=True)
    ]
    with_b = [f.b is not None for f in factors]
    layouts = [Layout(A, list(own), ranks, with_b) for own in zip(*Bs, strict=True)]
    shapes = layouts[0].shapes([f.B.shape[-2] for f in factors], first.shape[-1])
    flat = into.take(rows, shapes, first)
    views = iter(flat.views)
    whole = None if common else next(views)
    for f, Bt, own in zip(factors, products, layouts[0].columns(), strict=True):
        if whole is not None:
            flat.put(whole[:, own.start : own.start + f.A.shape[-2]], f.A)
        if Bt is not None:
            flat.put(next(views)[:, : Bt.shape[-2]], Bt)
            continue
        flat.put(next(views)[:, : f.d.shape[-1]], f.d)
        if f.b is not None:
            flat.put(next(views), f.b)
    R = ranks[0] if common else sum(ranks)
    seeded = seeded_dropout.usable(first.device, into.dtype, R if R <= seeded_dropout.MOST_RANKS else 0)
    return flat.packed(LowRank, weights, biases, seeded, layouts)


class Layout(NamedTuple):
    """The meaning of a row of the flat buffer: the trained operands of a group, A first, then those of each member."""

    A: Tensor | None
    """A (R, in) of all members if it is frozen; None if it is in the buffer."""
    Bs: list[Tensor | None]
    """B (out, rank) of each member if it is frozen: d, and b if there is one, are then in the buffer. None if Bd^T
    (rank, out) is."""
    ranks: list[int]
    with_b: list[bool]

    def shapes(self, outs: Sequence[int], in_: int) -> list[tuple[int, ...]]:
        """Return the shapes of the operands in the buffer, for members with ``outs`` outputs and ``in_`` inputs."""
        shapes: list[tuple[int, ...]] = [] if self.A is not None else [(sum(self.ranks), in_)]
        for B, rank, with_b, out in zip(self.Bs, self.ranks, self.with_b, outs, strict=True):
            shapes += [(rank, out)] if B is None else [(rank,), (out,)] if with_b else [(rank,)]
        return shapes

    def columns(self) -> list[slice]:
        """Return the columns of z of each member: disjoint, or the same for all members if A is frozen."""
        ends = [self.ranks[0]] * len(self.ranks) if self.A is not None else list(accumulate(self.ranks))
        return [slice(end - rank, end) for end, rank in zip(ends, self.ranks, strict=True)]


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


@define
class LowRank(Operands):
    """The operands of y_i = x W_i^T + bias_i + drop(x) A[columns_i]^T Bd_i^T, where A is (R, in) and Bd_i is
    (out_i, columns_i)."""

    name, schema = "low_rank", "Tensor? A, Tensor?[] Bs, int[] ranks, bool[] with_b"
    layout: Layout

    def read(self, flat: Tensor) -> None:
        self.layout = layout = Layout(*self.layout)
        self.shapes = layout.shapes([len(W) for W in self.weights], self.weights[0].shape[1])
        parts = iter(blocks(flat, self.shapes))
        self.A = layout.A if layout.A is not None else next(parts)
        self.Bts: list[Tensor | Factors] = []
        """Bd^T of each member. Where B is frozen, its factors instead."""
        for B, with_b in zip(layout.Bs, layout.with_b, strict=True):
            self.Bts.append(
                next(parts) if B is None else Factors(B, next(parts), self.A, next(parts) if with_b else None)
            )
        self.columns = layout.columns()
        self.multiplies = len(self.A) <= seeded_dropout.MOST_RANKS
        """Whether the kernels of ``seeded_dropout`` multiply so many ranks; if not, x is dropped before a product."""

    def compute(self, x: Tensor, p: float) -> tuple[list[Tensor], list[Tensor]]:
        mask, ops = list[Tensor](), torch.ops.rasa_train
        if not p:
            z = x @ self.A.t()
        elif self.seeded:
            draw = seeded_dropout.draw(x.device, p)
            z = ops.project(x, self.A, *draw) if self.multiplies else ops.drop(x, *draw) @ self.A.t()
            mask = [torch.tensor(draw)]
        else:
            mask = list(masked(x, p))
            z = mask[0] @ self.A.t()
        results = []
        for y, Bt, own in zip(products(x, self.weights, self.biases), self.Bts, self.columns, strict=True):
            results.append(y.addmm_(z[:, own], Bt if isinstance(Bt, Tensor) else Bt.Bd.t()))
        return results, [z, *mask]

    def without_values(self, x: Tensor, p: float) -> tuple[list[Tensor], list[Tensor]]:
        results = [x.new_empty(x.shape[0], len(W)) for W in self.weights]
        return results, [x.new_empty(x.shape[0], len(self.A)), *masked_without_values(x, p, self.seeded)]

    def gradients(
        self, dys: Sequence[Tensor | None], x: Tensor | None, kept: Sequence[Tensor], p: float, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        z, *mask = kept
        needs_x, needs_flat = needs
        # A member whose output is not used has no gradient: the parts that are not written must then be zero.
        new = torch.empty_like if all(dy is not None for dy in dys) else torch.zeros_like
        d_flat, g = new(self.flat, requires_grad=False), new(z)
        places = iter(blocks(d_flat, self.shapes))
        dA = next(places) if self.layout.A is None else None
        dx, started = None, set()
        for dy, W, Bt, own in zip(dys, self.weights, self.Bts, self.columns, strict=True):
            own_places = [next(places) for _ in range(1 if isinstance(Bt, Tensor) or Bt.b is None else 2)]
            if dy is None:
                continue
            dense = Bt.t() if isinstance(Bt, Tensor) else Bt.Bd
            if own.start in started:  # all members share these columns
                g[:, own].addmm_(dy, dense)
            else:
                torch.mm(dy, dense, out=g[:, own])
            started.add(own.start)
            if needs_flat:
                if isinstance(Bt, Tensor):
                    torch.mm(z[:, own].t(), dy, out=own_places[0])
                else:
                    _diagonal_gradients(dy.t() @ z[:, own], Bt, own_places)
            if needs_x:
                dx = add_gradient(dx, dy, W)
        draw = mask[0].tolist() if p and self.seeded else None
        if dx is not None:
            self._add_update(dx, g, mask, draw, p)
        if dA is not None and needs_flat:
            self._factor_gradient(g, x if x is not None else mask[0], draw, dA)
        return dx, d_flat if needs_flat else None

    def _add_update(self, dx: Tensor, g: Tensor, mask: list[Tensor], draw: list[int] | None, p: float) -> None:
        """Add drop^T(g A) to dx."""
        if draw is not None and self.multiplies:
            torch.ops.rasa_train.add_back(dx, g, self.A, *draw)
        elif draw is not None:
            dx.add_(torch.ops.rasa_train.drop(g @ self.A, *draw))
        elif p:
            dx.addcmul_(g @ self.A, mask[1], value=kept_scale(dx, p))
        else:
            dx.addmm_(g, self.A)

    def _factor_gradient(self, g: Tensor, x: Tensor, draw: list[int] | None, dA: Tensor) -> None:
        """Write g^T drop(x) to dA. Without ``draw``, x has been dropped already."""
        ops = torch.ops.rasa_train
        if draw is not None and self.multiplies:
            ops.sum_parts(ops.gradient(g, x, *draw), dA)
        else:
            torch.mm(g.t(), x if draw is None else ops.drop(x, *draw), out=dA)


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
