"""Biases that the base does not have, and the switches of its config that make room for them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .source import Source

SWITCHES = ({"attention_bias": True}, {"mlp_bias": True}, {"attention_bias": True, "mlp_bias": True})
"""Sets of config switches to try, the smallest first. Llama and related architectures have both switches."""


@dataclass(frozen=True)
class NewBiases:
    """Parameters that the merged model has and the base does not, and the config switches that create them."""

    tensors: dict[str, Tensor]
    """Values in fp32, by parameter name. Zeros where a switch creates a bias that was not trained."""
    switches: Mapping[str, bool]
    """Values of the config switches, by name. Empty when no bias is added."""


@torch.no_grad()
def new_biases(source: Source) -> NewBiases:
    """Return the biases that adapters add to linears without a bias.

    Raises:
        UserError: the architecture has no place for one of these biases.
    """
    wanted = {}
    for site in source.sites:
        delta = source.adapters[site.path].delta_bias()
        if delta is not None and not site.bias:
            wanted[f"{site.path}.bias"] = delta.detach().float()
    if not wanted:
        return NewBiases({}, {})
    present = dict(source.model.named_parameters())
    left = set(wanted)
    for switches in SWITCHES:
        shapes = {name: p.shape for name, p in _parameters(source, switches).items() if name not in present}
        if wanted.keys() <= shapes.keys() and all(name.endswith(".bias") for name in shapes):
            return NewBiases({n: wanted.get(n, torch.zeros(shape)) for n, shape in shapes.items()}, switches)
        left = min(left, wanted.keys() - shapes.keys(), key=len)
    raise UserError(
        f"{type(source.model).__name__} has no place for the bias {min(left)} (no switch in its config adds one): "
        "the adapter cannot be merged; the model can only be trained and evaluated with the adapter attached"
    )


def _parameters(source: Source, switches: Mapping[str, bool]) -> Mapping[str, Tensor]:
    """Return the parameters of the architecture with these switches, on the meta device; {} if its config does not
    have one of the switches."""
    config = copy.deepcopy(source.model.config)
    if not all(hasattr(config, name) for name in switches):
        return {}
    for name, value in switches.items():
        setattr(config, name, value)
    with torch.device("meta"):
        return dict(type(source.model)(config).named_parameters())
