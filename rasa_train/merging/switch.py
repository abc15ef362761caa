"""Switch a model in memory from one merged adapter to another: W + BA becomes W + B'A'."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..adapters.fold import fold
from ..errors import UserError
from .bias import new_biases
from .options import Base
from .source import Adapters, Source, open_source

SWITCHED = "rasa_train_switched"
"""Name of the attribute of a switched model that holds what its base had."""


@dataclass
class _Kept:
    """What the base has in place of what an adapter has changed."""

    values: dict[str, Tensor] = field(default_factory=dict)
    """Values of the changed parameters, by name, on the CPU."""


@torch.no_grad()
def switch(model: nn.Module, to: Adapters | None, *, base: str | Base | None = None) -> nn.Module:
    """Fold an adapter into the weights of a model, in place of the adapter of the last switch.

    The result is exact: the weights are, bit for bit, those of a fresh merge, round(W + B'A') in their dtype, however
    many switches came before. The first switch that changes a weight keeps W itself on the CPU, and each switch starts
    from there; to subtract BA and add B'A' would leave the rounding errors of both behind. So a switch takes time and
    memory for the adapted weights, and none for the rest of the model; a forward pass costs what that of the base does.

    Args:
        model: an ordinary model of transformers, without adapters attached, as it was loaded or as the last switch left
            it.
        to: an adapter or run directory, of any method that can be merged and of any format that ``load_adapter`` reads;
            or several as (directory, weight), whose updates are summed; None for the base.
        base: the model's base. Default: where the model was loaded from.
    Returns:
        The model itself, changed in place.
    Raises:
        UserError: the adapter cannot be read, was trained on another base, or does not fit. The model is unchanged.
    """
    if getattr(model, "rasa_train_adapted", None) is not None:
        raise UserError("switch: the model has adapters attached; call merge(model), or load the base again")
    parameters = dict(model.named_parameters())
    kept: _Kept = getattr(model, SWITCHED, None) or _Kept()
    if to is None:
        _restore(kept, parameters)
        return model
    loaded_from = getattr(getattr(model, "config", None), "name_or_path", None)
    source = open_source(to, base or loaded_from or None, weights=False)
    changed = _changed(source, parameters)
    _restore(kept, parameters)
    kept.values = {name: parameters[name].detach().to("cpu", copy=True) for name in changed}
    setattr(model, SWITCHED, kept)
    for name, value in source.replaced.items():
        parameters[name].copy_(value)
    for site in source.sites:
        fold(site, source.adapters[site.path].to(parameters[site.weight].device), parameters)
    return model


def _restore(kept: _Kept, parameters: dict[str, nn.Parameter]) -> None:
    for name, value in kept.values.items():
        parameters[name].copy_(value)
    kept.values = {}


def _changed(source: Source, parameters: dict[str, nn.Parameter]) -> set[str]:
    """Return the names of the parameters that the adapter changes.

    Raises:
        UserError: one of them is not in the model, is of another shape, or would have to be added.
    """
    if source.words:
        raise UserError(
            f"switch: {source.origins[0]} adds words to the vocabulary or trains the embeddings whole; merge it with "
            "rasa-merge, and load the result"
        )
    names = {site.weight for site in source.sites} | source.replaced.keys()
    for site in source.sites:
        if site.bias and source.adapters[site.path].delta_bias() is not None:
            names.add(f"{site.path}.bias")
    if source.untied or new_biases(source).tensors:
        raise UserError(
            f"switch: {source.origins[0]} adds parameters that its base does not have; merge it with rasa-merge, and "
            "load the result"
        )
    shapes = {name: tuple(p.shape) for name, p in source.model.named_parameters()}
    for name in names:
        found = tuple(parameters[name].shape) if name in parameters else "none"
        if found != shapes[name]:
            raise UserError(
                f"switch: {source.origins[0]} does not fit this model: it needs {name} of shape {shapes[name]}, and "
                f"the model has {found}"
            )
    return names
