"""What is known of model families by name: repeated layers, heads, routers, linears that share an input."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of the model: the longest ModuleList that is in no other (experts are in a layer)."""
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = [list(m) for path, m in lists.items() if not any(path.startswith(f"{other}.") for other in lists)]
    return max(outermost, key=len)


# fmt: off
PLAIN_HEADS = frozenset({
    "gemma", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "olmo2", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "stablelm", "starcoder2",
})
# fmt: on
"""Values of ``model_type`` whose logits are ``head(decoder(...).last_hidden_state)`` and nothing else. The others
(Gemma 2's soft caps, the scaled logits of Cohere and Granite, what nobody has tried) go through their own forward."""


def has_plain_head(model: nn.Module) -> bool:
    """Whether the loss can be computed in chunks."""
    if not isinstance(model, PreTrainedModel):
        return False
    return model.config.model_type in PLAIN_HEADS and isinstance(model.get_output_embeddings(), nn.Linear)


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
