"""Tiny random models of many architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

VOCABULARY = 61
MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
OWN: dict[str, dict[str, Any]] = {
    "bert": {"pad_token_id": 0},
    "cohere": {"logit_scale": 0.3},
    "deberta-v2": {
        **{"relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True},
        **{"pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "conv_kernel_size": 3, "conv_act": "gelu"},
        **{"pad_token_id": 0, "type_vocab_size": 0, "pooler_hidden_size": 32, "pooler_dropout": 0.0},
    },
    "deepseek_v3": {
        **{**MOE, **LATENT, "num_key_value_heads": 4, "head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1},
        **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "tie_word_embeddings": False},
    },
    "electra": {"embedding_size": 16, "pad_token_id": 0, "summary_last_dropout": 0.0},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 0.5, "attn_logit_softcapping": None},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "granite": {"logits_scaling": 3.0},
    "mamba": {"state_size": 4, "time_step_rank": 4, "expand": 2, "conv_kernel": 4},
    "mistral": {"sliding_window": 5},
    "mixtral": {"num_local_experts": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**MOE, "head_dim": 8},
    "modernbert": {"pad_token_id": 0, "local_attention": 6, "cls_token_id": 1, "sep_token_id": 2},
    "phi3": {"pad_token_id": 0},
    "roberta": {"pad_token_id": 1, "bos_token_id": 0, "type_vocab_size": 1},
}


ENCODERS = ("bert", "roberta", "deberta-v2", "modernbert", "electra")
"""Kinds of ``tiny_model`` that are encoders, which transformers opens as sequence classifiers."""


def tiny_model(kind: str, seed: int = 0, labels: int = 0) -> PreTrainedModel:
    """Two layers, width 32, grouped queries where the architecture has them; fp32, without dropout. With ``labels``, a
    sequence classifier, whose padding token is 0 unless the architecture has another."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    off = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} | {
        name: 0.0 for name in ("attention_dropout", "hidden_dropout", "embedding_dropout", "residual_dropout")
    }
    off |= {name: 0.0 for name in ("attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout")}
    head = {"num_labels": labels, "pad_token_id": 0} if labels else {}
    build = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    torch.manual_seed(seed)
    model: PreTrainedModel = build.from_config(
        AutoConfig.for_model(kind, **{**sizes, **off, **head, **OWN.get(kind, {})}), dtype=torch.float32
    )
    with torch.no_grad():  # as they are made, many hardly attend and have no biases
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tiny_tokenizer(directory: Path) -> None:
    """Write a tokenizer of ``VOCABULARY`` words into the directory of a model: ``w3 w4`` -> ``<s> 3 4 </s>``."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "<pad>", "</s>", *(f"w{number}" for number in range(3, VOCABULARY))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names).save_pretrained(directory)
