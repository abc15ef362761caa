"""Several tokenised sets as one, and which of their examples an epoch shows.

An epoch has as many examples as all sets together, divided by weight. It shows the examples of a set equally often, or
some of them once more than the others: these are the next ones of a shuffle that goes round from epoch to epoch, so
over a run all are shown equally often, within one. The draw depends on seed and epoch alone, so a run that is resumed
goes on with the same examples.
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from .cache import TokenDataset
from .encode import Example


class Mixture(TokenDataset):
    """Examples of several sets, those of the first set first.

    Args:
        parts: the sets.
        draws: number of examples of each set in an epoch, as many together as there are; None if each is shown once.
        order: the examples of this view, in its order; None for all.
    """

    def __init__(
        self, parts: Sequence[TokenDataset], draws: Sequence[int] | None = None, order: np.ndarray | None = None
    ) -> None:
        self._parts, self._draws, self._order = list(parts), draws, order
        self._ends = np.cumsum([len(part) for part in parts])
        self.directory = parts[0].directory

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._order is None else len(self._order)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        at = int(index if self._order is None else self._order[index])
        place = int(np.searchsorted(self._ends, at, side="right"))
        return self._parts[place][at - int(self._ends[place]) + len(self._parts[place])]

    @cached_property
    def origins(self) -> np.ndarray:
        return self._of_all([np.full(len(part), place) for place, part in enumerate(self._parts)])

    @cached_property
    def lengths(self) -> np.ndarray:
        return self._of_all([part.lengths for part in self._parts])

    @cached_property
    def supervised(self) -> np.ndarray:
        return self._of_all([part.supervised for part in self._parts])

    @cached_property
    def answers(self) -> np.ndarray:
        return self._of_all([part.answers for part in self._parts])

    @cached_property
    def largest_id(self) -> int:
        return max(part.largest_id for part in self._parts)

    def select(self, indices: Sequence[int] | np.ndarray) -> "Mixture":
        chosen = np.asarray(indices, np.int64)
        return Mixture(self._parts, None, chosen if self._order is None else self._order[chosen])

    def epoch(self, seed: int, epoch: int) -> np.ndarray | None:
        if self._draws is None:
            return None
        starts = self._ends - [len(part) for part in self._parts]
        return np.concatenate(
            [
                start + _drawn(len(part), draws, epoch, [seed, place])
                for place, (part, start, draws) in enumerate(zip(self._parts, starts, self._draws, strict=True))
            ]
        )

    def per_epoch(self, values: np.ndarray) -> list[int]:
        totals = [int(values[self.origins == place].sum(dtype=np.int64)) for place in range(len(self._parts))]
        if self._draws is None:
            return totals
        sizes = [len(part) for part in self._parts]
        return [round(total * draws / size) for total, draws, size in zip(totals, self._draws, sizes, strict=True)]

    def __reduce__(self) -> tuple[Any, ...]:
        return Mixture, (self._parts, self._draws, self._order)

    def _of_all(self, values: list[np.ndarray]) -> np.ndarray:
        joined = np.concatenate(values)
        return joined if self._order is None else joined[self._order]


def _drawn(size: int, draws: int, epoch: int, seed: Sequence[int]) -> np.ndarray:
    """Return ``draws`` of ``size`` examples: all of them as often as possible, and for the rest the next ones of a
    shuffle that goes round."""
    times, rest = divmod(draws, size)
    shuffled = np.random.default_rng(seed).permutation(size)
    some = shuffled[(epoch * rest + np.arange(rest)) % size]
    return np.concatenate([*[np.arange(size)] * times, np.sort(some)])


def apportioned(total: int, weights: Iterable[float]) -> list[int]:
    """Divide ``total`` in proportion to ``weights``: each part is a whole number within one of its share (the method of
    largest remainders; of equal ones the first)."""
    exact = [Fraction(weight) for weight in weights]
    shares = [total * weight / sum(exact) for weight in exact]
    parts = [int(share) for share in shares]
    most = sorted(range(len(parts)), key=lambda place: parts[place] - shares[place])
    for place in most[: total - sum(parts)]:
        parts[place] += 1
    return parts
