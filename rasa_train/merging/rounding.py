"""Round a weight so that its output changes little: error feedback along the directions that matter.

The error E = Q - W of rounding a linear changes its output by E x. For inputs with the second moments H the mean square
of that change is tr(E H E^T), which rounding to nearest does not minimise. Here the columns are rounded one after the
other, and each takes over what the columns before it can no longer mend (optimal brain surgeon, Hassibi and Stork 1993;
GPTQ, Frantar et al. 2023, on the grid of a float format):

    H = L L^T + lam I               L (in, m): the directions that matter
    g_j = (lam I + sum_{k >= j} l_k l_k^T)^-1 l_j
    q_j = round(w_j - r g_j)        the columns w_j of W, each rounded once
    r += (q_j - w_j) l_j^T          r (out, m): the error so far, along the directions

This equals GPTQ with the whole H, but takes 2 m multiplications for each value, and no matrix is larger than (in, m) or
(m, m). Each row of W is rounded by itself, so a row for which nearest is better keeps nearest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.low_rank import Factors

COLUMNS = 32
"""Columns after which the error along the directions is updated."""
ROWS = 64
"""Rows whose error when rounded to nearest is computed at a time."""
VALUES = 1 << 24
"""Values of a weight that are rounded at a time."""
NARROW = (torch.bfloat16, torch.float16)
"""Dtypes of an output for which rounding counts."""
OWN = 0.03
"""lam where the directions are those of the update itself. A larger one gains less for a trained update, and loses less
for a random one, whose directions are not those of the inputs."""
COHERENT = 2.0
"""How many times as large as in an average direction the squared error of nearest is along the directions of the update
where it pays to mend it: there the update itself is rounded away. Elsewhere the error is that of any weight."""
ZERO = 1e-5
"""Singular value, as a share of the largest one, below which a direction is none of the update's."""

SMALLEST = 1e-4
"""Smallest lam, as a share of the mean second moment of the inputs."""

WHOLE = 2
"""Width of a linear, in multiples of the number of directions, up to which all eigenvectors are computed."""


class Feedback:
    """Rounds the rows of weights with error feedback.

    Args:
        L: directions, (in, m), any floating dtype.
        lam: weight of the squared error in every other direction, larger than 0.
        least: how many times as large as in an average direction the error of nearest must be along ``L``; weights for
            which it is smaller are rounded to nearest. For orthonormal directions only.
    """

    def __init__(self, L: Tensor, lam: float, least: float = 0.0) -> None:
        G = _gains(L.double(), lam)
        self.lam, self.least, self.directions = lam, least, L.shape[1]
        self.L, self.G = L.float().contiguous(), G.float()
        # What the error of one column does to the later columns of the same block, (columns, columns) a block
        blocks = zip(torch.split(L.double(), COLUMNS), torch.split(G, COLUMNS), strict=True)
        self.within = [(gains @ before.mT).float() for before, gains in blocks]

    @property
    def rows(self) -> int:
        """Number of rows that are best rounded at a time."""
        return max(VALUES // max(len(self.L), self.directions, 1), 1)

    @torch.no_grad()
    def round(self, W: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
        """Return ``W`` (rows, in), fp32, in ``dtype``, and whether any row differs from the one rounded to nearest. No
        row has a larger error e H e^T than rounded to nearest."""
        errors_of = ((some.to(dtype) - some) for some in torch.split(W, ROWS))  # which fit into the cache
        near, near2 = map(torch.cat, zip(*((E @ self.L, E.square().sum(1)) for E in errors_of), strict=True))
        if float(near.square().sum()) <= self.least * self.directions / len(self.L) * float(near2.sum()):
            return W.to(dtype), False
        columns = W.mT.contiguous()
        result = torch.empty(columns.shape, dtype=dtype)
        r, error2 = W.new_zeros(self.directions, len(W)), W.new_zeros(len(W))
        for number, within in enumerate(self.within):
            some = slice(number * COLUMNS, number * COLUMNS + len(within))
            w, q = columns[some], result[some]
            wanted = torch.addmm(w, self.G[some], r, alpha=-1)
            errors = torch.empty_like(w)
            for j in range(len(w)):
                value = torch.addmv(wanted[j], errors[:j].mT, within[j, :j], alpha=-1) if j else wanted[j]
                errors[j].copy_(q[j].copy_(value)).sub_(w[j])
            r.addmm_(self.L[some].mT, errors)
            error2 += errors.square_().sum(0)
        better = r.square().sum(0) + self.lam * error2 < near.square().sum(1) + self.lam * near2
        rounded = result.mT.contiguous()
        if not better.all():
            rounded[~better] = W[~better].to(dtype)
        return rounded, bool(better.any())


def own_directions(factors: Factors) -> Feedback | None:
    """Return the rounding of W + dW that keeps what dW does to its inputs: the directions are an orthonormal basis of
    the rows of dW, (in, rank). None if dW is zero or not finite."""
    A, Bd = factors.A.double(), factors.Bd.double()
    if not all(bool(t.isfinite().all()) for t in (A, Bd)):
        return None
    Q, R = torch.linalg.qr(A.mT)
    _, s, Vt = torch.linalg.svd(torch.linalg.qr(Bd)[1] @ R.mT, full_matrices=False)
    kept = s > ZERO * s.amax()
    return Feedback(Q @ Vt[kept].mT, OWN, COHERENT) if kept.any() else None


def principal_directions(H: Tensor, most: int) -> Feedback | None:
    """Return the rounding for inputs with the second moments ``H`` (in, in), fp64: the directions are their ``most``
    largest principal ones, times the root of their second moment, and lam is the mean of all other ones. None if all
    inputs are zero, or if some are not finite."""
    mean = float(H.diagonal().mean())
    if not (mean > 0 and math.isfinite(mean)):
        return None
    H = H / mean
    most = min(most, len(H))
    values, vectors = _largest(H, most) if len(H) > WHOLE * most else torch.linalg.eigh(H)
    values, vectors = values[-most:], vectors[:, -most:]
    rest = float(H.diagonal().sum() - values.sum()) / max(len(H) - most, 1)
    lam = max(rest, SMALLEST)
    return Feedback(vectors * (values - lam).clamp(min=0).sqrt(), lam)


def _largest(H: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return approximations of the ``most`` largest eigenvalues, in ascending order, and of their eigenvectors: those
    of H in the span of H^2 times a random matrix, which is always the same one (Halko, Martinsson and Tropp 2011)."""
    start = torch.randn(len(H), most, generator=torch.Generator().manual_seed(0), dtype=H.dtype)
    Q = torch.linalg.qr(H @ torch.linalg.qr(H @ start)[0])[0]
    values, vectors = torch.linalg.eigh(Q.mT @ H @ Q)
    return values, Q @ vectors


def _gains(L: Tensor, lam: float) -> Tensor:
    """Return all g_j, (in, m), from the last block of columns to the first."""
    P = torch.eye(L.shape[1], dtype=L.dtype) / lam  # the inverse of lam I + the sum over the later blocks
    G = torch.empty_like(L)
    for start in reversed(range(0, len(L), COLUMNS)):
        some = slice(start, start + COLUMNS)
        LP = L[some] @ P
        A = LP @ L[some].mT
        A.diagonal().add_(1)
        U = torch.linalg.cholesky(A.flip(0, 1)).flip(0, 1)  # A = U U^T, so that its trailing blocks are those of U
        X = torch.linalg.solve_triangular(U, LP, upper=True)
        G[some] = X / U.diagonal()[:, None]
        P -= X.mT @ X
    return G
