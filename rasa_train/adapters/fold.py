"""Fold an update into the weight it belongs to, in memory."""

from __future__ import annotations

import torch
from torch import nn

from ..models.classifier import release_head
from ..models.words import release
from .contract import Adapter
from .experts import AdaptedExperts
from .inserted import remove_inserted
from .linear import AdaptedLinear
from .site import Site
from .state import POOLS, adapters


@torch.no_grad()
def fold(site: Site, adapter: Adapter, parameters: dict[str, nn.Parameter]) -> None:
    """Set W <- round(W + dW), computed in fp32, and update the bias in the same way.

    Args:
        parameters: parameters of the model, by name. The site's weight and bias are changed in place.
    """
    held = site.place(parameters[site.weight])
    W = site.view(parameters[site.weight]).float()
    held.copy_((W + adapter.delta(W if adapter.needs_weight else None)).reshape(held.shape))
    if site.bias and (bias := adapter.delta_bias()) is not None:
        parameters[f"{site.path}.bias"].add_(bias)


def fold_all(model: nn.Module) -> None:
    """Fold every adapter of a model into its weights, and put back the modules that the adapters replaced."""
    parameters = dict(model.named_parameters())
    for adapter in adapters(model).values():
        fold(adapter.site, adapter, parameters)
    detach(model, new_words=True)


def detach(model: nn.Module, *, new_words: bool = False) -> None:
    """Remove the adapters of a model, and put back the modules that they replaced. The weights stay as they are;
    ``new_words``: with the rows of new words in them."""
    for path, module in list(model.named_modules()):
        if isinstance(module, AdaptedLinear | AdaptedExperts):
            model.set_submodule(path, module.unwrapped())
    remove_inserted(model)
    release_head(model)
    release(model, keep=new_words)
    if hasattr(model, POOLS):
        delattr(model, POOLS)
