"""Compare the singular directions of updates with those of the weights that they change (the LoRA paper's Figure 8 and
Table 7)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .spectrum import Update, directions, numerical_rank
from .subspace import Side
from .updates import KindUpdates, Updates

EXACT = 1024
"""Largest smaller side of a matrix whose singular vectors all are computed."""
MOST = 64
"""Number of directions that are computed of an update, and of a weight beyond ``EXACT``, unless more are asked for."""
SIZES = 64
"""Largest number of sizes of W's subspace for which phi is given."""
PASSES, EXTRA = 16, 16
"""Products with the matrix and its transpose, and vectors beyond those asked for, of a truncated SVD."""


@dataclass(frozen=True)
class AtRank:
    """The top r directions of dW in W."""

    r: int
    phi: float
    """phi(dW, W, r, r)."""
    random: float
    """Mean of phi(r, r) for random subspaces: r / d."""
    projection: float
    """||U^T W V||_F with the top r singular vectors of dW."""
    projection_own: float
    """The same norm with the top r singular vectors of W, which is the largest possible value."""
    projection_random: float
    """The same norm with random orthonormal vectors."""
    factor: float
    """||dW||_F / ||U^T W V||_F, the amplification."""


@dataclass(frozen=True)
class AgainstBase:
    """One update beside the weight that it changes."""

    name: str
    kind: str
    rank: int
    """Numerical rank of dW; where no more directions than that were looked for, the number of directions. 0 for an
    update of zero, for which there are no directions to compare."""
    update_norm: float
    """||dW||_F."""
    weight_norm: float
    """||W||_F."""
    ranks: list[AtRank]
    sizes: list[int]
    """Sizes j of W's subspace in ``grid``."""
    grid: Tensor
    """phi(dW, W, i, j): (directions of dW, sizes), i from 1."""
    random_grid: Tensor
    """The same for random directions in place of those of dW."""

    def as_json(self) -> dict[str, object]:
        grids = {"grid": self.grid.tolist(), "random_grid": self.random_grid.tolist()}
        return {**asdict(self), **grids}


@dataclass(frozen=True)
class Wanted:
    """What to compare."""

    ranks: Sequence[int] | None = None
    """Numbers of directions of dW; None: the powers of two up to the rank of dW or 64, and that number itself."""
    directions: int | None = None
    """Number of directions of W, at least that of dW; None: all up to a smaller side of 1,024, otherwise 64."""
    side: Side = "right"
    """Singular vectors to compare in phi."""
    seed: int = 0
    """Seed of the random baseline."""


def against_base(updates: Updates, wanted: Wanted) -> Iterator[AgainstBase]:
    """Yield the comparison of each site, kind by kind, with one weight of the base in memory at a time.

    Raises:
        UserError: no site has an update, or a rank is beyond the numerical rank of an update.
    """
    if not updates:
        raise UserError("there is no update of a weight to compare with the base: the adapter changes no linear")
    for read in updates.values():
        found = read()
        for i in range(len(found.names)):
            yield _compare(found, i, wanted)


@torch.no_grad()
def _compare(found: KindUpdates, i: int, wanted: Wanted) -> AgainstBase:
    assert found.weight is not None  # the updates of an adapter always have a base
    update, W, name = found.layer(i), found.weight(i).float(), found.names[i]
    smaller = min(W.shape)
    most = min(max([MOST, *(wanted.ranks or ())]), smaller)
    U, s, V = leading(update, most)
    rank = numerical_rank(s, update)
    norm, of_weight = _norm(update), float(W.norm(dtype=torch.float64))
    if not rank:
        return AgainstBase(name, found.kind, 0, norm, of_weight, [], [], torch.zeros(0, 0), torch.zeros(0, 0))
    for r in wanted.ranks or ():
        if r > rank:
            raise UserError(
                f"--ranks must be in [1, {rank}], where {rank} is the numerical rank of {name}, got {r}: directions "
                "beyond that rank are arbitrary, and so would be the result"
            )
    ranks = list(wanted.ranks or sorted({rank, *(2**n for n in range(rank.bit_length()))}))
    U_W, s_W, V_W = leading(W, min(max(wanted.directions or (smaller if smaller <= EXACT else MOST), rank), smaller))
    random = [_random(size, rank, wanted.seed + n) for n, size in enumerate(W.shape)]
    left = wanted.side == "left"
    of_update, of_W, of_random = (U, U_W, random[0]) if left else (V, V_W, random[1])
    sizes = _sizes(of_W.shape[1])
    overlap = _phi(of_update[:, :rank], of_W)
    W = W.double()
    inside, inside_random = U.mT @ W @ V, random[0].mT @ W @ random[1]
    rows = []
    for r in ranks:
        projection = float(inside[:r, :r].norm())
        rows.append(
            AtRank(
                r=r,
                phi=float(overlap[r - 1, r - 1]),
                random=r / of_W.shape[0],
                projection=projection,
                projection_own=float(s_W[:r].norm()),
                projection_random=float(inside_random[:r, :r].norm()),
                factor=norm / projection if projection else float("inf"),
            )
        )
    columns = torch.tensor(sizes) - 1
    of_random_grid = _phi(of_random, of_W)[:, columns]
    return AgainstBase(name, found.kind, rank, norm, of_weight, rows, sizes, overlap[:, columns], of_random_grid)


def leading(update: Update, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triples (U (out, number), s, V (in, number)), fp64; fewer of factors that have fewer
    ranks.

    Singular vectors of a matrix whose smaller side is above 1,024 are those of a Krylov subspace (Musco and Musco 2015,
    arXiv 1504.05477), which takes memory for about 17 (number + 16) vectors beside the matrix. ``torch.svd_lowrank``,
    which keeps the last block only, misses a sixth of the 64 leading directions of a random matrix, whose singular
    values are close to one another; this misses less than a ten-thousandth.
    """
    if not isinstance(update, Tensor) or min(update.shape) <= max(EXACT, (PASSES + 1) * (number + EXTRA)):
        return directions(update, number)
    generator = torch.Generator().manual_seed(0)
    block = torch.linalg.qr(torch.randn(update.shape[1], number + EXTRA, generator=generator))[0]
    blocks = [block]
    for _ in range(PASSES):
        block = torch.linalg.qr(update.mT @ (update @ block))[0]
        blocks.append(block)
    basis = torch.linalg.qr(torch.cat(blocks, 1))[0]
    U, s, Vh = torch.linalg.svd(update @ basis, full_matrices=False)
    return U[:, :number].double(), s[:number].double(), (basis @ Vh[:number].mT).double()


def _phi(V: Tensor, W: Tensor) -> Tensor:
    """Return phi for all numbers of the orthonormal columns of V (d, i) and W (d, j): (i, j)."""
    i, j = (torch.arange(1, n + 1) for n in (V.shape[1], W.shape[1]))
    return (V.mT @ W).square().cumsum(0).cumsum(1) / torch.minimum(i[:, None], j[None])


def _random(size: int, number: int, seed: int) -> Tensor:
    """Return random orthonormal columns (size, number), fp64."""
    generator = torch.Generator().manual_seed(seed)
    columns: Tensor = torch.linalg.qr(torch.randn(size, number, generator=generator, dtype=torch.float64))[0]
    return columns


def _sizes(most: int) -> list[int]:
    """Return sizes up to ``most``: all of them, or as many as a picture shows, evenly spaced."""
    if most <= SIZES:
        return [*range(1, most + 1)]
    return sorted({round(1 + (most - 1) * n / (SIZES - 1)) for n in range(SIZES)})


def _norm(update: Update) -> float:
    if isinstance(update, Tensor):
        return float(update.norm(dtype=torch.float64))
    B, A = (factor.double() for factor in update)
    return float(((B.mT @ B) * (A @ A.mT)).sum().clamp(min=0).sqrt())
