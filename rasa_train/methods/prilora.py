"""PriLoRA: ranks that grow with depth, and a pruned A (Benedek & Wolf, EACL Findings 2024, arXiv 2401.11316).

    dW_l = (alpha / r_l) B A,    r_l = round(r / 2 + r l / L),  l = 1..L (half to even)

These ranks give exactly the parameter counts of the RaSA paper. A is pruned while it is trained: the importance of
entry (i, j) is |A_ij| n_j, where n_j is a running average of the L2 norm of input feature j over the tokens of a step;
in each row of A the least important entries are set to zero, and they may grow again until the next pruning. The
authors' code is not public: how often and how much is pruned, the average and the scale are our choices.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, distributed

from ..adapters.contract import Adapter, Built, Counts, FactorAdapter, Method, kaiming_uniform, zeros
from ..adapters.site import Site
from ..kernels.grouped import Rows
from ..kernels.low_rank import Factors


class PriLoRA(Method):
    """Pruned and rank-increasing low-rank adaptation: A (r_l x in) and B (out x r_l) are trained in every site."""

    method: Literal["prilora"] = "prilora"
    r: PositiveInt = 8
    """Approximate mean rank of the layers: ranks grow from r / 2 in the first layer to 3 r / 2 in the last."""
    alpha: PositiveFloat = 32.0
    """The update of layer l is scaled by alpha / r_l. The default (LoRA's value) and the division by r_l are our
    choices."""
    prune_every: PositiveInt = 40
    """Number of optimizer steps from one pruning to the next; the last step prunes too. The default is our choice."""
    prune_ratio: float = Field(0.5, ge=0.0, lt=1.0)
    """Share of each row of A that a pruning sets to zero. The default is our choice."""
    ema_beta: float = Field(0.9, ge=0.0, lt=1.0)
    """Decay per step of the running average of the input norms. The default is our choice."""

    def rank(self, l: int, L: int) -> int:
        """Return the rank of layer ``l`` of 1..``L``."""
        return round(Fraction(self.r, 2) + Fraction(self.r * l, L))

    def build(self, sites: list[Site]) -> Built:
        layers = sorted({site.layer for site in sites})
        ranks = {layer: self.rank(l, len(layers)) for l, layer in enumerate(layers, start=1)}
        return Built({site.path: PriLoRAAdapter(site, self, ranks[site.layer]) for site in sites}, {})

    @torch.no_grad()
    def after_step(self, adapters: Mapping[str, Adapter], step: int, total_steps: int) -> None:
        own = [adapter for adapter in adapters.values() if isinstance(adapter, PriLoRAAdapter)]
        squares = [adapter.take_squares() for adapter in own]
        if distributed.is_available() and distributed.is_initialized():
            # Each worker has seen its own share of the batch; all must prune the same entries.
            together = torch.cat([s.flatten() for s in squares])
            distributed.all_reduce(together)
            parts = torch.split(together, [s.numel() for s in squares])  # type: ignore[no-untyped-call]
            squares = [part.view_as(s) for part, s in zip(parts, squares, strict=True)]
        prunes = step % self.prune_every == 0 or step == total_steps
        for adapter, square in zip(own, squares, strict=True):
            adapter.norms.mul_(self.ema_beta).add_(square.sqrt(), alpha=1.0 - self.ema_beta)
            if prunes:
                adapter.prune(self.prune_ratio)


class PriLoRAAdapter(FactorAdapter):
    stacks = True
    rule_state = ("norms",)
    watches = True

    def __init__(self, site: Site, method: PriLoRA, r: int) -> None:
        super().__init__(site, method)
        self.scale = method.alpha / r
        self.A = kaiming_uniform(*site.lead, r, site.in_features)
        self.B = zeros(*site.lead, site.out_features, r)
        self.norms: Tensor
        self.register_buffer("norms", torch.zeros(*site.lead, site.in_features), persistent=False)
        # Sums of this step on this worker. Not a buffer, which DDP may overwrite with the first worker's.
        self.squares: Tensor | None = None

    def factors(self) -> Factors:
        return Factors(self.B, self.A.new_full(self.A.shape[:-1], self.scale), self.A)

    @torch.no_grad()
    def watch(self, x: Tensor, counts: Counts | None = None) -> None:
        """Add the squares of the features of x (..., in_features), padding included. Under activation checkpointing
        this runs twice, which is harmless: all norms of a site grow by the same factor, and only entries of one row are
        compared."""
        if self.squares is None:
            self.squares = torch.zeros_like(self.norms)
        wide = torch.promote_types(x.dtype, torch.float32)
        if counts is None:
            self.squares += torch.linalg.vector_norm(x, dim=tuple(range(x.dim() - 1)), dtype=wide).square()
        else:  # without atomics, so that the same entries are pruned in each run
            starts = F.pad(Rows.of(counts, x.device).ends, (1, 0)).long()
            self.squares += torch.segment_reduce(x.to(wide).square(), "sum", offsets=starts, unsafe=True)

    def take_squares(self) -> Tensor:
        """Return the sums of squares (*lead, in_features) since the last call, and reset them."""
        squares, self.squares = self.squares, None
        return torch.zeros_like(self.norms) if squares is None else squares

    def prune(self, ratio: float) -> None:
        importance = self.A.abs() * self.norms.unsqueeze(-2)
        lowest = importance.topk(int(ratio * self.site.in_features), largest=False, sorted=False).indices
        self.A.scatter_(-1, lowest, 0.0)
