"""Search for how much a worker computes at once and how many layers it recomputes: by trying, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from ..errors import UserError

MOST = 16_384
"""Tokens at once that ``auto`` begins with: the matrix products of an 8B model reach full speed with far fewer."""
ENOUGH = 4_096
"""Tokens at once below which a GPU is no longer busy: layers are recomputed rather than going below."""

ON_CPU = 4_096
"""Tokens at once of ``auto`` on a CPU, which more tokens do not make faster."""

MARGIN = 0.08
"""Share of a GPU's memory that a trial must leave free: later batches have other shapes, and fragment memory
differently."""


@dataclass(frozen=True)
class Setting:
    tokens: int
    """Tokens of a micro-batch, padding included."""
    checkpointed: int
    """Layers that are recomputed in the backward pass."""


def search(
    fits: Callable[[Setting], bool],
    *,
    longest: int,
    layers: int,
    tokens: int | Literal["auto"],
    checkpointing: bool | int | Literal["auto", "light"],
) -> Setting:
    """Return the fastest setting that fits in memory.

    More tokens than ``ENOUGH`` at once gain little, and recomputing costs a third. So the search first tries fewer
    tokens, down to ``ENOUGH``; then as few recomputed layers as possible; then fewer tokens again, with all layers
    recomputed.

    Args:
        fits: tries a setting and says whether it fits. The first call has the most tokens.
        longest: tokens of the longest example, the least that has to fit.
        tokens, checkpointing: the settings of the recipe.
    Raises:
        UserError: nothing fits.
    """
    budgets = list(_halved(max(MOST, longest), longest)) if tokens == "auto" else [tokens]
    checkpointing = 0 if checkpointing == "light" else checkpointing
    fixed = None if checkpointing == "auto" else layers if checkpointing is True else min(int(checkpointing), layers)
    for budget in budgets:
        if (fixed is not None or budget >= ENOUGH or len(budgets) == 1) and fits(Setting(budget, fixed or 0)):
            return Setting(budget, fixed or 0)
    if fixed is None:
        for budget in [b for b in budgets if b <= max(ENOUGH, budgets[-1])]:
            if fits(Setting(budget, layers)):
                return Setting(budget, _fewest(fits, budget, layers))
    least = Setting(budgets[-1], layers if fixed is None else fixed)
    ways = [] if least.checkpointed == layers else ["training.activation_checkpointing: auto"]
    ways += ["training.micro_batch_size: auto"] if tokens != "auto" and least.tokens > longest else []
    raise UserError(
        f"the GPU has no memory for {least.tokens:,} tokens at a time (the longest example has {longest:,}) with "
        f"{least.checkpointed} of {layers} layers recomputed. Try "
        + ", ".join([*ways, "a smaller data.max_length", "distributed.strategy: zero3 or fsdp on more GPUs"]),
        key="training.micro_batch_size",
    )


def _halved(most: int, least: int) -> Iterator[int]:
    while most > least:
        yield most
        most //= 2
    yield least


def _fewest(fits: Callable[[Setting], bool], tokens: int, layers: int) -> int:
    """Return the fewest recomputed layers that fit, by bisection; ``layers`` are known to fit."""
    low, high = 1, layers
    while low < high:
        middle = (low + high) // 2
        if fits(Setting(tokens, middle)):
            high = middle
        else:
            low = middle + 1
    return high
