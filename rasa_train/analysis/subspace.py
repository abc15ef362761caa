"""Compute the similarity of subspaces, and what an update amplifies (Hu et al. 2021, arXiv 2106.09685, section 7)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .spectrum import Update, directions, numerical_rank, singular_values

Side = Literal["right", "left"]


class BeyondRank(UserWarning):
    """More directions were asked for than the numerical rank of a matrix: the rest of them are arbitrary."""


def phi(A: Update, B: Update, i: int, j: int, *, side: Side = "right") -> float:
    """Return ||V_A^iT V_B^j||_F^2 / min(i, j): 1 when the smaller subspace lies in the larger one, 0 when the subspaces
    are orthogonal.

    V^i are the first i right (with ``side="left"``, left) singular vectors, so A and B may differ in their other size.
    Random subspaces of R^d give max(i, j) / d on average. phi is symmetric under exchange of (A, i) and (B, j).

    Raises:
        ValueError: i or j is below 1 or beyond the size of its matrix, or the sizes differ.
    Warns:
        BeyondRank: i or j is beyond the numerical rank; the value then depends on arbitrary vectors.
    """
    V, W = (_leading(M, n, side) for M, n in ((A, i), (B, j)))
    if V.shape[0] != W.shape[0]:
        raise ValueError(f"singular vectors of {V.shape[0]} and of {W.shape[0]} entries cannot be compared")
    return float((V.mT @ W).square().sum()) / min(i, j)


@torch.no_grad()
def phi_grid(A: Update, B: Update, i: int, j: int, *, side: Side = "right") -> Tensor:
    """Return phi for all sizes up to (i, j): entry [m-1, n-1] is phi(A, B, m, n), and NaN beyond a numerical rank."""
    ranks = [numerical_rank(singular_values(M), M) for M in (A, B)]
    V, W = (_vectors(M, n, side) for M, n in ((A, min(i, ranks[0])), (B, min(j, ranks[1]))))
    overlap = (V.mT @ W).square().cumsum(0).cumsum(1)
    m, n = (torch.arange(1, size + 1) for size in overlap.shape)
    grid = torch.full((i, j), torch.nan, dtype=torch.float64)
    grid[: len(m), : len(n)] = overlap.cpu() / torch.minimum(m[:, None], n[None])
    return grid


@dataclass(frozen=True)
class Amplification:
    """How much of W lies in the top-r directions of dW, and how much larger dW is there."""

    r: int
    update_norm: float
    """||dW||_F."""
    weight_norm: float
    """||W||_F."""
    projection: float
    """||U_r^T W V_r||_F with the top-r singular vectors of dW."""
    projection_own: float
    """The same norm with the top-r singular vectors of W itself, which is the largest possible value."""
    projection_random: float
    """The same norm with random orthonormal vectors."""
    factor: float
    """update_norm / projection."""


@torch.no_grad()
def amplification(update: Update, W: Tensor, r: int, *, seed: int = 0) -> Amplification:
    """Return how much dW amplifies its top-r directions relative to W (out, in).

    Raises:
        ValueError: r is below 1 or beyond the numerical rank of dW, or the shapes differ.
    """
    s = singular_values(update)
    rank = numerical_rank(s, update)
    if not 1 <= r <= rank:
        raise ValueError(f"r must be in [1, {rank}], the numerical rank of the update, got {r}")
    U, _, V = directions(update, r)
    if (U.shape[0], V.shape[0]) != tuple(W.shape):
        raise ValueError(f"the update is {U.shape[0]} x {V.shape[0]}, the weight {W.shape[0]} x {W.shape[1]}")
    W = W.double()
    generator = torch.Generator().manual_seed(seed)
    P, Q = (torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=torch.float64))[0] for n in W.shape)
    norm, projection = float(s.norm()), float((U.mT @ W @ V).norm())
    return Amplification(
        r=r,
        update_norm=norm,
        weight_norm=float(W.norm()),
        projection=projection,
        projection_own=float(torch.linalg.svdvals(W)[:r].norm()),
        projection_random=float((P.to(W.device).mT @ W @ Q.to(W.device)).norm()),
        factor=norm / projection if projection else float("inf"),
    )


def _leading(M: Update, n: int, side: Side) -> Tensor:
    most = min(M.shape) if isinstance(M, Tensor) else min(M[0].shape[0], M[1].shape[1])
    if not 1 <= n <= most:
        raise ValueError(f"the number of directions must be in [1, {most}], got {n}")
    rank = numerical_rank(singular_values(M), M)
    if n > rank:
        warnings.warn(f"{n} directions of a matrix of numerical rank {rank}: the rest are arbitrary", BeyondRank, 3)
    # Factors have only as many vectors as ranks: beyond them, the arbitrary vectors come from the whole matrix.
    return _vectors(M if isinstance(M, Tensor) or n <= M[1].shape[0] else M[0] @ M[1], n, side)


def _vectors(M: Update, n: int, side: Side) -> Tensor:
    U, _, V = directions(M, n)
    return V if side == "right" else U
