"""Tiny random bases and adapters with random values, as a training run would leave them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3MoeConfig,
)

from rasa_train.adapters.inject import adapt
from rasa_train.adapters.registry import METHODS
from rasa_train.adapters.saved import write_adapter
from rasa_train.adapters.state import saved_tensors, trainable

from ..tiny_models import VOCABULARY, tiny_model

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    ),
    "tied": LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=True,
    ),
    "qwen2": Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    ),
    "mixtral": MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    ),
    "qwen3_moe": Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=6, num_experts_per_tok=3, max_position_embeddings=64,
    ),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}  # fmt: skip
FIELDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "alpha": 8},
    "rasa": {"r": 4, "alpha": 8},
    "vera": {"r": 16},
    "mora": {"r": 4},
    "tied-lora": {"r": 4},
    "sharelora": {"r": 4, "alpha": 8},
    "nola": {"r": 4, "n_basis": 8},
    "vb-lora": {"r": 4, "num_vectors": 16, "vector_length": 8},
    "olora": {"r": 4, "alpha": 8},
    "pissa": {"r": 4, "alpha": 8},
    "dora": {"r": 4, "alpha": 8},
    "adalora": {"r": 4, "alpha": 8},
    "prilora": {"r": 4, "alpha": 8},
    "full": {},
    "bitfit": {},
    "peft": {"config": {"peft_type": "LOHA", "r": 4, "target_modules": ["q_proj", "down_proj"]}},
}
"""Hyper-parameters of every method that fit the bases."""
TOKENS = torch.randint(0, VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(5))


def save_base(directory: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, shards: str = "1GB") -> Path:
    if kind not in CONFIGS:
        tiny_model(kind).to(dtype).save_pretrained(directory)
        return directory
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "experts" in name:  # some models leave them empty
                p.normal_(std=0.1)
    model.save_pretrained(directory, max_shard_size=shards)
    return directory


def save_adapter(
    directory: Path, base: Path, method: str = "rasa", *, tokens: Tensor | None = None, **fields: object
) -> Tensor:
    """Attach a method to the base, give every trained tensor random values (both signs), save it.

    Returns the logits of the adapted model.
    """
    torch.manual_seed(2)
    model = load(base).float()
    fields = {"method": method, **FIELDS.get(method, {"r": 4, "alpha": 8}), **fields}
    config = METHODS[method].model_validate(fields)
    model, _ = adapt(model, config)
    with torch.no_grad():
        for p in trainable(model).values():
            p.copy_(torch.randn_like(p) * 0.3)
    directory.mkdir(parents=True)
    write_adapter(directory, config, saved_tensors(model), base_model=str(base), base_revision=None)
    return logits(model, TOKENS if tokens is None else tokens)


def load(directory: Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    return model.eval()(input_ids=tokens).logits


@pytest.fixture
def case(tmp_path: Path) -> Callable[..., tuple[Path, Path, Tensor]]:
    """case(kind, ...) -> base directory, adapter directory, logits of base + adapter."""

    def make(kind: str = "llama", *, shards: str = "1GB", **fields: object) -> tuple[Path, Path, Tensor]:
        base = save_base(tmp_path / "base", kind, shards=shards)
        return base, tmp_path / "adapter", save_adapter(tmp_path / "adapter", base, **fields)

    return make
