"""What the package knows about model families by name: repeated layers, heads, routers, linears that share an input."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def layer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the lists of repeated layers, by path: each ModuleList that is not inside another one (lists of experts
    are inside a layer). A model with an encoder and a decoder has two."""
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return {path: m for path, m in lists.items() if not any(path.startswith(f"{other}.") for other in lists)}


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the repeated layers of the decoder: the longest of the model's lists."""
    return max(map(list, layer_lists(model).values()), key=len)


# fmt: off
PLAIN_HEADS = frozenset({
    "gemma", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "olmo2", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "stablelm", "starcoder2",
})
# fmt: on
"""Values of ``model_type`` for models whose logits are ``head(decoder(...).last_hidden_state)`` and nothing else. Other
models (Gemma 2 with its soft caps, Cohere and Granite with scaled logits, untested models) use their own forward."""


def has_plain_head(model: nn.Module) -> bool:
    """Whether the loss of the model can be computed in chunks of tokens."""
    if not isinstance(model, PreTrainedModel):
        return False
    return model.config.model_type in PLAIN_HEADS and isinstance(model.get_output_embeddings(), nn.Linear)


EXPERT_NAMES = {"gate_proj": ("w1", "gate_up_proj"), "up_proj": ("w3", "gate_up_proj"), "down_proj": ("w2",)}
"""Other names of the linears of fused experts: Mixtral's names, and the name of the fused parameter."""


ROUTERS = {"gate", "router", "shared_expert_gate"}
"""Names of the router of a mixture of experts, or of the module around it."""


EXPERT_LINEARS = frozenset({*EXPERT_NAMES, *(other for others in EXPERT_NAMES.values() for other in others), "gate"})
"""Names that the linears of experts and their router have or had in some version of transformers."""


def is_router(kind: str) -> bool:
    """Whether a kind of linear belongs to a router, which ``all-linear`` does not adapt."""
    return not ROUTERS.isdisjoint(kind.split("."))


SHARED_INPUTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Linears of one module that every known architecture calls one after the other with the same input:
``adapters.shared_input.Group`` computes them together (and detects a module that calls them differently)."""
