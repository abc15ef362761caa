"""Which examples of the tokenised sets are trained on, which are held out, and how many of each set an epoch shows."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from ..errors import UserError
from .cache import TokenDataset
from .config import DataConfig
from .mixture import Mixture, apportioned
from .sources import Source, overlap

_SEED = 42  # the seed of the reference's data scaling runs


def divided(config: DataConfig, wholes: Sequence[TokenDataset], keys: Sequence[str]) -> list[tuple[TokenDataset, ...]]:
    """Return the examples of each set that are trained on, and those that are held out.

    ``data.validation.size`` is divided among the sets by their sizes. Sets with the same key have the same examples:
    they count once, hold out the same ones, and the first of them gives these.

    Args:
        wholes: the tokenised sets.
        keys: identities of their examples.
    Raises:
        UserError: nothing is left to train on.
    """
    size = config.validation.size if config.validation else None
    sizes = {key: len(whole) for key, whole in zip(keys, wholes, strict=True)}
    total = sum(sizes.values())
    held = dict.fromkeys(sizes, 0)
    if size is not None:
        wanted = size if isinstance(size, int) else max(1, int(size * total))
        held = dict(zip(sizes, apportioned(min(wanted, total), sizes.values()), strict=True))
    found: list[tuple[TokenDataset, ...]] = []
    for place, (whole, key) in enumerate(zip(wholes, keys, strict=True)):
        order = np.random.default_rng(_SEED).permutation(len(whole))
        rest, last = np.split(order, [len(whole) - held[key]])
        if not len(rest):
            raise UserError(
                f"data.validation.size: {size} leaves nothing to train on: {config.sets[place].dataset} has "
                f"{len(whole)} examples",
                key="data.validation.size",
            )
        rest = rest[: max(1, int(config.fraction * len(rest)))]
        trained = whole if len(rest) == len(whole) else whole.select(np.sort(rest))
        found.append((trained, whole.select(np.sort(last if keys.index(key) == place else last[:0]))))
    return found


def refuse_two_readings(config: DataConfig, sources: Sequence[Source], keys: Sequence[str]) -> None:
    """Raise ``UserError`` if a share of the rows is to be held out, and two sets make other examples of the same rows:
    what one of them holds out would be trained on in the other."""
    if not config.validation or config.validation.size is None:
        return
    for one, other in combinations(range(len(sources)), 2):
        if keys[one] != keys[other] and overlap(sources[one], sources[other]):
            raise UserError(
                f"data.validation.size: data.mix[{one}] and data.mix[{other}] read the same rows of "
                f"{config.sets[other].dataset} in two ways, so rows held out of one would be trained on in the other: "
                "name a set of its own, data.validation: {dataset: FILE}",
                key="data.validation.size",
            )


def draws_of(config: DataConfig, sizes: Sequence[int]) -> list[int] | None:
    """Return the number of examples of each set in an epoch, which has as many as all sets together; None if each
    example is shown once.

    Raises:
        UserError: a weight is so small that an epoch has no example of its set.
    """
    weights = [one.weight for one in config.sets if one.weight is not None]
    if not weights:
        return None
    draws = apportioned(sum(sizes), weights)
    for place, number in enumerate(draws):
        if not number:
            raise UserError(
                f"data.mix[{place}].weight: {weights[place]:g} of {sum(weights):g} gives {config.sets[place].dataset} "
                f"no example of the {sum(sizes):,} of an epoch: raise it, or leave this set out",
                key=f"data.mix[{place}].weight",
            )
    return None if draws == list(sizes) else draws


def joined(parts: Sequence[TokenDataset], draws: Sequence[int] | None = None) -> TokenDataset:
    """Return the examples of all ``parts`` as one set."""
    return parts[0] if len(parts) == 1 else Mixture(parts, draws)


def notes_on(names: Sequence[str], sizes: Sequence[int], draws: Sequence[int] | None) -> list[str]:
    """Return a note on each set whose examples an epoch does not show once each."""
    notes = []
    for name, size, number in zip(names, sizes, draws or sizes, strict=True):
        times, rest = divmod(number, size)
        how = f"each {times} or {times + 1} times" if rest else f"each {times} times"
        if not times:
            how = "the next epoch goes on with the others"
        if number != size:
            notes.append(f"{name}: {number:,} of {size:,} examples, {how}")
    return notes
