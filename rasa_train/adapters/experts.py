"""Fused mixture-of-experts weights: one parameter holds the linears of all experts of a layer.

    gate_up_proj (E, 2I, H)    gate_proj of every expert in the first I rows, up_proj in the other I rows
    down_proj    (E, H, I)

transformers uses this layout for Mixtral, Qwen-MoE, DeepSeek and most other families. Each linear of each expert is
adapted separately: it has its own ranks in an adapter, and its own pool.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.grouped import Rows, collect, spread
from .contract import Adapter, linear
from .site import Site


class AdaptedExperts(nn.Module):
    """Frozen experts with adapters: for each token the sum over its experts e, with weight p_e, of

    down_e(act(gate_e x) * up_e x),   where each of the three linears is W_e x + dW_e drop(x).

    Without updates from adapters the result equals that of transformers' own loop over experts ("eager") bit for bit.
    Dropout draws a new mask for each expert of a token.

    The module takes over the parameters of the module that it replaces, so their names in the model do not change.
    """

    base: nn.Module
    """The module that this one replaces."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.num_experts, self.intermediate_dim = int(base.num_experts), int(base.intermediate_dim)
        self.gate_up_proj: nn.Parameter
        self.down_proj: nn.Parameter
        self.gate_up_proj, self.down_proj = base.gate_up_proj, base.down_proj
        self.gate = base._apply_gate  # the activation, in the model's own way
        del base.gate_up_proj, base.down_proj
        object.__setattr__(self, "base", base)  # not registered: this module holds its tensors
        self.adapter = nn.ModuleDict()

    def unwrapped(self) -> nn.Module:
        """Return the module that this one replaced, with the current weights."""
        self.base.gate_up_proj, self.base.down_proj = self.gate_up_proj, self.down_proj
        return self.base

    def add(self, name: str, adapter: Adapter) -> None:
        self.adapter[name] = adapter

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Map hidden states (tokens, H), the experts of each token (tokens, k) and their weights (tokens, k) to outputs
        (tokens, H)."""
        tokens = len(hidden_states)
        # Sorted by expert: the tokens of one expert are consecutive rows, and each adapter is called once.
        expert, order = top_k_index.t().flatten().sort(stable=True)
        token, rows = order % tokens, Rows.sorted(expert, self.num_experts)
        # The rows of each token, in the order of its experts, in which the terms of its sum are added.
        places = token.argsort(stable=True).view(tokens, top_k_index.shape[-1]).t()
        x = spread(hidden_states, token, places)
        gate_up = linear(x, self.gate_up_proj, rows)
        half = self.intermediate_dim
        dropped = self._watched(("gate_proj", "up_proj"), x, rows)
        gate = self._update("gate_proj", dropped, self.gate_up_proj[:, :half], rows)
        up = self._update("up_proj", dropped, self.gate_up_proj[:, half:], rows)
        if gate is not None or up is not None:
            halves = torch.split(gate_up, half, -1)
            gate_up = torch.cat([h if u is None else h + u for h, u in zip(halves, (gate, up), strict=True)], -1)
        y = self.gate(gate_up)
        down = self._update("down_proj", self._watched(("down_proj",), y, rows), self.down_proj, rows)
        y = linear(y, self.down_proj, rows)
        y = y if down is None else y + down
        y = y * top_k_weights.t().flatten().index_select(0, order).unsqueeze(-1)
        return collect(y.to(hidden_states.dtype), token, places)

    def _watched(self, names: Sequence[str], x: Tensor, rows: Rows) -> Tensor:
        """Show the input to the adapters of these linears, and return it after dropout, with one mask for all."""
        found = (self.adapter[name] for name in names if name in self.adapter)
        own = [adapter for adapter in found if isinstance(adapter, Adapter)]
        for adapter in own:
            if adapter.watches and adapter.training:
                adapter.watch(x, rows if adapter.takes_rows else rows.counts)
        return own[0].drop(x) if own else x

    def _update(self, name: str, x: Tensor, weight: Tensor, rows: Rows) -> Tensor | None:
        if name not in self.adapter:
            return None
        adapter = self.adapter[name]
        update: Tensor = adapter(x, weight, rows if adapter.takes_rows else rows.counts)
        return update.to(weight.dtype)


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds fused expert weights, in this layout or another one."""
    return "Expert" in type(module).__name__ and any(True for _ in module.parameters(recurse=False))


def is_supported(module: nn.Module) -> bool:
    """Whether fused expert weights have the layout above: not transposed, interleaved, biased or ungated."""
    flags = {"has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False}
    if any(getattr(module, name, None) != value for name, value in flags.items()):
        return False
    if getattr(module, "has_post_expert_norm", False):  # a transformers version without this flag has no such experts
        return False
    E, H, I = (int(getattr(module, name, 0)) for name in ("num_experts", "hidden_dim", "intermediate_dim"))
    shapes: Mapping[str, tuple[int, ...]] = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    # (0,) is a parameter that ZeRO-3 has partitioned
    return shapes.keys() == {"gate_up_proj", "down_proj"} and all(
        shape in ((0,), wanted)
        for shape, wanted in zip((shapes["gate_up_proj"], shapes["down_proj"]), ((E, 2 * I, H), (E, H, I)), strict=True)
    )


def expert_sites(path: str, kind: str, layer: int, module: nn.Module) -> Iterator[Site]:
    """Yield the sites of one supported module: gate_proj, up_proj and down_proj, each for all experts."""
    E, H, I = (int(getattr(module, name)) for name in ("num_experts", "hidden_dim", "intermediate_dim"))
    for name, out_features, in_features, fused, rows in (
        ("gate_proj", I, H, "gate_up_proj", (0, I)),
        ("up_proj", I, H, "gate_up_proj", (I, 2 * I)),
        ("down_proj", H, I, "down_proj", None),
    ):
        yield Site(
            path=f"{path}.{name}",
            kind=f"{kind}.{name}",
            layer=layer,
            out_features=out_features,
            in_features=in_features,
            weight=f"{path}.{fused}",
            num_experts=E,
            rows=rows,
        )


def peft_parameter(path: str, targets: Sequence[str]) -> str | None:
    """Return the fused weight that PEFT's factors at ``path`` belong to; None if they belong to a linear.

    PEFT wraps the module once for each of its ``target_parameters``, in the order of the module's own parameters, so
    that ``experts.base_layer`` is gate_up_proj when ``experts`` is down_proj.
    """
    module = path
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    if not module.endswith("experts"):
        return None
    names = [f"{module}.{name}" for name in ("gate_up_proj", "down_proj")]
    names = [name for name in names if any(f".{name}".endswith(f".{target}") for target in targets)]
    depth = (len(path) - len(module)) // len(".base_layer")
    return names[-1 - depth] if depth < len(names) else None


def peft_linears(parameter: str, side: str, r: int, tensor: Tensor) -> dict[str, Tensor]:
    """Convert PEFT's A (E r, in) or B (out, r E) of a fused weight to factors of the linears in it: (E, r, in) or
    (E, out, r).

    gate and up get the same A; the rows of B are divided between them.
    """
    module, _, name = parameter.rpartition(".")
    linears = ["gate_proj", "up_proj"] if name == "gate_up_proj" else [name]
    if side == "A":
        return {f"{module}.{linear}.A": tensor.reshape(-1, r, tensor.shape[1]) for linear in linears}
    B = tensor.reshape(len(tensor), r, -1).permute(2, 0, 1)
    return {f"{module}.{linear}.B": rows for linear, rows in zip(linears, B.chunk(len(linears), 1), strict=True)}
