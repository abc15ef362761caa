"""ShareLoRA: LoRA with A, B or both shared by all layers of a kind (Song et al. 2024, arXiv 2406.10785).

One pool per kind of linear holds the shared factors:

    dW_i = (alpha / r) B_i A        share: A     (ShareA)
           (alpha / r) B A_i        share: B     (ShareB)
           (alpha / r) B A          share: AB    (ShareAB)

A (r x in) starts random and B (out x r) at zero, as in LoRA.
"""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, PositiveInt
from torch import nn

from ..adapters.contract import Built, FactorAdapter, Method, kaiming_uniform, zeros
from ..adapters.site import Site, by_kind
from ..kernels.low_rank import Factors


class ShareLoRA(Method):
    """LoRA in which A, B or both are one tensor per kind of linear, shared by all layers."""

    method: Literal["sharelora"] = "sharelora"
    r: PositiveInt = 8
    """Rank of the update."""
    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / r. As in our LoRA: 32 for code, 8 for maths in the RaSA paper."""
    share: Literal["A", "B", "AB"] = "A"
    """Factors that the layers share. The released script shares A (only that of q_proj and v_proj)."""

    def build(self, sites: list[Site]) -> Built:
        groups = by_kind(sites)
        pools = {name: Sides(group[0], self) for name, group in groups.items()}
        shared = {site.path: pools[name] for name, group in groups.items() for site in group}
        return Built({s.path: ShareLoRAAdapter(s, self, shared[s.path]) for s in sites}, dict(pools))


class Sides(nn.Module):
    """The shared factors of one kind: A, B or both."""

    A: nn.Parameter
    B: nn.Parameter

    def __init__(self, site: Site, method: ShareLoRA) -> None:
        super().__init__()
        if "A" in method.share:
            self.A = kaiming_uniform(*site.lead, method.r, site.in_features)
        if "B" in method.share:
            self.B = zeros(*site.lead, site.out_features, method.r)


class ShareLoRAAdapter(FactorAdapter):
    stacks = True
    pool: Sides
    A: nn.Parameter
    B: nn.Parameter

    def __init__(self, site: Site, method: ShareLoRA, pool: Sides) -> None:
        super().__init__(site, method)
        # Not registered here: the pool belongs to the root of the model and is read in forward (``contract.Built``).
        object.__setattr__(self, "pool", pool)
        self.share, self.scale = method.share, method.alpha / method.r
        if "A" not in method.share:
            self.A = kaiming_uniform(*site.lead, method.r, site.in_features)
        if "B" not in method.share:
            self.B = zeros(*site.lead, site.out_features, method.r)

    def factors(self) -> Factors:
        A = self.pool.A if "A" in self.share else self.A
        B = self.pool.B if "B" in self.share else self.B
        return Factors(B, A.new_full(A.shape[:-1], self.scale), A)
