"""The fast path for any training loop: factors are packed at the start of each forward pass of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .shared_input import pack
from .state import POOLS, adapters, groups


class PackedForward:
    """Packs the factors of an adapted model when its forward begins, as part of the autograd graph, so that
    ``loss.backward()`` leaves the gradients in the parameters, ready for clipping and the optimizer step.

    Without gradients, as in generation, factors are packed again only when a parameter has changed. Where parameters
    are partitioned (FSDP, ZeRO-3) or the model is compiled, the adapters' own forward is used.
    """

    def __init__(self, model: nn.Module) -> None:
        self.groups = groups(model)
        pools = model.get_submodule(POOLS) if hasattr(model, POOLS) else nn.Module()
        self._trained = [*adapters(model).values(), pools]
        self.open = False
        """Whether a forward pass of the model is under way."""
        self._packed_at: tuple[Any, ...] | None = None
        for group in self.groups:
            group.usable = self._usable
        self._hooks = (
            model.register_forward_pre_hook(lambda module, args: self._begin()),
            model.register_forward_hook(lambda module, args, output: self._end(), always_call=True),
        )

    def remove(self) -> None:
        """Let the model compute with the adapters' own forward again."""
        for hook in self._hooks:
            hook.remove()
        for group in self.groups:
            group.packed, group.usable = None, None

    def _usable(self) -> bool:
        """Whether packed factors may be used: inside a forward pass, or when a backward pass recomputes a layer. A part
        of the model that is called by itself must not see factors from before the last optimizer step."""
        return self.open or torch._C._current_graph_task_id() != -1

    def _begin(self) -> None:
        if torch.compiler.is_compiling():
            return
        parameters = self._parameters()
        if any(type(p) is not nn.Parameter or hasattr(p, "ds_id") for p in parameters):
            for group in self.groups:
                group.packed = None
            return
        self.open = True
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        values = None if trains else tuple((p.data_ptr(), p._version) for p in parameters)
        if values is not None and values == self._packed_at:
            return
        for buffer in pack(self.groups):
            if trains:
                buffer.join()
        self._packed_at = values

    def _end(self) -> None:
        self.open = False

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for module in self._trained for parameter in module.parameters()]
