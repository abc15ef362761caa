"""AdaLoRA: triplets of an SVD, allocated to the sites that need them (Zhang et al., ICLR 2023, arXiv 2303.10512).

    dW = alpha / (init_r + 1e-5) * P diag(Lambda) Q      P (out x init_r), Lambda (init_r), Q (init_r x in)

Each site starts with ``init_r`` triplets. Between the steps t_i and T - t_f (T: all steps) a budget over all
sites falls from init_r to r per site, and the Lambda of the least important triplets is set to zero; a Lambda
that was set to zero can grow again until the next masking. At T - t_f the choice is final. An additional loss
keeps P and Q nearly orthonormal. The steps and gradients that count are those of PEFT's allocator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from ..adapters.contract import Adapter, Built, FactorAdapter, Method, zeros
from ..adapters.site import Site
from ..errors import UserError
from ..kernels.low_rank import Factors

TRIPLET = ("P", "Lambda", "Q")


class AdaLoRA(Method):
    """Adaptive budget allocation: P, Lambda and Q are trained in every site."""

    method: Literal["adalora"] = "adalora"
    r: PositiveInt = 8
    """Average number of triplets per site at the end."""
    # pydantic 2.11 asks for the default even where it refused r
    init_r: PositiveInt = Field(default_factory=lambda data: math.ceil(1.5 * int(data.get("r", 1))))
    """Number of triplets per site at the start, at least r. Default: 1.5 r (the paper's recommendation)."""
    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / init_r, however many triplets are left. The default is our choice: LoRA's
    value."""
    gamma: NonNegativeFloat = 0.1
    """Weight of the orthogonality loss (the authors' scripts: 0.1, 0.3 for small tasks; PEFT: 0.5)."""
    beta1: float = Field(0.85, gt=0.0, lt=1.0)
    """Decay per step of the average sensitivity (the authors' scripts)."""
    beta2: float = Field(0.85, gt=0.0, lt=1.0)
    """Decay per step of the average deviation of the sensitivity (the authors' scripts)."""
    tinit_ratio: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of the optimizer steps before the budget falls (t_i / T). The default is our choice; the authors' runs:
    0.08-0.15."""
    tfinal_ratio: float = Field(0.4, ge=0.0, lt=1.0)
    """Share of the optimizer steps after the final choice (t_f / T). The default is our choice; the authors' runs:
    0.3-0.6."""
    mask_every: PositiveInt = 10
    """Number of optimizer steps between maskings while the budget falls (deltaT). The default is our choice; the
    authors' runs: 1-100."""

    @model_validator(mode="after")
    def _in_range(self) -> AdaLoRA:
        if self.init_r < self.r:
            message = "must be at least r={r}, got {got}: the budget falls from init_r to r"
            raise PydanticCustomError("range", message, {"field": "init_r", "r": self.r, "got": self.init_r})
        if self.tinit_ratio + self.tfinal_ratio >= 1.0:
            message = "must be below 1 - tinit_ratio={rest}, got {got}: the budget falls in the steps between the two"
            context = {"field": "tfinal_ratio", "rest": 1.0 - self.tinit_ratio, "got": self.tfinal_ratio}
            raise PydanticCustomError("range", message, context)
        return self

    def build(self, sites: list[Site]) -> Built:
        return Built({site.path: AdaLoRAAdapter(site, self) for site in sites}, {})

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor | None:
        """Return gamma times the mean of |P^T P - I| and |Q Q^T - I| (Frobenius norms) over all P and Q."""
        if not self.gamma:
            return None
        distances = [_from_orthonormal(rows) for a in _triplets(adapters) for rows in (a.P.mT, a.Q)]
        return self.gamma * torch.cat(distances).mean()

    @torch.no_grad()
    def after_step(self, adapters: Mapping[str, Adapter], step: int, total_steps: int) -> None:
        sites = _triplets(adapters)
        begin = round(self.tinit_ratio * total_steps)
        end = total_steps - round(self.tfinal_ratio * total_steps)
        if step < end:
            for adapter in sites:
                adapter.measure(self.beta1, self.beta2)
        masking = step == end or (begin < step < end and step % self.mask_every == 0)
        if masking:
            self._choose(sites, 0.0 if step == end else 1.0 - (step - begin) / (end - begin))
        if masking or step > end:
            for adapter in sites:
                adapter.Lambda.masked_fill_(~adapter.kept, 0.0)

    def _choose(self, sites: list[AdaLoRAAdapter], time_left: float) -> None:
        """Keep the triplets with the highest scores among all sites. ``time_left``: 1 at t_i, 0 at T - t_f."""
        scores = [adapter.score() for adapter in sites]
        everything = torch.cat([score.flatten() for score in scores])
        start = everything.numel()
        target = start // self.init_r * self.r
        dropped = start - int((start - target) * time_left**3 + target)
        threshold = everything.kthvalue(dropped).values if dropped else everything.new_tensor(-math.inf)
        for adapter, score in zip(sites, scores, strict=True):
            adapter.kept.copy_(score > threshold)


class AdaLoRAAdapter(FactorAdapter):
    stacks = True
    # Averages of all triplets, and which triplets are kept: a resumed run needs them, a finished adapter does not.
    rule_state = ("kept", *(f"{what}_{name}" for what in ("sensitivity", "deviation") for name in TRIPLET))

    def __init__(self, site: Site, method: AdaLoRA) -> None:
        super().__init__(site, method)
        self.scale = method.alpha / (method.init_r + 1e-5)
        self.P = _normal(*site.lead, site.out_features, method.init_r)
        self.Lambda = zeros(*site.lead, method.init_r)
        self.Q = _normal(*site.lead, method.init_r, site.in_features)
        self.kept: Tensor
        self.register_buffer("kept", torch.ones(self.Lambda.shape, dtype=torch.bool), persistent=False)
        for name in self.rule_state[1:]:
            of = self.get_parameter(name.rpartition("_")[2])
            self.register_buffer(name, torch.zeros_like(of, requires_grad=False), persistent=False)

    def factors(self) -> Factors:
        return Factors(self.P, self.scale * self.Lambda, self.Q)

    def measure(self, beta1: float, beta2: float) -> None:
        """Update the average sensitivity |w * gradient| of every entry, and the average deviation of the sensitivity
        from that average (section 3.2)."""
        for name in TRIPLET:
            w = self.get_parameter(name)
            if w.grad is None:
                raise UserError(
                    "distributed.strategy must be ddp: adalora needs all gradients on every worker",
                    key="distributed.strategy",
                )
            now = (w * w.grad).abs_()
            sensitivity = self.get_buffer(f"sensitivity_{name}")
            deviation = self.get_buffer(f"deviation_{name}")
            sensitivity.mul_(beta1).add_(now, alpha=1.0 - beta1)
            deviation.mul_(beta2).add_(now.sub_(sensitivity).abs_(), alpha=1.0 - beta2)

    def score(self) -> Tensor:
        """Return the importance of each triplet (*lead, init_r): the score of its Lambda plus the mean scores of its
        entries in P and in Q."""
        scores = (self.get_buffer(f"sensitivity_{n}") * self.get_buffer(f"deviation_{n}") for n in TRIPLET)
        P, Lambda, Q = scores
        return Lambda + P.mean(-2) + Q.mean(-1)


def _triplets(adapters: Mapping[str, Adapter]) -> list[AdaLoRAAdapter]:
    return [adapter for adapter in adapters.values() if isinstance(adapter, AdaLoRAAdapter)]


def _normal(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=torch.float32).normal_(std=0.02))


def _from_orthonormal(rows: Tensor) -> Tensor:
    """Return |rows rows^T - I| of each matrix, (matrices,)."""
    gram = rows @ rows.mT
    distance: Tensor = torch.linalg.matrix_norm(gram - torch.eye(gram.shape[-1], device=gram.device))
    return distance.reshape(-1)
