"""Put the adapters of a method into a model."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..errors import UserError
from ..kernels.quantized_weight import Base, dequantized, is_bitsandbytes, narrow
from ..models.classifier import head_parameters, hold_head, is_classifier
from ..models.families import SHARED_INPUTS
from ..models.words import row_parameters, trained_names, words_of
from .contract import Adapter, FactorAdapter, Method
from .experts import AdaptedExperts
from .fused_parts import FactorParts, Parts, is_part, linear_of
from .linear import AdaptedLinear
from .shared_input import Group
from .site import Site
from .sites import find_sites, linear_site
from .state import POOLS


def adapt(model: nn.Module, method: Method) -> tuple[nn.Module, list[Site]]:
    """Put ``method`` into ``model``. Returns the model to train and the adapted sites. For every method but ``peft``
    that model is ``model`` itself, and this function does the same as ``attach``. Raises ``UserError`` for a classifier
    and a method that wraps."""
    if is_classifier(model) and type(method).wrap is not Method.wrap:
        raise UserError(
            f"adapter.method: {method.method} cannot train a classifier, whose head it would leave frozen; use lora, "
            "rasa or another method of this package",
            key="adapter.method",
        )
    if words_of(model) and type(method).wrap is not Method.wrap:
        raise UserError(
            f"adapter.method: {method.method} leaves the embeddings to PEFT; use lora, rasa or another method of this "
            "package with model.add_tokens and model.train_embeddings",
            key="adapter.method",
        )
    wrapped = method.wrap(model)
    return (model, attach(model, method)) if wrapped is None else (wrapped, [])


def attach(model: nn.Module, method: Method) -> list[Site]:
    """Freeze ``model`` and put the adapters of ``method`` into it. Returns the sites, in module order. The head of a
    classifier, and the rows of new words, are trained whatever the method.

    Adapter parameters are fp32 on the device of the weight they belong to; pools are at ``model.pools``. On the meta
    device the adapters get shapes but no values.
    """
    model.requires_grad_(False)
    sites = find_sites(model, *(() if method.selects_parameters else (method.targets, method.exclude)))
    built = method.build(sites)
    for site in sites:
        if site.path in built.adapters:
            place(model, site, built.adapters[site.path])
    _form_groups(model)
    if built.pools:
        model.add_module(POOLS, nn.ModuleDict(built.pools).to(next(model.parameters()).device))
    method.insert(model)
    hold_head(model)
    base = method.trained_base(model) - row_parameters(model).keys()
    base |= head_parameters(model).keys() | trained_names(model, base)
    for name, parameter in list(model.named_parameters()):
        if name in base:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and any(p.requires_grad for p in module.parameters(False)):
            module.float()  # torch requires its weight and bias in one dtype, also under autocast
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            f"adapter.method: {method.method} has no parameters to train in this model", key="adapter.method"
        )
    return sites


@torch.no_grad()
def narrow_base(model: nn.Module, base: Base, device: torch.device) -> float:
    """Hold the frozen weights of adapted linears (not of fused experts) in the format ``base``, on ``device``.

    Returns the relative difference between the new and the old weights: |W' - W| / |W|, over all of these linears
    (Frobenius norms).

    Raises:
        UserError: weights of the base are trained, or the device, a missing package or a shape does not allow the
            format.
    """
    linears = [m for m in model.modules() if isinstance(m, AdaptedLinear) and not m.own_forward]
    if not linears or any(module.weight.requires_grad for module in linears):
        raise UserError(
            f"model.quantization: {base} needs frozen linears with adapters beside them", key="model.quantization"
        )
    norm2 = error2 = 0.0
    for module in linears:
        W = module.weight.detach().to(device)
        W = W.t() if module.transposed else W
        module.narrow = narrow(W, base)
        norm2 += float(W.float().square().sum())
        error2 += float((module.narrow.dense().float() - W.float()).square().sum())
        module.weight = nn.Parameter(W.new_empty(0), requires_grad=False)
    return math.sqrt(error2 / norm2)


def place(model: nn.Module, site: Site, adapter: Adapter) -> None:
    """Put one adapter into ``model``, on the device of the weight that it belongs to."""
    parameter = model.get_parameter(site.weight)
    adapter.to(parameter.device)
    if adapter.needs_weight and not parameter.is_meta:
        linear = None if site.num_experts else model.get_submodule(linear_of(site))
        quantized = linear is not None and is_bitsandbytes(linear)
        adapter.start(site.view(dequantized(linear) if quantized else parameter.detach()).float())
    path, _, name = site.path.rpartition(".")
    if is_part(site):
        _place_part(model, site, name, adapter)
        return
    if site.num_experts is None:
        parent = model.get_submodule(path)
        setattr(parent, name, AdaptedLinear(getattr(parent, name), adapter))
        return
    experts = model.get_submodule(path)
    if not isinstance(experts, AdaptedExperts):
        experts = AdaptedExperts(experts)
        model.set_submodule(path, experts)
    experts.add(name, adapter)


def _place_part(model: nn.Module, site: Site, name: str, adapter: Adapter) -> None:
    """Put the adapter of a part of a linear into the adapter of that linear, which is made for the first of its
    parts."""
    path, _, own = linear_of(site).rpartition(".")
    parent = model.get_submodule(path)
    linear = getattr(parent, own)
    if not isinstance(linear, AdaptedLinear):
        whole = linear_site(linear_of(site), site.kind.rpartition(".")[0], site.layer, linear)
        kind = FactorParts if isinstance(adapter, FactorAdapter) else Parts
        linear = AdaptedLinear(linear, kind(whole, adapter))
        setattr(parent, own, linear)
    linear.adapter.add_module(name, adapter)


def _form_groups(model: nn.Module) -> None:
    for module in model.modules():
        children = dict(module.named_children())
        for names in SHARED_INPUTS:
            members = [child for name in names if isinstance(child := children.get(name), AdaptedLinear)]
            group = Group(members)
            for index, member in enumerate(members):
                member.join(group, index)
