"""Measure how well LoRA and RaSA of one budget can represent given updates, over k: the paper's Figures 2 and 3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from ..lowrank.reconstruct import Start, reconstruct
from .updates import KindUpdates


@dataclass(frozen=True)
class Descent:
    """How RaSA is fitted, by coordinate descent."""

    sweeps: int
    """Number of sweeps."""
    start: Start = "rasa"
    """Start of the descent, as in ``reconstruct``."""
    seed: int = 0
    """Seed of a random start."""


@dataclass(frozen=True)
class Capacity:
    """Reconstruction errors of one kind at r ranks per layer: squared Frobenius norms over all layers."""

    kind: str
    layers: int
    shape: tuple[int, int]
    norm2: float
    """sum ||dW||^2."""
    e_lora: float
    """Least error of LoRA."""
    e_rasa: dict[int, list[float]]
    """Errors of RaSA by k: the error before the first sweep, then the error after each sweep."""

    @property
    def best_k(self) -> int:
        """The k with the least error after the last sweep, the smallest if several are equal; 0 stands for LoRA."""
        last = {0: self.e_lora} | {k: errors[-1] for k, errors in self.e_rasa.items() if k}
        return min(last, key=lambda k: (last[k], k))

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "best_k": self.best_k}


def capacity(
    updates: KindUpdates, r: int, ks: Sequence[int], descent: Descent, tick: Callable[[], None] = lambda: None
) -> Capacity:
    """Return the errors of LoRA(r) and of RaSA(r, k) for each k.

    Args:
        tick: called after each k.
    Raises:
        ValueError: a k is not in [0, r].
    """
    e_rasa: dict[int, list[float]] = {}
    norm2 = e_lora = 0.0
    for k in ks:
        found = reconstruct(updates.stack, r, k, sweeps=descent.sweeps, start=descent.start, seed=descent.seed)
        norm2, e_lora = found.norm2, found.e_lora
        half_steps = 4 if k < r else 3  # without private ranks there is no half-step that fits them
        e_rasa[k] = found.errors[::half_steps]
        tick()
    return Capacity(updates.kind, len(updates.names), updates.shape, norm2, e_lora, e_rasa)


def relative(kinds: Sequence[Capacity], k: int) -> list[float]:
    """Return e_rasa / e_lora by sweep, over all kinds together."""
    total = sum(kind.e_lora for kind in kinds)
    return [sum(errors) / total for errors in zip(*(kind.e_rasa[k] for kind in kinds), strict=True)]


def advice(kinds: Sequence[Capacity], r: int) -> str:
    """Return a sentence or two on which k represents these updates best."""
    ks = [k for k in kinds[0].e_rasa if k]
    if sum(kind.e_lora for kind in kinds) <= 1e-12 * sum(kind.norm2 for kind in kinds):
        return f"LoRA with r={r} represents these updates exactly, so sharing cannot improve on it. Try a smaller r."
    if not ks:
        return "Only k = 0 was tried, which is LoRA."
    last = {k: relative(kinds, k)[-1] for k in ks}
    best = min(last, key=lambda k: (last[k], k))
    usual = max(r // 8, 1)
    if last[best] >= 1:
        text = f"No k does better than LoRA after these sweeps (best: k={best}, error {last[best]:.3f} of LoRA's)."
        return f"{text} More sweeps or --start theorem may do better."
    text = f"k={best} represents these updates best: its error is {last[best]:.3f} of LoRA's at the same budget"
    if best != usual and usual in last:
        text += f"; that of the usual k={usual} (r/8) is {last[usual]:.3f}"
    return text + ". This is what a fit can reach, not what training will reach: compare runs before you change k."
