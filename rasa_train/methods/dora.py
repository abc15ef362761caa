"""DoRA: separate magnitude and direction of each output feature (Liu et al., ICML 2024, arXiv 2402.09353).

    V = W + s B A,  s = alpha / r;   W + dW = diag(m / |V|) V                                          (Eq. 5)

|V| are the norms of the rows of V (one per output feature) and constant in the backward pass (section 4.3).
m (out) is trained and starts as the norms of the rows of W.
"""

from __future__ import annotations

import math
import re
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from ..adapters.contract import Adapter, Built, Counts, Method, PeftConfig, kaiming_uniform, linear, low_rank, zeros
from ..adapters.site import Site
from ..kernels.grouped import Rows


class DoRA(Method):
    """Weight-decomposed low-rank adaptation: A (r x in), B (out x r) and m (out) are trained in every site."""

    method: Literal["dora"] = "dora"
    r: PositiveInt = 8
    """Rank of the change of direction. The update itself has full rank."""
    alpha: PositiveFloat = 32.0
    """The change of direction is scaled by alpha / r. The default is our choice: LoRA's value."""

    def build(self, sites: list[Site]) -> Built:
        return Built({site.path: DoRAAdapter(site, self) for site in sites}, {})

    @classmethod
    def from_peft(cls, config: PeftConfig) -> dict[str, object] | None:
        if config.get("peft_type") != "LORA" or not config.get("use_dora") or config.get("use_mora"):
            return None
        r, alpha = config["r"], config["lora_alpha"]
        return {
            "r": r,
            # alpha / sqrt(r) is the scale of rsLoRA
            "alpha": alpha * math.sqrt(r) if config.get("use_rslora") else alpha,
            "dropout": config.get("lora_dropout", 0.0),
        }

    @classmethod
    def rename_peft(cls, key: str) -> str | None:
        if match := re.fullmatch(r"(.+)\.lora_([AB])\.weight", key):
            return f"{match[1]}.{match[2]}"
        match = re.fullmatch(r"(.+)\.lora_magnitude_vector(?:\.weight)?", key)
        return f"{match[1]}.m" if match else None


class DoRAAdapter(Adapter):
    needs_weight = True
    takes_rows = True

    def __init__(self, site: Site, method: DoRA) -> None:
        super().__init__(site, method)
        self.scale = method.alpha / method.r
        self.A = kaiming_uniform(*site.lead, method.r, site.in_features)
        self.B = zeros(*site.lead, site.out_features, method.r)
        self.m = zeros(*site.lead, site.out_features)

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        # B is 0 here. The same function as in forward computes the norms, so that m / |V| is exactly 1.
        self.m.copy_(_row_norms(weight, self.B, self.A, self.scale))

    def forward(self, x: Tensor, weight: Tensor, counts: Counts | None = None) -> Tensor:
        g = self.m / _row_norms(weight, self.B, self.A, self.scale)
        more = g - 1.0
        if counts is not None:  # for each row of x, the g of its expert
            more = more.index_select(0, Rows.of(counts, x.device).expert)
        of_base = more.to(x.dtype) * linear(x, weight.to(x.dtype), counts)
        return of_base + low_rank(x, self.A, self.B * (g * self.scale).unsqueeze(-1), counts)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        if weight is None:
            raise ValueError(f"{self.site.path}: the update of DoRA depends on the weight, so delta needs it")
        W = weight.float()
        g = self.m / _row_norms(W, self.B, self.A, self.scale)
        return (g - 1.0).unsqueeze(-1) * W + (g * self.scale).unsqueeze(-1) * (self.B @ self.A)

    @property
    def effective_rank(self) -> int:
        return min(self.site.shape)


@torch.no_grad()
def _row_norms(weight: Tensor, B: Tensor, A: Tensor, scale: float) -> Tensor:
    """Return the norm of each row of W + scale B A (..., out), fp32."""
    V = weight.float() + scale * (B @ A)
    norms: Tensor = torch.linalg.vector_norm(V, dim=-1)
    return norms
