"""What an adapted model holds: its adapters, groups, trained tensors and what a checkpoint keeps."""

from __future__ import annotations

from torch import Tensor, nn

from .contract import Adapter
from .linear import AdaptedLinear
from .shared_input import Group

POOLS = "pools"
"""Name of the root module that holds what sites share. Only this placement works under DDP, ZeRO-3 and FSDP2."""


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


def effective_ranks(model: nn.Module) -> dict[str, int]:
    """Return the largest effective rank of each kind. The model must not be divided."""
    ranks: dict[str, int] = {}
    for adapter in adapters(model).values():
        ranks[adapter.site.kind] = max(ranks.get(adapter.site.kind, 0), adapter.effective_rank)
    return ranks
