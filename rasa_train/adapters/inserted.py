"""Modules that a method puts into a frozen model and that are no updates of weights, such as bottleneck adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

Hook = Callable[[Any, Any, Any], Any]
"""Function of a module, its arguments and its output that returns the output to use instead (a forward hook of torch).
It finds the inserted module as ``module.adapter``."""


class Inserted(nn.Module):
    """A trained module that follows a module of the base."""

    handle: RemovableHandle


def insert_after(module: nn.Module, inserted: Inserted, hook: Hook) -> None:
    """Make ``inserted`` the submodule ``adapter`` of a module of the base, and let ``hook`` change what that module
    returns. The names of the base's own tensors stay the same."""
    module.add_module("adapter", inserted)
    inserted.handle = module.register_forward_hook(hook)


def remove_inserted(model: nn.Module) -> None:
    """Undo ``insert_after`` everywhere in a model."""
    for module in list(model.modules()):
        if isinstance(inserted := module._modules.get("adapter"), Inserted):
            inserted.handle.remove()
            del module._modules["adapter"]
