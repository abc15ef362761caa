"""The base class of adapters with a block-diagonal update, which ``kernels.block_diagonal`` computes."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from ..kernels.block_diagonal import tile
from .contract import Adapter


class BlockAdapter(Adapter):
    """An adapter whose dW is block diagonal. A subclass defines the blocks; everything else follows from them."""

    @abstractmethod
    def blocks(self) -> Tensor:
        """Return the blocks T (*lead, n, q, q), fp32, differentiable with respect to the trained parameters."""

    def forward(self, x: Tensor, weight: Tensor, counts: list[int] | None = None) -> Tensor:
        T = self.blocks().to(x.dtype)
        if counts is None:
            return self._update(x, T)
        parts = zip(torch.split(x, counts), T.unbind(), strict=True)
        return torch.cat([self._update(rows, own) for rows, own in parts])

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

    def _update(self, x: Tensor, T: Tensor) -> Tensor:
        n, q = T.shape[:2]
        parts = tile(x, n * q).reshape(-1, n, q).transpose(0, 1)
        z = torch.bmm(parts, T.mT).transpose(0, 1).reshape(*x.shape[:-1], n * q)
        return tile(z, self.site.out_features)
