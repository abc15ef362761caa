"""Selection of the linears of a model by ``targets`` and ``exclude`` of a recipe."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import UserError
from ..models.families import EXPERT_NAMES, QKVO, SKIPPED_LAYERS, adapts_by_default, text_layers
from .experts import expert_sites, is_fused, is_supported
from .fused_parts import check_apart, part_sites
from .linear import maps_vectors
from .patterns import path_pattern
from .site import Site


def find_sites(
    model: nn.Module, targets: str | list[str] = "all-linear", exclude: list[str] | None = None
) -> list[Site]:
    """Return the selected sites among the linears inside the repeated layers of the text decoder, in module order. The
    model may be on the meta device.

    ``all-linear`` selects all that a gradient reaches, without routers; ``not_adapted`` names what is left.

    Raises:
        UserError: the model has no repeated layers, or an item of ``targets`` or ``exclude`` matches nothing.
    """
    sites = list(_all_linears(model))
    parts = part_sites(model, sites)
    if not sites:
        raise UserError(
            f"{type(model).__name__} has no repeated decoder layers with linears to adapt", key="model.name"
        )
    if targets == "all-linear":
        selected = [site for site in sites if adapts_by_default(site.kind)]
    else:
        selected = _matching(sites, parts, targets, "targets")
        check_apart(selected)
    if exclude:
        excluded = set(_matching(sites, parts, exclude, "exclude"))
        selected = [site for site in selected if site not in excluded]
    if not selected:
        raise UserError("adapter.exclude leaves nothing to adapt", key="adapter.exclude")
    return selected


def not_adapted(model: nn.Module) -> str | None:
    """Return a sentence on the weights of the text decoder that are computed with but cannot be adapted, experts in a
    layout of their own for example; None if there are none."""
    layers = [layer for layers in text_layers(model).values() for layer in layers]
    found = {type(m).__name__ for layer in layers for m in layer.modules() if is_fused(m) and not is_supported(m)}
    linears = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear) and not maps_vectors(m)]
    found |= {type(m).__name__ for m in linears if "Router" not in type(m).__name__}
    if not found:
        return None
    names = ", ".join(sorted(found))
    return f"not adapted: the weights of {names}, whose layout adapters do not support; the other linears are adapted"


def _all_linears(model: nn.Module) -> Iterator[Site]:
    lists = text_layers(model)
    for list_path, layers in lists.items():
        # Encoder and decoder of one model must not share pools, so the kind then starts with the path of the list.
        prefix = "" if len(lists) == 1 else list_path + "."
        for index, layer in enumerate(layers):
            if not SKIPPED_LAYERS.isdisjoint(name for name, _ in layer.named_children()):
                continue
            for name, module in layer.named_modules():
                path, kind = f"{list_path}.{index}.{name}", prefix + name
                if isinstance(module, nn.Linear | Conv1D) and maps_vectors(module):
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


def _matching(sites: list[Site], parts: list[Site], targets: str | list[str], key: str) -> list[Site]:
    """Return the sites that ``targets`` selects: a regular expression for the path, or names (``q_proj``,
    ``mlp.up_proj``, ``wq`` in any family). Parts of linears (``c_attn.q``) are selected by what selects no linear."""
    kinds = sorted({site.kind for site in sites})
    if isinstance(targets, str):
        matches = path_pattern(targets, f"adapter.{key}")
        found = ([site for site in some if matches(site.path) or matches(site.kind)] for some in (sites, parts))
        matched = next(filter(None, found), None)
        if not matched:
            raise UserError(
                f"adapter.{key}: the pattern {targets!r} matches no linear; the model has {', '.join(kinds)}",
                key=f"adapter.{key}",
            )
        return matched
    wanted: set[Site] = set()
    for name in targets:
        hits = _named(sites, (name,)) or _named(parts, (name,)) or _named([*sites, *parts], QKVO.get(name, ()))
        if not hits:
            kinds += sorted({part.kind for part in parts})
            close = difflib.get_close_matches(name, {k.rpartition(".")[2] for k in kinds}, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise UserError(
                f"adapter.{key}: {name!r} matches no linear{hint} The model has {', '.join(kinds)}",
                key=f"adapter.{key}",
            )
        wanted.update(hits)
    return [site for site in [*sites, *parts] if site in wanted]


def _named(sites: list[Site], names: Sequence[str]) -> list[Site]:
    """Return the sites that have one of the names, or a path or kind that ends with it."""
    return [s for s in sites if s.path in names or any(f".{own}".endswith(f".{n}") for n in names for own in _names(s))]
