"""Find the linears of a model that a method adapts, and put its adapters there."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import UserError
from .base import Adapter, Method, Site
from .experts import OTHER_NAMES, AdaptedExperts, expert_sites, is_fused, is_supported
from .kernels import Group, plain, watched

POOLS = "pools"
"""Name of the root module that holds what sites share. Only this placement works under DDP, ZeRO-3 and FSDP2."""
ROUTERS = {"gate", "router", "shared_expert_gate"}
"""Names of a mixture-of-experts router: ``all-linear`` leaves it alone."""


SHARED_INPUTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Linears of one module that every known architecture calls one after the other with the same input: ``kernels.Group``
computes them together (and finds out where this is not so)."""


class AdaptedLinear(nn.Module):
    """A frozen linear plus an adapter: y = W x + b + dW drop(x).

    Takes over the layer's own ``weight`` and ``bias``, so their names in the model stay what they were.
    """

    group: Group

    def __init__(self, base: nn.Linear | Conv1D, adapter: Adapter) -> None:
        super().__init__()
        self.weight, self.bias, self.adapter = base.weight, base.bias, adapter
        self.transposed = adapter.site.transposed
        self.in_features, self.out_features = adapter.site.in_features, adapter.site.out_features
        self.join(Group([self]), 0)

    def join(self, group: Group, index: int) -> None:
        """Be computed as member ``index`` of ``group``."""
        object.__setattr__(self, "group", group)  # no module of this one: its members are elsewhere in the model
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # what a group remembers between calls has no place in a graph
            watched(self.adapter, x)
            return plain(self, x, self.adapter.drop(x))
        return self.group(self.index, x)


def find_sites(
    model: nn.Module, targets: str | list[str] = "all-linear", exclude: list[str] | None = None
) -> list[Site]:
    """Sites of the linears inside the model's repeated layers, in module order. Needs no weights (meta is fine).

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
        [s for s in sites if not _named(s, ROUTERS)]
        if targets == "all-linear"
        else _matching(sites, targets, "targets")
    )
    if exclude:
        excluded = set(_matching(sites, exclude, "exclude"))
        selected = [site for site in selected if site not in excluded]
    if not selected:
        raise UserError("adapter.exclude leaves nothing to adapt", key="adapter.exclude")
    return selected


def adapt(model: nn.Module, method: Method) -> tuple[nn.Module, list[Site]]:
    """The model to train, with ``method`` in it, and the adapted sites. For all methods but ``peft`` the model is
    ``model`` itself, and this is ``attach``."""
    wrapped = method.wrap(model)
    return (model, attach(model, method)) if wrapped is None else (wrapped, [])


def attach(model: nn.Module, method: Method) -> list[Site]:
    """Freeze ``model`` and put the adapters of ``method`` into it. Returns the sites, in module order.

    Adapter parameters are fp32 on the device of the weight they belong to; pools hang at ``model.pools``. On the
    meta device everything is counted and nothing computed.
    """
    model.requires_grad_(False)
    sites = find_sites(model, method.targets, method.exclude)
    built = method.build(sites)
    for site in sites:
        if site.path in built.adapters:
            _place(model, site, built.adapters[site.path])
    _form_groups(model)
    if built.pools:
        model.add_module(POOLS, nn.ModuleDict(built.pools).to(next(model.parameters()).device))
    for name, parameter in list(model.named_parameters()):
        if method.trains(name):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and any(p.requires_grad for p in module.parameters()):
            module.float()  # torch wants its weight and bias in one dtype, under autocast too
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"adapter.method: {method.method} has nothing to train in this model", key="adapter.method")
    return sites


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters in ``model`` by the path of their site."""
    return {module.site.path: module for module in model.modules() if isinstance(module, Adapter)}


def groups(model: nn.Module) -> list[Group]:
    """The groups of linears that are computed together."""
    return list({id(m.group): m.group for m in model.modules() if isinstance(m, AdaptedLinear)}.values())


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every trained tensor once, by its name in ``adapter.safetensors``: its site's path, or its pool."""
    return {saved_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What ``adapter.safetensors`` holds: what is trained, and the frozen tensors the update is made of."""
    frozen = {
        saved_name(f"{path}.{name}"): tensor
        for path, module in model.named_modules()
        if isinstance(module, Adapter) or path == POOLS
        for name, tensor in module.state_dict(keep_vars=True).items()
    }
    return frozen | dict(trainable(model))


def rule_state(model: nn.Module) -> dict[str, Tensor]:
    """Buffers of the method's own rule (``Adapter.rule_state``): in checkpoints, not in the adapter's file."""
    return {f"{path}.{name}": getattr(a, name) for path, a in adapters(model).items() for name in a.rule_state}


def saved_name(parameter_name: str) -> str:
    """``model.layers.0.mlp.up_proj.adapter.A`` -> ``model.layers.0.mlp.up_proj.A``, without wrappers' additions."""
    return parameter_name.replace("_checkpoint_wrapped_module.", "").replace(".adapter.", ".")


def _place(model: nn.Module, site: Site, adapter: Adapter) -> None:
    parameter = model.get_parameter(site.weight)
    adapter.to(parameter.device)
    if adapter.needs_weight and not parameter.is_meta:
        weight = parameter.detach() if site.rows is None else parameter.detach()[:, slice(*site.rows)]
        adapter.start(weight.t().float() if site.transposed else weight.float())
    path, _, name = site.path.rpartition(".")
    if site.num_experts is None:
        parent = model.get_submodule(path)
        setattr(parent, name, AdaptedLinear(getattr(parent, name), adapter))
        return
    experts = model.get_submodule(path)
    if not isinstance(experts, AdaptedExperts):
        experts = AdaptedExperts(experts)
        model.set_submodule(path, experts)
    experts.add(name, adapter)


def _form_groups(model: nn.Module) -> None:
    for module in model.modules():
        children = dict(module.named_children())
        for names in SHARED_INPUTS:
            members = [child for name in names if isinstance(child := children.get(name), AdaptedLinear)]
            group = Group(members)
            for index, member in enumerate(members):
                member.join(group, index)


def _check_experts(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if is_fused(module) and not is_supported(module):
            raise UserError(
                f"adapter.targets: {path} of {type(model).__name__} holds the weights of its experts in a layout that "
                f"cannot be adapted ({type(module).__name__}); name the linears to adapt, as [q_proj, v_proj]",
                key="adapter.targets",
            )


def _all_linears(model: nn.Module) -> Iterator[Site]:
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(isinstance(m, nn.Linear | Conv1D) for m in module.modules())
    ]
    outermost = [p for p, _ in lists if not any(p.startswith(q + ".") for q, _ in lists)]
    for list_path, layers in lists:
        if list_path not in outermost:
            continue
        # Encoders and decoders of one model must not share pools: then the kind says whose it is.
        prefix = "" if len(outermost) == 1 else list_path + "."
        for index, layer in enumerate(layers):
            for name, module in layer.named_modules():
                path, kind = f"{list_path}.{index}.{name}", prefix + name
                if isinstance(module, nn.Linear | Conv1D):
                    yield _linear_site(path, kind, index, module)
                elif is_fused(module) and is_supported(module):
                    yield from expert_sites(path, kind, index, module)


def _linear_site(path: str, kind: str, layer: int, module: nn.Linear | Conv1D) -> Site:
    # Under ZeRO-3 a weight is partitioned and has shape (0,): the sizes come from the module.
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
    """The kind, and what else it is called when it is an expert's."""
    parent, _, name = site.kind.rpartition(".")
    others = () if site.num_experts is None else OTHER_NAMES[name]
    return [site.kind, *(f"{parent}.{other}" for other in others)]


def _named(site: Site, names: set[str]) -> bool:
    return site.kind.rpartition(".")[2] in names


def _matching(sites: list[Site], targets: str | list[str], key: str) -> list[Site]:
    """Sites that ``targets`` selects: a regular expression for the path, or names (``q_proj``, ``mlp.up_proj``)."""
    kinds = sorted({site.kind for site in sites})
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise UserError(
                f"adapter.{key} is no regular expression: {error}, got {targets!r}", key=f"adapter.{key}"
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
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(
                f"adapter.{key}: {name!r} matches no linear{hint} The model has {', '.join(kinds)}",
                key=f"adapter.{key}",
            )
        wanted.update(hits)
    return [site for site in sites if site in wanted]
