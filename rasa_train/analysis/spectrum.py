"""Compute the singular values of weight updates, and how much of a RaSA update is private and how much shared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..lowrank.product_svd import product_svd

Update = Tensor | tuple[Tensor, Tensor]
"""dW (out, in), or factors (B (out, q), A (q, in)) with dW = B A."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one dW and the measures derived from them."""

    norm: float
    """Frobenius norm."""
    spectral_norm: float
    """Largest singular value."""
    numerical_rank: int
    """Number of singular values above the rounding errors of the matrix."""
    stable_rank: float
    """norm^2 / spectral_norm^2."""
    entropy_rank: float
    """exp of the entropy of the singular values' shares of their sum (Roy and Vetterli 2007, "effective rank")."""
    singular_values: list[float]
    """The singular values up to the numerical rank, largest first."""


@torch.no_grad()
def spectrum(update: Update) -> Spectrum:
    """Return the singular values of one update and its ranks."""
    s = singular_values(update)
    rank = numerical_rank(s, update)
    kept = s[:rank]
    share = kept / kept.sum()
    return Spectrum(
        norm=float(s.norm()),
        spectral_norm=float(s[0]) if len(s) else 0.0,
        numerical_rank=rank,
        stable_rank=float((kept**2).sum() / kept[0] ** 2) if rank else 0.0,
        entropy_rank=float(torch.exp(-(share * share.log()).sum())) if rank else 0.0,
        singular_values=[float(f"{value:.6g}") for value in kept],
    )


@torch.no_grad()
def singular_values(update: Update) -> Tensor:
    """Return the singular values of an update, largest first, fp64. For factors these are min(q, out, in) values, and
    if q <= min(out, in), no matrix of size out x in is computed."""
    if isinstance(update, Tensor):
        core = update.double()
    else:
        B, A = (factor.double() for factor in update)
        thin = B.shape[1] <= min(B.shape[0], A.shape[1])
        core = torch.linalg.qr(B)[1] @ torch.linalg.qr(A.mT)[1].mT if thin else B @ A
    s: Tensor = torch.linalg.svdvals(core)
    return s


@torch.no_grad()
def directions(update: Update, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triples (U (out, rank), s, V (in, rank)), fp64."""
    if isinstance(update, Tensor):
        U, s, Vh = torch.linalg.svd(update.double(), full_matrices=False)
        return U[:, :rank], s[:rank], Vh[:rank].mT
    U, s, V = product_svd(*update)
    return U[:, :rank], s[:rank], V[:, :rank]


def numerical_rank(s: Tensor, update: Update) -> int:
    """Return how many of the singular values ``s`` are above the rounding errors of ``update`` in its dtype."""
    parts = (update,) if isinstance(update, Tensor) else update
    eps = max(torch.finfo(part.dtype).eps for part in parts)
    largest = float(s[0]) if len(s) else 0.0
    size = max(max(part.shape) for part in parts)
    return int((s > largest * size * eps).sum()) if largest else 0


@dataclass(frozen=True)
class Energy:
    """Shares of ||dW||^2. The inner product of the two parts contributes the rest, ``1 - private - shared``."""

    private: float
    shared: float


@torch.no_grad()
def energy(B: Tensor, A: Tensor, private: int) -> Energy | None:
    """Return how much of dW = B A comes from the first ``private`` ranks and how much from the rest; None when dW is
    zero.

    Args:
        B: (out, q), with the mixing weights multiplied in. A: (q, in).
        private: number of ranks that are the layer's own, which come first.
    """
    G = (B.double().mT @ B.double()) * (A.double() @ A.double().mT)  # inner products of the rank-one terms
    total = float(G.sum())
    if total <= 0:
        return None
    return Energy(float(G[:private, :private].sum()) / total, float(G[private:, private:].sum()) / total)
