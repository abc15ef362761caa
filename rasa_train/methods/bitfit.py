"""BitFit: only biases are trained (Ben Zaken et al., ACL 2022, arXiv 2106.10199).

Llama and Mistral have no biases: ``add_bias`` gives each selected linear without a bias a new one that starts at zero.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..adapters.contract import Adapter, Built, Counts, Method, zeros
from ..adapters.site import Site
from ..errors import UserError


class BitFit(Method):
    """Bias-term fine-tuning: all biases of the base are trained, and new ones that are added to linears. No weight is
    updated, so ``dropout`` and ``compute`` cannot be set; ``targets`` selects the linears that biases are added to, and
    cannot be set without ``add_bias``."""

    method: Literal["bitfit"] = "bitfit"
    add_bias: bool = True
    """Whether selected linears without a bias get one. This is our addition: the paper's models all had biases."""

    never_used: ClassVar[frozenset[str]] = frozenset({"dropout", "compute"})

    @property
    def unused(self) -> frozenset[str]:
        return self.never_used if self.add_bias else self.never_used | {"targets", "exclude"}

    def build(self, sites: list[Site]) -> Built:
        without = [site for site in sites if self.add_bias and not site.bias]
        for site in without:
            if site.num_experts is not None or site.rows is not None:
                raise UserError(
                    f"adapter.targets: {site.path} is held in a fused weight, to which bitfit cannot add a bias; "
                    "name other linears, or set adapter.add_bias to false",
                    key="adapter.targets",
                )
        return Built({site.path: AddedBias(site, self) for site in without}, {})

    def trains(self, parameter: str) -> bool:
        return parameter.endswith(".bias")


class AddedBias(Adapter):
    """A new bias for a linear that has none; dW = 0."""

    def __init__(self, site: Site, method: BitFit) -> None:
        super().__init__(site, method)
        self.added_bias = zeros(site.out_features)

    def forward(self, x: Tensor, weight: Tensor, counts: Counts | None = None) -> Tensor:
        return self.added_bias.to(x.dtype).expand(*x.shape[:-1], -1)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        return torch.zeros(self.site.shape, device=self.added_bias.device)

    def delta_bias(self) -> Tensor:
        return self.added_bias

    @property
    def effective_rank(self) -> int:
        return 0
