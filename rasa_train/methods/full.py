"""Full fine-tuning: parameters of the base model are trained, and none is added."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import ClassVar, Literal

from torch import nn

from ..adapters.contract import Built, Method
from ..adapters.patterns import path_pattern
from ..adapters.site import Site
from ..errors import UserError
from ..models.families import decoder_layers, layer_lists


class Full(Method):
    """Full fine-tuning: of every parameter, or of those that ``targets``, ``exclude`` and ``layers`` choose.

    ``targets: all-linear`` stands for all parameters of the model. Otherwise ``targets`` and ``exclude`` name modules
    or parameters (``[q_proj, lm_head]``, ``[mlp]``, ``[bias]``), or ``targets`` is a pattern for the whole name.
    ``layers: [-2, -1]`` is FT-Top2, which trains the last two layers. ``dropout`` and ``compute`` cannot be set.

    Weights that are trained are held in fp32, used in computations in the model's dtype, and saved and merged under
    their own names. Suitable learning rates are about a tenth of LoRA's (Biderman et al. 2024, arXiv 2405.09673).
    """

    method: Literal["full"] = "full"
    layers: list[int] | None = None
    """Numbers of the decoder layers that are trained, from 0; -1 is the last one. Parameters outside of these layers
    (embeddings, head, last norm) are then frozen. ``null``: no restriction."""

    selects_parameters: ClassVar[bool] = True
    never_used: ClassVar[frozenset[str]] = frozenset({"dropout", "compute"})

    def build(self, sites: list[Site]) -> Built:
        return Built({}, {})

    def trains(self, parameter: str) -> bool:
        return True

    def trained_base(self, model: nn.Module) -> set[str]:
        """Return the names of the chosen parameters; of tied ones the first name, whichever was chosen.

        Raises:
            UserError: an item of ``targets`` or ``exclude``, or a layer, is not in the model, or nothing is left.
        """
        first = {id(parameter): name for name, parameter in model.named_parameters()}
        names = {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
        inside = names if self.layers is None else self._in_layers(model, self.layers, names)
        if isinstance(self.targets, list):
            chosen = {name for item in self.targets for name in _named(item, inside, "targets", names)}
        elif self.targets == "all-linear":
            chosen = set(inside)
        else:
            chosen = set(_matching(self.targets, inside))
        chosen -= {name for item in self.exclude for name in _named(item, chosen, "exclude", names)}
        if not chosen:
            raise UserError("adapter.exclude leaves nothing to train", key="adapter.exclude")
        return {names[name] for name in chosen}

    @staticmethod
    def _in_layers(model: nn.Module, wanted: list[int], names: Iterable[str]) -> list[str]:
        layers = decoder_layers(model)
        path = next(path for path, found in layer_lists(model).items() if list(found) == layers)
        if not wanted or any(not -len(layers) <= number < len(layers) for number in wanted):
            raise UserError(
                f"adapter.layers must be numbers of the model's {len(layers)} layers, from {-len(layers)} to "
                f"{len(layers) - 1}, got {wanted}",
                key="adapter.layers",
            )
        prefixes = tuple(f"{path}.{number % len(layers)}." for number in wanted)
        return [name for name in names if name.startswith(prefixes)]


def _named(item: str, names: Iterable[str], key: str, known: Iterable[str]) -> list[str]:
    """Return the parameters of which ``item`` is the name, or the name of a module around it."""
    found = [name for name in names if f".{item}." in f".{name}."]
    return found or _nothing(repr(item), key, known)


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    fits = path_pattern(pattern, "adapter.targets")
    found = [name for name in names if fits(name) or fits(name.rpartition(".")[0])]
    return found or _nothing(f"the pattern {pattern!r}", "targets", names)


def _nothing(what: str, key: str, known: Iterable[str]) -> list[str]:
    kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in known})
    raise UserError(
        f"adapter.{key}: {what} matches no parameter that adapter.method: full would train; the model has "
        f"{', '.join(kinds[:40])}",
        key=f"adapter.{key}",
    )
