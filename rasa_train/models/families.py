"""What the package knows about model families by name: repeated layers, heads, routers, linears that share an input."""

from __future__ import annotations

from typing import Any

from torch import nn


def layer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the lists of repeated layers, by path: each ModuleList that is not inside another one (lists of experts
    are inside a layer). A model with an encoder and a decoder has two."""
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return {path: m for path, m in lists.items() if not any(path.startswith(f"{other}.") for other in lists)}


def text_layers(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return those of ``layer_lists`` that are the text decoder: not the towers that read images or sound, and no lists
    beside the layers. A model with an encoder and a decoder has two."""
    lists = {path: layers for path, layers in layer_lists(model).items() if any(map(_is_layer, layers))}
    find = getattr(model, "get_decoder", None)  # a model that PEFT has wrapped has it, too
    decoder = find() if callable(find) else None
    root = next((path for path, module in model.named_modules() if module is decoder), "")
    inside = {path: layers for path, layers in lists.items() if path.startswith(root and f"{root}.")}
    found = inside or lists
    least = min((path.count(".") for path in found), default=0)
    return {path: layers for path, layers in found.items() if path.count(".") == least}


def _is_layer(module: nn.Module) -> bool:
    """Whether an item of a list is a layer, made of modules with weights, rather than a linear by itself."""
    return any(True for child in module.children() for _ in child.parameters())


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the repeated layers of the text decoder: the longest of its lists."""
    return max(map(list, text_layers(model).values()), key=len)


def sublayers(layer: nn.Module) -> tuple[str, str, str | None] | None:
    """Return the names, inside a layer, of the modules whose results are added to the residual after attention and
    after the FFN, and of the norm that follows the second sum inside the layer (None: there is none, or it is not known
    to be there). None for a layer whose structure is not known."""
    names = {name for name, _ in layer.named_modules()}
    if {"attention.output.dropout", "output.dropout", "output.LayerNorm"} <= names:  # BERT and its relatives
        return "attention.output.dropout", "output.dropout", "output.LayerNorm"
    attention = next((name for name in ATTENTION if name in names), None)
    ffn = next((name for name in FFN if name in names), None)
    if attention is None or ffn is None:
        return None
    return attention, ffn, next((name for name in ("output_layer_norm",) if name in names), None)


ATTENTION = ("self_attn", "attn", "attention", "self_attention")
FFN = ("mlp", "ffn", "block_sparse_moe", "feed_forward", "fc2")
"""Names of a layer's attention and of its FFN in families that add their results to the residual as they are."""


def end_tokens(model: nn.Module) -> list[int]:
    """Return the ids of the tokens at which the model ends a text, for generation; empty if it names none."""
    config: Any = getattr(model, "config", None)
    for named in (getattr(model, "generation_config", None), config and config.get_text_config()):
        found = getattr(named, "eos_token_id", None)
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    return []


# fmt: off
PLAIN_HEADS = frozenset({
    "gemma", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "olmo2", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "stablelm", "starcoder2",
})
# fmt: on
"""Values of ``model_type`` for models whose logits are ``head(decoder(...).last_hidden_state)`` and nothing else. Other
models (Gemma 2 with its soft caps, Cohere and Granite with scaled logits, untested models) use their own forward."""


PREFIX_MODELS = frozenset({"paligemma"})
"""Values of ``model_type`` for models that attend within their prompt in both directions, and take ``token_type_ids``
that are 0 for the tokens of the prompt."""


def has_plain_head(model: nn.Module) -> bool:
    """Whether the loss of the model can be computed in chunks of tokens."""
    from transformers import PreTrainedModel  # not above: recipes are read without it

    if not isinstance(model, PreTrainedModel):
        return False
    return model.config.model_type in PLAIN_HEADS and isinstance(model.get_output_embeddings(), nn.Linear)


EXPERT_NAMES = {"gate_proj": ("w1", "gate_up_proj"), "up_proj": ("w3", "gate_up_proj"), "down_proj": ("w2",)}
"""Other names of the linears of fused experts: Mixtral's names, and the name of the fused parameter."""


ROUTERS = {"gate", "router", "router_gate", "modality_router", "shared_expert_gate"}
"""Names of the router of a mixture of experts, or of the module around it."""

UNREACHED = {
    "dt_proj",  # Mamba and Jamba read its weight without calling it; Doge's only selects keys
    "indexer",  # selects keys, without a gradient (DeepSeek)
    "cross_attn",  # reads images
    "encoder_attn",  # reads the encoder, which a language model does not have
    "correction_coefs",  # Gemma 3n reads its weight without calling it
    # Each of Zamba 2's shared blocks has those of all places at which a block is used.
    *("linear_q_adapter_list", "linear_k_adapter_list", "linear_v_adapter_list", "gate_up_proj_adapter_list"),
}
"""Names of modules whose linears no gradient of a text reaches."""
SKIPPED_LAYERS = {"cross_attn"}
"""Names of modules that make their layer one that is passed over if there is no image (Llama 3.2 Vision)."""

EXPERT_LINEARS = frozenset({*EXPERT_NAMES, *(other for others in EXPERT_NAMES.values() for other in others), "gate"})
"""Names that the linears of experts and their router have or had in some version of transformers."""


def adapts_by_default(kind: str) -> bool:
    """Whether ``all-linear`` adapts a kind of linear: not those of a router, nor those that no gradient reaches."""
    return (ROUTERS | UNREACHED).isdisjoint(kind.split("."))


FUSED: dict[str, dict[str, tuple[str, str]]] = {
    "gpt2": {"c_attn": ("q k v", "equal")},
    "gpt_neox": {"query_key_value": ("q k v", "equal in each head")},
    "modernbert": {"Wqkv": ("q k v", "equal")},
    "phi3": {"qkv_proj": ("q k v", "by heads"), "gate_up_proj": ("gate up", "equal")},
}
"""Linears that compute several, by ``model_type``: what they compute, in the order of their outputs, and how many
outputs each has."""


def fused_layout(config: Any, name: str, outputs: int) -> tuple[int, dict[str, int]]:
    """Return how the outputs of the linear ``name`` are divided, if several linears are computed in it: the number of
    equal groups of outputs, and the outputs of each linear in a group, by its name. No names for any other linear."""
    found, sizes = FUSED.get(config.model_type, {}).get(name, ("", ""))
    if not found:
        return 1, {}
    names, heads = found.split(), config.num_attention_heads
    if "q" in names and "by heads" not in sizes and outputs != 3 * config.hidden_size:
        return 1, {}  # the keys and values of cross-attention, without queries
    if sizes == "by heads":
        each = getattr(config, "head_dim", None) or config.hidden_size // heads
        return 1, {"q": heads * each} | dict.fromkeys("kv", config.num_key_value_heads * each)
    groups = heads if sizes == "equal in each head" else 1
    return groups, {name: outputs // groups // len(names) for name in names}


QKVO = {
    "wq": ("q_proj", "query", "query_proj", "q_lin", "c_attn.q", "qkv_proj.q", "query_key_value.q", "Wqkv.q"),
    "wk": ("k_proj", "key", "key_proj", "k_lin", "c_attn.k", "qkv_proj.k", "query_key_value.k", "Wqkv.k"),
    "wv": ("v_proj", "value", "value_proj", "v_lin", "c_attn.v", "qkv_proj.v", "query_key_value.v", "Wqkv.v"),
    "wo": ("o_proj", "out_proj", "attention.output.dense", "attention.dense", "self_attn.dense", "self_attention.dense",
           "out_lin", "attn.c_proj", "attn.Wo"),
}  # fmt: skip
"""The four matrices of self-attention under one name in all families: their names in each."""

SHARED_INPUTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Linears of one module that every known architecture calls one after the other with the same input:
``adapters.shared_input.Group`` computes them together (and detects a module that calls them differently)."""


POSITIONS = {"position_embeddings", "embed_positions", "wpe"}
"""Names of the tables of learned positions."""


def most_tokens(model: nn.Module) -> int | None:
    """Return the most tokens that a model with learned positions can read; None for any other model. RoBERTa's table
    has a row for each position after that of padding."""
    named = [module for path, module in model.named_modules() if path.rpartition(".")[2] in POSITIONS]
    tables = [module for module in named if isinstance(module, nn.Embedding)]
    return min((t.num_embeddings - (0 if t.padding_idx is None else t.padding_idx + 1) for t in tables), default=None)
