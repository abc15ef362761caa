"""A frozen linear with an adapter beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..kernels.quantized_weight import Narrow
from .contract import Adapter
from .shared_input import Group, plain, watched


class AdaptedLinear(nn.Module):
    """A frozen linear plus an adapter: y = W x + b + dW drop(x).

    Takes over the layer's own ``weight`` and ``bias``, so their names in the model stay what they were.
    """

    group: Group
    base: nn.Module
    """The linear that was here before."""

    def __init__(self, base: nn.Linear | Conv1D, adapter: Adapter) -> None:
        super().__init__()
        self.weight, self.bias, self.adapter = base.weight, base.bias, adapter
        self.transposed = adapter.site.transposed
        self.in_features, self.out_features = adapter.site.in_features, adapter.site.out_features
        self.narrow: Narrow | None = None
        """W in fewer bits; then ``weight`` is empty."""
        object.__setattr__(self, "base", base)  # not registered: its tensors are this module's
        self.join(Group([self]), 0)

    def join(self, group: Group, index: int) -> None:
        """Be computed as member ``index`` of ``group``."""
        object.__setattr__(self, "group", group)  # no module of this one: its members are elsewhere in the model
        self.index = index

    def unwrapped(self) -> nn.Module:
        """Return the linear that was here before, with the weight and bias that are here now."""
        self.base.weight, self.base.bias = self.weight, self.bias
        return self.base

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # what a group remembers between calls has no place in a graph
            watched(self.adapter, x)
            return plain(self, x, self.adapter.drop(x))
        return self.group(self.index, x)
