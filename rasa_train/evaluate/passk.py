"""Unbiased pass@k (2107.03374, equation 1)."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Return the probability that at least one of ``k`` samples drawn without replacement passes:
    1 - C(n-c, k) / C(n, k).

    Args:
        samples: n, the number of samples that were made; at least ``k``.
        passed: c, the number of samples that passed.
    Raises:
        ValueError: ``passed`` is not in [0, samples], or ``k`` not in [1, samples].
    """
    if not 0 <= passed <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} is not defined for {samples} samples of which {passed} passed")
    return 1.0 - comb(samples - passed, k) / comb(samples, k)


def mean_pass_at_k(counts: Sequence[tuple[int, int]], ks: Sequence[int] = (1, 10)) -> dict[str, float]:
    """Return ``pass@k`` averaged over problems, for every k for which all problems have enough samples.

    Args:
        counts: (samples, passed) of each problem.
    """
    most = min((samples for samples, _ in counts), default=0)
    return {
        f"pass@{k}": sum(pass_at_k(samples, passed, k) for samples, passed in counts) / len(counts)
        for k in ks
        if k <= most
    }


def without_pass_at_k(counts: Sequence[tuple[int, int]], ks: Sequence[int] = (1, 10)) -> dict[str, str]:
    """Return, for every k that ``mean_pass_at_k`` leaves out, why it does."""
    most = min((samples for samples, _ in counts), default=0)
    few = sum(samples < max(ks) for samples, _ in counts)
    why = f"needs {{}} samples of every problem; {few} of {len(counts)} have fewer, the fewest {most}"
    return {f"pass@{k}": why.format(k) for k in ks if k > most}
