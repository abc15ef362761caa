"""A frozen linear with an adapter beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ..kernels.quantized_weight import Narrow, is_bitsandbytes
from .contract import Adapter
from .shared_input import Group, plain, watched


class AdaptedLinear(nn.Module):
    """A frozen linear plus an adapter: y = W x + b + dW drop(x).

    The module takes over the tensors of the linear that it replaces, so their names in the model do not change.
    """

    group: Group
    weight: nn.Parameter
    bias: nn.Parameter | None
    base: nn.Module
    """The linear that this module replaces."""

    def __init__(self, base: nn.Linear | Conv1D, adapter: Adapter) -> None:
        super().__init__()
        self.transposed = adapter.site.transposed
        self.in_features, self.out_features = adapter.site.in_features, adapter.site.out_features
        self.narrow: Narrow | None = None
        """W in fewer bits, or None. If W is held here, ``weight`` is empty."""
        self.own_forward = has_own_forward(base)
        """Whether ``base`` has a way of its own to compute W x + b and is therefore called, as a quantised linear."""
        # Both modules have the same tables of tensors, so a tensor that is replaced in one is replaced in both.
        self._parameters, self._buffers = base._parameters, base._buffers
        self._modules.update(base._modules)
        object.__setattr__(self, "base", base)  # not registered: this module holds its tensors
        self.adapter = adapter
        self.join(Group([self]), 0)

    def join(self, group: Group, index: int) -> None:
        """Make this linear member ``index`` of ``group``, which then computes it."""
        object.__setattr__(self, "group", group)  # not a submodule: its members are elsewhere in the model
        self.index = index

    def unwrapped(self) -> nn.Module:
        """Return the linear that this module replaced, with the current weight and bias."""
        return self.base

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and (self.group.packed is None or self.group.usable is not None):
            watched(self.adapter, x)
            return plain(self, x, self.adapter.drop(x))
        return self.group(self.index, x)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a linear is of a class that computes its result in another way than torch's linear and GPT-2's."""
    return type(module).forward not in (nn.Linear.forward, Conv1D.forward)


def maps_vectors(module: nn.Linear | Conv1D) -> bool:
    """Whether a linear maps vectors (..., in) to vectors (..., out), so that an adapter can be added to it. Some
    classes derived from ``nn.Linear`` do not: routers, and several linears in one."""
    if not has_own_forward(module) or is_bitsandbytes(module):
        return True
    assert isinstance(module, nn.Linear)
    tensors = {"weight": torch.empty(module.out_features, module.in_features, device="meta")}
    if module.bias is not None:
        tensors["bias"] = torch.empty(module.out_features, device="meta")
    try:
        y = functional_call(module, tensors, (torch.empty(2, 3, module.in_features, device="meta"),))
    except Exception:  # whatever it is, it does not take a vector
        return False
    return isinstance(y, Tensor) and y.shape == (2, 3, module.out_features)
