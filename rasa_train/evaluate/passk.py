"""pass@k without bias (2107.03374, equation 1)."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Chance that one of ``k`` samples drawn without replacement passes: 1 - C(n-c, k) / C(n, k).

    Args:
        samples: n, how many were made; at least ``k``.
        passed: c, how many of them passed.
    """
    if not 0 <= passed <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {passed} in {samples} samples")
    return 1.0 - comb(samples - passed, k) / comb(samples, k)


def mean_pass_at_k(counts: Sequence[tuple[int, int]], ks: Sequence[int] = (1, 10)) -> dict[str, float]:
    """``pass@k`` averaged over problems, each (samples, passed), for every k that all problems have samples for."""
    most = min((samples for samples, _ in counts), default=0)
    return {
        f"pass@{k}": sum(pass_at_k(samples, passed, k) for samples, passed in counts) / len(counts)
        for k in ks
        if k <= most
    }
