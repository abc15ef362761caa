"""Sum several adapters of one base with weights, exactly: sum_j w_j dW_j."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapters.contract import Adapter, Counts, FactorAdapter, Method
from ..adapters.site import Site
from ..errors import UserError
from ..kernels.low_rank import Factors
from ..methods.lora import LoRA

Terms = list[tuple[Adapter, float]]
PLAIN: Method = LoRA()
"""Method of a sum, which has no hyper-parameters and no dropout of its own."""


def total(parts: Sequence[tuple[list[Site], dict[str, Adapter], float]]) -> tuple[list[Site], dict[str, Adapter]]:
    """Return the sites and the adapters of the sum.

    Args:
        parts: for each saved adapter its sites, its modules by site path, and its weight.
    Raises:
        UserError: two adapters divide a fused weight in different ways.
    """
    sites: dict[str, Site] = {}
    terms: dict[str, Terms] = {}
    for its_sites, adapters, weight in parts:
        for site in its_sites:
            if sites.setdefault(site.path, site) != site:
                raise UserError(f"the adapters cannot be summed: they divide {site.path} in different ways")
            terms.setdefault(site.path, []).append((adapters[site.path], weight))
    return list(sites.values()), {path: _sum(sites[path], terms[path]) for path in sites}


def _sum(site: Site, terms: Terms) -> Adapter:
    factors = [(a, w) for a, w in terms if isinstance(a, FactorAdapter)]
    return FactorSum(site, factors) if len(factors) == len(terms) else DeltaSum(site, terms)


class FactorSum(FactorAdapter):
    """The ranks of all terms side by side: a LoRA whose rank is the sum of the terms' ranks."""

    def __init__(self, site: Site, terms: list[tuple[FactorAdapter, float]]) -> None:
        super().__init__(site, PLAIN)
        self.terms = terms

    def factors(self) -> Factors:
        factors = [(adapter.factors(), weight) for adapter, weight in self.terms]
        d = torch.cat([weight * f.d for f, weight in factors], -1)
        B = torch.cat([f.B if f.b is None else f.b.unsqueeze(-1) * f.B for f, _ in factors], -1)
        return Factors(B, d, torch.cat([f.A for f, _ in factors], -2))

    def delta_bias(self) -> Tensor | None:
        return _biases(self.terms)


class DeltaSum(Adapter):
    """The sum of dense updates."""

    def __init__(self, site: Site, terms: Terms) -> None:
        super().__init__(site, PLAIN)
        self.terms = terms
        self.needs_weight = any(a.needs_weight for a, _ in terms)  # type: ignore[misc]

    def forward(self, x: Tensor, weight: Tensor, counts: Counts | None = None) -> Tensor:
        outputs = [w * a(x, weight, counts) for a, w in self.terms]
        return torch.stack(outputs).sum(0)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        update = torch.zeros(*self.site.lead, *self.site.shape)
        for adapter, w in self.terms:
            update.add_(adapter.delta(weight), alpha=w)
        return update

    def delta_bias(self) -> Tensor | None:
        return _biases(self.terms)

    @property
    def effective_rank(self) -> int:
        return min(sum(a.effective_rank for a, _ in self.terms), *self.site.shape)


def _biases(terms: Sequence[tuple[Adapter, float]]) -> Tensor | None:
    found = [w * bias for a, w in terms if (bias := a.delta_bias()) is not None]
    return torch.stack(found).sum(0) if found else None
