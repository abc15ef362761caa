"""PiSSA: LoRA that starts in the principal singular directions of W (Meng et al. 2024, arXiv 2404.02948).

    W = U S V^T;  B0 = U_r diag(sqrt(S_r / s)),  A0 = diag(sqrt(S_r / s)) V_r^T
    dW = s (B A - B0 A0),  s = alpha / r

As in OLoRA the frozen W does not change, and A0 and B0 are stored. Dropout acts on the whole dW: in the original
form, with W - s B0 A0 as the base, it would remove principal directions of W at random from the first step on.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from ..adapters.contract import Built, Method
from ..adapters.site import Site
from .olora import StartedAdapter, check_rank


class PiSSA(Method):
    """Principal singular values and vectors adaptation: A (r x in) and B (out x r) are trained in every site."""

    method: Literal["pissa"] = "pissa"
    r: PositiveInt = 8
    """Rank of A and of B (the paper: 128). The update itself has rank up to 2r."""
    # pydantic 2.11 asks for the default even where it refused r
    alpha: PositiveFloat = Field(default_factory=lambda data: float(data.get("r", 1)))
    """The update is scaled by alpha / r. Default: r, so that the scale is 1 (the authors' scripts)."""
    niter: NonNegativeInt | None = None
    """Number of subspace iterations of a randomized SVD, which is much faster on large weights (16 is accurate).
    Default: the exact SVD."""

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def build(self, sites: list[Site]) -> Built:
        check_rank(sites, self.r)
        return Built({s.path: StartedAdapter(s, self, self.r, self.scale, self.split) for s in sites}, {})

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return B0 (*lead, out, r) and A0 (*lead, r, in) of W."""
        if self.niter is None:
            U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        else:
            U, S, V = torch.svd_lowrank(weight, q=self.r, niter=self.niter)
            Vh = V.mT
        root = (S[..., : self.r] / self.scale).sqrt()
        return U[..., : self.r] * root.unsqueeze(-2), root.unsqueeze(-1) * Vh[..., : self.r, :]
