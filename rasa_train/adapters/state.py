"""The state of an adapted model: its adapters and groups, its trained tensors, and the tensors that are saved."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..models.classifier import POOLS as POOLS  # only at the root do shared tensors work with DDP, ZeRO-3 and FSDP2
from ..models.classifier import head_parameters
from ..models.words import own_parameters, row_parameters
from .contract import Adapter
from .fused_parts import Parts
from .linear import AdaptedLinear
from .shared_input import Group


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return the adapters in ``model`` by the path of their site."""
    found = [module for module in model.modules() if isinstance(module, Adapter) and not isinstance(module, Parts)]
    return {module.site.path: module for module in found}


def groups(model: nn.Module) -> list[Group]:
    """Return the groups of linears that are computed together."""
    return list({id(m.group): m.group for m in model.modules() if isinstance(m, AdaptedLinear)}.values())


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every trained tensor once, by its name in ``adapter.safetensors``, which starts with the path of its site
    or pool."""
    return {saved_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of ``adapter.safetensors``: the trained tensors, and the frozen tensors that the update
    needs."""
    frozen = {
        saved_name(f"{path}.{name}"): tensor
        for path, module in model.named_modules()
        if isinstance(module, Adapter) or path == POOLS
        for name, tensor in module.state_dict(keep_vars=True).items()
    }
    return frozen | dict(row_parameters(model)) | dict(trainable(model))


def with_own_head(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of an adapter to start from, and the names of those that are ``model``'s own: those of a head
    which the adapter lacks or has in another shape (an adapter of MNLI has three labels, and one of RTE two), and the
    rows of the embedding that it lacks."""
    head, rows = head_parameters(model), own_parameters(model)
    own = {name: p for name, p in head.items() if name not in tensors or tensors[name].shape != p.shape}
    own |= {name: p for name, p in rows.items() if name not in tensors}
    return {**tensors, **own}, sorted(own)


def rule_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of the method's own rule (``Adapter.rule_state``): they are saved in checkpoints, but not in
    the adapter's file."""
    return {f"{path}.{name}": getattr(a, name) for path, a in adapters(model).items() for name in a.rule_state}


def saved_name(parameter_name: str) -> str:
    """Return the name of a parameter in the adapter's file, without the parts that wrappers insert.

    ``model.layers.0.mlp.up_proj.adapter.A`` -> ``model.layers.0.mlp.up_proj.A``
    """
    return parameter_name.replace("_checkpoint_wrapped_module.", "").replace(".adapter.", ".")


def effective_ranks(model: nn.Module) -> dict[str, int]:
    """Return the largest effective rank of each kind. The parameters of the model must not be partitioned."""
    ranks: dict[str, int] = {}
    for adapter in adapters(model).values():
        ranks[adapter.site.kind] = max(ranks.get(adapter.site.kind, 0), adapter.effective_rank)
    return ranks
