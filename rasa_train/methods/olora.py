"""OLoRA: LoRA that starts in an orthonormal basis of W (Büyükakyüz 2024, arXiv 2406.01775).

    W = Q R (reduced QR);  B0 = Q[:, :r],  A0 = R[:r, :];  dW = s (B A - B0 A0),  s = alpha / r

A and B start as A0 and B0. The frozen W does not change: A0 and B0 are stored with the adapter instead of being
subtracted from W, so the adapter is complete without a changed base, and no rounding changes a bfloat16 W.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from ..adapters.contract import Built, FactorAdapter, Method, zeros
from ..adapters.site import Site
from ..errors import UserError
from ..kernels.low_rank import Factors


class OLoRA(Method):
    """Orthonormal low-rank adaptation: A (r x in) and B (out x r) are trained in every site."""

    method: Literal["olora"] = "olora"
    r: PositiveInt = 8
    """Rank of A and of B. The update itself has rank up to 2r, since A0 and B0 are part of it."""
    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / r. The default is our choice, LoRA's value: the RaSA paper gives none for
    OLoRA."""

    def build(self, sites: list[Site]) -> Built:
        check_rank(sites, self.r)
        scale = self.alpha / self.r
        return Built({site.path: StartedAdapter(site, self, self.r, scale, self.split) for site in sites}, {})

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return B0 (*lead, out, r) and A0 (*lead, r, in) of W."""
        # LAPACK and cuSOLVER differ in signs, so the result is computed once and saved, not recomputed on loading.
        Q, R = torch.linalg.qr(weight)
        return Q[..., : self.r], R[..., : self.r, :]


class StartedAdapter(FactorAdapter):
    """An adapter with dW = s (B A - B0 A0), where A and B start as the A0 and B0 that ``split`` computes from W."""

    needs_weight = True
    stacks = True

    def __init__(
        self,
        site: Site,
        method: Method,
        r: int,
        scale: float,
        split: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__(site, method)
        self.scale, self.split = scale, split
        self.A = zeros(*site.lead, r, site.in_features)
        self.B = zeros(*site.lead, site.out_features, r)
        self.A0: Tensor
        self.B0: Tensor
        self.register_buffer("A0", torch.zeros_like(self.A, requires_grad=False))
        self.register_buffer("B0", torch.zeros_like(self.B, requires_grad=False))

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        B0, A0 = self.split(weight)
        for place in (self.A, self.A0):
            place.copy_(A0)
        for place in (self.B, self.B0):
            place.copy_(B0)

    def factors(self) -> Factors:
        # B A - B0 A0 = (B - B0) A + B0 (A - A0): both terms are exactly zero at the start, with or without dropout.
        # The differences are computed in fp32, whereas B A x - B0 A0 x would lose digits in the dtype of x.
        B = torch.cat([self.B - self.B0, self.B0], -1)
        A = torch.cat([self.A, self.A - self.A0], -2)
        return Factors(B, A.new_full(A.shape[:-1], self.scale), A)


def check_rank(sites: list[Site], r: int) -> None:
    """Raise ``UserError`` if the W of any site has fewer than ``r`` directions to start from."""
    smallest = min(sites, key=lambda site: min(site.shape))
    most = min(smallest.shape)
    if r > most:
        raise UserError(
            f"adapter.r must be at most {most}, the smaller side of {smallest.path}, got {r}",
            key="adapter.r",
        )
