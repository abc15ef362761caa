"""The base class of adapters with a block-diagonal update, which ``kernels.block_diagonal`` computes."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from ..kernels.block_diagonal import tile
from .contract import Adapter, Counts, linear


class BlockAdapter(Adapter):
    """An adapter whose dW is block diagonal. A subclass defines the blocks; everything else follows from them."""

    takes_rows = True

    @abstractmethod
    def blocks(self) -> Tensor:
        """Return the blocks T (*lead, n, q, q), fp32, differentiable with respect to the trained parameters."""

    def forward(self, x: Tensor, weight: Tensor, counts: Counts | None = None) -> Tensor:
        T = self.blocks().to(x.dtype)
        n, q = T.shape[-3:-1]
        parts = tile(x, n * q).reshape(-1, n, q)
        if counts is None:
            z = torch.bmm(parts.transpose(0, 1), T.mT).transpose(0, 1)
        else:
            z = torch.stack([linear(parts[:, g], T[:, g], counts) for g in range(n)], 1)
        return tile(z.reshape(*x.shape[:-1], n * q), self.site.out_features)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        T, (out, in_) = self.blocks().float(), self.site.shape
        n, q = T.shape[-3:-1]
        dW = T.new_zeros(*self.site.lead, n * q, in_)
        for g, block in enumerate(T.unbind(-3)):
            own = torch.arange(g * q, (g + 1) * q, device=dW.device)
            dW[..., g * q : (g + 1) * q, :].index_add_(-1, own % in_, block)
        return dW[..., torch.arange(out, device=dW.device) % (n * q), :]

    @property
    def effective_rank(self) -> int:
        return min(self.site.shape)
