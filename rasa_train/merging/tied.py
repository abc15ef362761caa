"""Tied parameters: one tensor of the model under several names, such as the embedding and the LM head.

A checkpoint may hold such a tensor under one of its names or under several. A merge writes the same values under all
the names that the base has, unless the adapter changes the names differently: then they are untied.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..io.checkpoint_files import FLOATS, INDEX, SINGLE, Stored, open_checkpoint
from ..models.load import tied_groups
from .names import locate

VALUES = 1 << 22
"""Values that are compared at a time."""


def only_names(model: nn.Module) -> dict[str, str]:
    """Return the name that ``named_parameters`` gives, by each other name of a tied parameter."""
    return {other: first for first, *others in tied_groups(model) for other in others}


def untie(model: PreTrainedModel) -> list[list[str]]:
    """Give each name of a tied parameter a parameter of its own. Returns the names that were tied, in groups.

    Raises:
        UserError: the architecture always ties them.
    """
    groups = tied_groups(model)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    with torch.device("meta"):
        if tied_groups(type(model)(model.config)):
            raise UserError(
                f"{type(model).__name__} always ties {' and '.join(groups[0])}, but the adapter changes them "
                "differently: it cannot be merged; the model can only be evaluated with the adapter attached"
            )
    for _, *others in groups:
        for name in others:
            path, _, leaf = name.rpartition(".")
            own = nn.Parameter(model.get_parameter(name).detach().clone(), requires_grad=False)
            setattr(model.get_submodule(path), leaf, own)
    return groups


def as_stored(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """Untie the names under which the files hold different values, as loading the model does."""
    if not (groups := tied_groups(model)) or not any((directory / name).is_file() for name in (SINGLE, INDEX)):
        return model
    stored = open_checkpoint(directory).tensors
    found: dict[str, Stored] = {}
    for name, piece in locate(model, {name: tensor.shape for name, tensor in stored.items()}).items():
        if piece.whole:
            found[piece.parameter] = stored[name]
    for group in groups:
        values = [found[name] for name in group if name in found]
        if any(_differ(values[0], other) for other in values[1:]):
            untie(model)
            break
    return model


def joined(model: PreTrainedModel, changed: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[list[str]]]:
    """Return values by the name of a parameter in ``model``, where ``changed`` has values by any of its names. The
    model is untied, and the names that were tied are returned, if the values differ or if some names have none."""
    result = dict(changed)
    for first, *others in tied_groups(model):
        given = [changed[name] for name in (first, *others) if name in changed]
        if len(given) not in (0, 1 + len(others)) or any(not torch.equal(given[0], value) for value in given):
            return dict(changed), untie(model)
        for name in others:
            result.pop(name, None)
    return result, []


def _differ(one: Stored, other: Stored) -> bool:
    if one.dtype not in FLOATS or one.shape != other.shape or one.dtype != other.dtype:
        return one.shape != other.shape or one.dtype != other.dtype
    rows = max(VALUES // max(one.shape[-1], 1), 1)
    pairs = zip(one.blocks(rows), other.blocks(rows), strict=True)
    return any(not torch.equal(mine, others) for (_, mine), (_, others) in pairs)
