"""Compare two adapters, or two layers of one adapter, site by site."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor

from ..errors import UserError
from .spectrum import numerical_rank, singular_values
from .subspace import Amplification, Side, amplification, phi, phi_grid
from .updates import KindUpdates, Updates


@dataclass(frozen=True)
class Directions:
    """The singular directions to compare."""

    i: int
    """Number of directions of the first update."""
    j: int
    """Number of directions of the second update."""
    side: Side = "right"
    """Singular vectors to compare."""
    amplified: int | None = None
    """Number of directions for the amplification of the first update; None leaves the amplification out."""


@dataclass(frozen=True)
class Comparison:
    """Comparison of one pair of updates."""

    name: str
    phi: float
    random: float
    """Mean phi of two random subspaces of these sizes: max(i, j) / d."""
    grid: Tensor
    """phi for all sizes up to (i, j); NaN beyond a numerical rank."""
    amplification: Amplification | None
    """Amplification of the first update; None if it was not asked for."""

    def as_json(self) -> dict[str, object]:
        grid = [[None if value != value else value for value in row] for row in self.grid.tolist()]
        return {**asdict(self), "grid": grid}


def compare(
    first: Updates, second: Updates, directions: Directions, layers: tuple[int, int] | None = None
) -> list[Comparison]:
    """Return phi of each site of ``first`` and the same site of ``second``, or of one layer and another.

    Args:
        layers: numbers of two layers of each kind, which are compared instead of each layer with its counterpart.
    Raises:
        UserError: the two have no kind in common, a layer does not exist, or a number of directions is beyond the
            numerical rank of an update.
    """
    common = [kind for kind in first if kind in second]
    if not common:
        raise UserError(f"the two adapters have no kind in common: {', '.join(first)} and {', '.join(second)}")
    found = []
    for kind in common:
        one = first[kind]()
        two = one if second is first else second[kind]()
        for m, n in [layers] if layers else [(m, m) for m in range(min(len(one.names), len(two.names)))]:
            found.append(_pair(one, two, m, n, directions))
    return found


def _pair(one: KindUpdates, two: KindUpdates, m: int, n: int, directions: Directions) -> Comparison:
    i, j, side, r = directions.i, directions.j, directions.side, directions.amplified
    for updates, number in ((one, m), (two, n)):
        if number >= len(updates.names):
            raise UserError(f"--layers: {updates.kind} has layers 0 to {len(updates.names) - 1}, got {number}")
    A, B = one.layer(m), two.layer(n)
    for option, wanted, update, name in (
        ("-i", i, A, one.names[m]),
        ("-j", j, B, two.names[n]),
        ("--amplification", r or 1, A, one.names[m]),
    ):
        rank = numerical_rank(singular_values(update), update)
        if wanted > rank:
            raise UserError(
                f"{option} must be in [1, {rank}], where {rank} is the numerical rank of {name}, got {wanted}: "
                "directions beyond that rank are arbitrary, and so would be the result"
            )
    amplified = None
    if r is not None:
        assert one.weight is not None  # the updates of an adapter always have a base
        amplified = amplification(A, one.weight(m), r)
    name = one.names[m] if m == n else f"{one.names[m]} and {two.names[n]}"
    size = one.shape[side == "right"]
    return Comparison(name, phi(A, B, i, j, side=side), max(i, j) / size, phi_grid(A, B, i, j, side=side), amplified)
