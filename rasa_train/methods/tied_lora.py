"""Tied-LoRA: one LoRA pair for all layers of a kind (Renduchintala et al., NAACL 2024, arXiv 2311.09578).

    dW_i = diag(v_i) B diag(u_i) A

    A (r x in), B (out x r)   trained, one pair per kind of linear
    u_i (r), v_i (out)        layer i's own scales: trained (TL6), or 1 (TL5)

alpha is r, so there is no further scale. The paper ties a fused QKV projection; here every kind has its own pair.
"""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt
from torch import nn

from ..adapters.contract import Built, FactorAdapter, Method, full, kaiming_uniform, zeros
from ..adapters.site import Site, by_kind
from ..kernels.low_rank import Factors


class TiedLoRA(Method):
    """LoRA whose pair of factors is tied across the layers."""

    method: Literal["tied-lora"] = "tied-lora"
    r: PositiveInt = 8
    """Rank of the update."""
    variant: Literal["TL6", "TL5"] = "TL6"
    """``TL6`` trains the scales u and v of each layer beside the pair; ``TL5`` trains only the pair, so all layers get
    the same update. That u and v start at 1 is our choice: no source known to us states it."""

    def build(self, sites: list[Site]) -> Built:
        groups = by_kind(sites)
        pools = {name: Pair(group[0], self.r) for name, group in groups.items()}
        pair = {site.path: pools[name] for name, group in groups.items() for site in group}
        return Built({s.path: TiedLoRAAdapter(s, self, pair[s.path]) for s in sites}, dict(pools))


class Pair(nn.Module):
    """The tied pair: A (r x in) starts random and B (out x r) at zero, as in LoRA."""

    def __init__(self, site: Site, r: int) -> None:
        super().__init__()
        self.A = kaiming_uniform(*site.lead, r, site.in_features)
        self.B = zeros(*site.lead, site.out_features, r)


class TiedLoRAAdapter(FactorAdapter):
    stacks = True
    pool: Pair

    def __init__(self, site: Site, method: TiedLoRA, pool: Pair) -> None:
        super().__init__(site, method)
        # Not registered here: the pool belongs to the root of the model and is read in forward (``contract.Built``).
        object.__setattr__(self, "pool", pool)
        scaled = method.variant == "TL6"
        self.u = full(1.0, *site.lead, method.r) if scaled else None
        self.v = full(1.0, *site.lead, site.out_features) if scaled else None

    def factors(self) -> Factors:
        A, B = self.pool.A, self.pool.B
        if self.u is None or self.v is None:
            return Factors(B, A.new_ones(A.shape[:-1]), A)
        return Factors(B, self.u, A, self.v)
