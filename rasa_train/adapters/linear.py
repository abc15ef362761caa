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

    The module takes over ``weight`` and ``bias`` of the linear that it replaces, so their names in the model do not
    change.
    """

    group: Group
    base: nn.Module
    """The linear that this module replaces."""

    def __init__(self, base: nn.Linear | Conv1D, adapter: Adapter) -> None:
        super().__init__()
        self.weight, self.bias, self.adapter = base.weight, base.bias, adapter
        self.transposed = adapter.site.transposed
        self.in_features, self.out_features = adapter.site.in_features, adapter.site.out_features
        self.narrow: Narrow | None = None
        """W in fewer bits, or None. If W is held here, ``weight`` is empty."""
        object.__setattr__(self, "base", base)  # not registered: this module holds its tensors
        self.join(Group([self]), 0)

    def join(self, group: Group, index: int) -> None:
        """Make this linear member ``index`` of ``group``, which then computes it."""
        object.__setattr__(self, "group", group)  # not a submodule: its members are elsewhere in the model
        self.index = index

    def unwrapped(self) -> nn.Module:
        """Return the linear that this module replaced, with the current weight and bias."""
        self.base.weight, self.base.bias = self.weight, self.bias
        return self.base

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # a graph cannot hold the results that a group keeps between calls
            watched(self.adapter, x)
            return plain(self, x, self.adapter.drop(x))
        return self.group(self.index, x)
