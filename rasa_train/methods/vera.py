"""VeRA: vector-based random matrix adaptation (Kopiczko et al., ICLR 2024, arXiv 2310.11454).

One frozen random pair serves the whole model; a site trains two vectors:

    dW = diag(b) B diag(d) A

    A (r x max in), B (max out x r)   frozen, one pair; a site uses the top-left slices A[:, :in], B[:out]
    b (out), d (r)                    trained, start at 0 and at ``d_initial``

The layout of the pair and its values are the same as in PEFT. There is no alpha.
"""

from __future__ import annotations

import math
import re
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from ..adapters.contract import Built, FactorAdapter, Method, PeftConfig, full, zeros
from ..adapters.site import Site
from ..kernels.low_rank import Factors


class VeRA(Method):
    """A frozen random pair for all sites, scaled by two trained vectors per site."""

    method: Literal["vera"] = "vera"
    r: PositiveInt = 1024
    """Rank of the update (the RaSA paper's setting; it costs r parameters per site)."""
    d_initial: float = 0.1
    """Initial value of d (PEFT's default; the paper does not state one)."""
    projection_seed: NonNegativeInt = 0
    """Seed of the random pair (PEFT: ``projection_prng_key``)."""
    save_projection: bool = True
    """Whether the pair is stored with the adapter. Without it the file is r * (max in + max out) * 4 bytes smaller, but
    correct only where torch draws the same numbers from the seed."""

    def build(self, sites: list[Site]) -> Built:
        pool = Projection(self, max(s.in_features for s in sites), max(s.out_features for s in sites))
        return Built({site.path: VeRAAdapter(site, self, pool) for site in sites}, {"vera": pool})

    @classmethod
    def from_peft(cls, config: PeftConfig) -> dict[str, object] | None:
        if config.get("peft_type") != "VERA":
            return None
        return {
            "r": config["r"],
            "d_initial": config.get("d_initial", 0.1),
            "dropout": config.get("vera_dropout", 0.0),
            "projection_seed": config["projection_prng_key"],
            "save_projection": config.get("save_projection", True),
        }

    @classmethod
    def rename_peft(cls, key: str) -> str | None:
        if match := re.fullmatch(r"base_model\.vera_([AB])", key):
            return f"pools.vera.{match[1]}"
        match = re.fullmatch(r"(.+)\.vera_lambda_([bd])", key)
        return f"{match[1]}.{match[2]}" if match else None


class Projection(nn.Module):
    """The frozen pair: A ~ U(+-sqrt(6 / max in)), B ~ U(+-sqrt(6 / r)) (Kaiming with gain sqrt(2)).

    Both are drawn on the CPU from one generator, A first, so that every worker and every device has the same values.
    """

    A: Tensor
    B: Tensor

    def __init__(self, method: VeRA, in_features: int, out_features: int) -> None:
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(method.projection_seed)
        for name, shape in (("A", (method.r, in_features)), ("B", (out_features, method.r))):
            tensor = torch.empty(shape, dtype=torch.float32)
            if not tensor.is_meta:
                bound = math.sqrt(6.0 / shape[1])
                drawn = torch.empty(shape, dtype=torch.float32, device="cpu")
                tensor.copy_(drawn.uniform_(-bound, bound, generator=generator))
            self.register_buffer(name, tensor, persistent=method.save_projection)


class VeRAAdapter(FactorAdapter):
    stacks = True
    pool: Projection

    def __init__(self, site: Site, method: VeRA, pool: Projection) -> None:
        super().__init__(site, method)
        # Not registered here: the pool belongs to the root of the model and is read in forward (``contract.Built``).
        object.__setattr__(self, "pool", pool)
        self.b = zeros(*site.lead, site.out_features)
        self.d = full(method.d_initial, *site.lead, method.r)

    def factors(self) -> Factors:
        A = self.pool.A[:, : self.site.in_features].expand(*self.site.lead, -1, -1)
        B = self.pool.B[: self.site.out_features].expand(*self.site.lead, -1, -1)
        return Factors(B, self.d, A, self.b)
