"""Biases that the base does not have: which switches of its config make room for them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .source import Source

SWITCHES = ({"attention_bias": True}, {"mlp_bias": True}, {"attention_bias": True, "mlp_bias": True})
"""What is tried, the least first. Llama and its kin have both."""


@dataclass(frozen=True)
class NewBiases:
    """Parameters that the merged model has beyond the base's, and the config that gives it them."""

    tensors: dict[str, Tensor]
    """fp32, by parameter name. Zeros where a switch makes a bias that nobody trained."""
    switches: Mapping[str, bool]


@torch.no_grad()
def new_biases(source: Source) -> NewBiases:
    """The biases of adapters whose linear has none.

    Raises:
        UserError: the architecture has no place for one of them.
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
        "it cannot be merged, only trained and evaluated with the adapter"
    )


def _parameters(source: Source, switches: Mapping[str, bool]) -> Mapping[str, Tensor]:
    """Parameters of the architecture with these switches, on the meta device; none if its config lacks one."""
    config = copy.deepcopy(source.model.config)
    if not all(hasattr(config, name) for name in switches):
        return {}
    for name, value in switches.items():
        setattr(config, name, value)
    with torch.device("meta"):
        return dict(type(source.model)(config).named_parameters())
