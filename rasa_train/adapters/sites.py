"""Selection of the linears of a model by ``targets`` and ``exclude`` of a recipe."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import UserError
from ..models.families import EXPERT_NAMES, is_router, layer_lists
from .experts import expert_sites, is_fused, is_supported
from .site import Site


def find_sites(
    model: nn.Module, targets: str | list[str] = "all-linear", exclude: list[str] | None = None
) -> list[Site]:
    """Return the selected sites among the linears inside the model's repeated layers, in module order. The model may be
    on the meta device.

    Raises:
        UserError: the model has no repeated layers, or an item of ``targets`` or ``exclude`` matches nothing.
    """
    sites = list(_all_linears(model))
    if targets == "all-linear":
        _check_experts(model)
    if not sites:
        raise UserError(
            f"{type(model).__name__} has no repeated decoder layers with linears to adapt", key="model.name"
        )
    selected = (
        [s for s in sites if not is_router(s.kind)] if targets == "all-linear" else _matching(sites, targets, "targets")
    )
    if exclude:
        excluded = set(_matching(sites, exclude, "exclude"))
        selected = [site for site in selected if site not in excluded]
    if not selected:
        raise UserError("adapter.exclude leaves nothing to adapt", key="adapter.exclude")
    return selected


def _check_experts(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if is_fused(module) and not is_supported(module):
            raise UserError(
                f"adapter.targets: {path} of {type(model).__name__} holds the weights of its experts in a layout that "
                f"cannot be adapted ({type(module).__name__}); name the linears to adapt, for example [q_proj, v_proj]",
                key="adapter.targets",
            )


def _all_linears(model: nn.Module) -> Iterator[Site]:
    lists = {
        path: layers
        for path, layers in layer_lists(model).items()
        if any(isinstance(module, nn.Linear | Conv1D) for module in layers.modules())
    }
    for list_path, layers in lists.items():
        # Encoder and decoder of one model must not share pools, so the kind then starts with the path of the list.
        prefix = "" if len(lists) == 1 else list_path + "."
        for index, layer in enumerate(layers):
            for name, module in layer.named_modules():
                path, kind = f"{list_path}.{index}.{name}", prefix + name
                if isinstance(module, nn.Linear | Conv1D):
                    yield linear_site(path, kind, index, module)
                elif is_fused(module) and is_supported(module):
                    yield from expert_sites(path, kind, index, module)


def linear_site(path: str, kind: str, layer: int, module: nn.Linear | Conv1D) -> Site:
    """Return the site of one linear."""
    # Under ZeRO-3 a weight is partitioned and has shape (0,), so the sizes come from the module.
    if isinstance(module, Conv1D):
        out_features, in_features = module.nf, module.nx
    else:
        out_features, in_features = module.out_features, module.in_features
    return Site(
        path=path,
        kind=kind,
        layer=layer,
        out_features=out_features,
        in_features=in_features,
        weight=f"{path}.weight",
        transposed=isinstance(module, Conv1D),
        bias=module.bias is not None,
    )


def _names(site: Site) -> list[str]:
    """Return the kind of a site and, for a site of experts, its other names."""
    parent, _, name = site.kind.rpartition(".")
    others = () if site.num_experts is None else EXPERT_NAMES[name]
    return [site.kind, *(f"{parent}.{other}" for other in others)]


def _matching(sites: list[Site], targets: str | list[str], key: str) -> list[Site]:
    """Return the sites that ``targets`` selects: a regular expression for the path, or names (``q_proj``,
    ``mlp.up_proj``)."""
    kinds = sorted({site.kind for site in sites})
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise UserError(
                f"adapter.{key} is not a regular expression: {error}, got {targets!r}", key=f"adapter.{key}"
            ) from None
        matched = [site for site in sites if pattern.fullmatch(site.path) or pattern.fullmatch(site.kind)]
        if not matched:
            raise UserError(
                f"adapter.{key}: the pattern {targets!r} matches no linear; the model has {', '.join(kinds)}",
                key=f"adapter.{key}",
            )
        return matched
    wanted: set[Site] = set()
    for name in targets:
        hits = [s for s in sites if name == s.path or any(n == name or n.endswith("." + name) for n in _names(s))]
        if not hits:
            close = difflib.get_close_matches(name, {k.rpartition(".")[2] for k in kinds}, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise UserError(
                f"adapter.{key}: {name!r} matches no linear{hint} The model has {', '.join(kinds)}",
                key=f"adapter.{key}",
            )
        wanted.update(hits)
    return [site for site in sites if site in wanted]
