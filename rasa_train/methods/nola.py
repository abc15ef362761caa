"""NOLA: LoRA factors as combinations of random factors (Koohpayegani et al., ICLR 2024, arXiv 2310.02556).

    dW = (alpha / r) B A,    A = A_0 + sum_j c_j A_j,    B = sum_j e_j B_j,    j = 1 .. n_basis

    A_j (r x in), B_j (out x r)   frozen, U(-1, 1) / sqrt(n_basis)
    A_0 (r x in)                  frozen, LoRA's random start; there is no B_0, so that dW starts at zero
    c, e (n_basis)                trained, start at 0

Only the coefficients are trained and stored. A basis is n_basis times as large as the factor that is made of it,
so it is never held in memory: it is drawn piece by piece from its own seed, once in forward and once more in backward,
on the CPU, so that it is the same on every device. For billions of weights this takes minutes per step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..adapters.contract import Built, FactorAdapter, Method, zeros
from ..adapters.site import Site
from ..kernels.low_rank import Factors

PIECE = 1 << 24
"""Number of values of a basis that exist at one time (64 MiB)."""


class NOLA(Method):
    """LoRA in the span of random matrices: 2 n_basis parameters per site, whatever r and the size of the site are."""

    method: Literal["nola"] = "nola"
    r: PositiveInt = 16
    """Rank of the update (the official Llama example)."""
    alpha: PositiveFloat = 4.0
    """The update is scaled by alpha / r (the official Llama example)."""
    n_basis: PositiveInt = 512
    """Number of random matrices per factor (the official Llama example)."""
    basis_seed: NonNegativeInt = 0
    """Seed of all bases (our addition). The seed, the coefficients and the order of the sites define the update."""

    def build(self, sites: list[Site]) -> Built:
        # The seeds of a site depend on its place in the list. torch's CPU generator reads 32 bits of a seed.
        generator = torch.Generator("cpu").manual_seed(self.basis_seed)
        seeds = torch.randint(2**32, (len(sites), 3), generator=generator, device="cpu").tolist()
        return Built({s.path: NOLAAdapter(s, self, own) for s, own in zip(sites, seeds, strict=True)}, {})


class NOLAAdapter(FactorAdapter):
    A_0: Tensor

    def __init__(self, site: Site, method: NOLA, seeds: list[int]) -> None:
        super().__init__(site, method)
        self.scale, self.seeds = method.alpha / method.r, seeds
        self.A_shape, self.B_shape = (method.r, site.in_features), (site.out_features, method.r)
        self.c, self.e = zeros(*site.lead, method.n_basis), zeros(*site.lead, method.n_basis)
        start = torch.empty(self.A_shape, dtype=torch.float32)
        if not start.is_meta:
            start.copy_(_uniform(*self.A_shape, generator=torch.Generator("cpu").manual_seed(seeds[0])))
        self.register_buffer("A_0", start / math.sqrt(site.in_features), persistent=False)

    def factors(self) -> Factors:
        A = self.A_0 + _combine(self.c, self.seeds[1], self.A_shape)
        B = _combine(self.e, self.seeds[2], self.B_shape)
        return Factors(B, A.new_full(A.shape[:-1], self.scale), A)


def _combine(coefficients: Tensor, seed: int, shape: tuple[int, int]) -> Tensor:
    """Return sum_j c_j T_j over the basis of ``seed``: (*lead, n) coefficients -> (*lead, *shape)."""
    flat: Tensor = _Combination.apply(coefficients, seed, math.prod(shape))  # type: ignore[no-untyped-call]
    return flat.view(*flat.shape[:-1], *shape)


class _Combination(torch.autograd.Function):
    """The sum of ``_combine`` with flat T_j. It is linear in c, so backward needs only the T_j and draws them again."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, seed: int, size: int) -> Tensor:
        ctx.basis = (seed, coefficients.shape[-1], size, coefficients.device)
        combined = coefficients.new_zeros(*coefficients.shape[:-1], size)
        if combined.is_meta:
            return combined
        with torch.autocast(coefficients.device.type, enabled=False):
            for first, piece in _pieces(*ctx.basis):
                combined += coefficients[..., first : first + len(piece)] @ piece
        return combined

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return torch.cat([gradient @ piece.T for _, piece in _pieces(*ctx.basis)], -1), None, None


def _pieces(seed: int, n: int, size: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Yield pairs of j and the m matrices from T_j on as (m x size), on ``device``, from the first j to the last."""
    generator = torch.Generator("cpu").manual_seed(seed)
    step = max(1, PIECE // size)
    for first in range(0, n, step):
        piece = _uniform(min(step, n - first), size, generator=generator)
        yield first, piece.to(device).div_(math.sqrt(n))


def _uniform(*shape: int, generator: torch.Generator) -> Tensor:
    """Draw from U(-1, 1), fp32, on the CPU."""
    return torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-1.0, 1.0, generator=generator)
