"""What a recipe will do, before it does it: parameters, steps, memory. ``rasa-train --check`` prints this."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from .adapters.base import Site
from .adapters.inject import adapters, attach, trainable
from .data.prepare import PreparedData
from .model import count_parameters, meta_model
from .optim import LionW
from .recipe.schema import Recipe


def plan(recipe: Recipe, data: PreparedData | None) -> dict[str, Any]:
    """The facts of a run; null for what cannot be known without the data.

    Raises:
        UserError: the architecture is not to be had, or the adapter does not fit it.
    """
    model = meta_model(recipe.model)
    total = count_parameters(model)
    with torch.device("meta"):
        sites = attach(model, recipe.adapter)
    trained = sum(p.numel() for p in trainable(model).values())
    training = recipe.training
    steps_per_epoch = math.ceil(len(data.train) / training.batch_size) if data else None
    steps = training.max_steps or (training.epochs * steps_per_epoch if steps_per_epoch else None)
    kinds: dict[str, dict[str, int]] = {}
    for adapter in adapters(model).values():
        kind = kinds.setdefault(adapter.site.kind, {"sites": 0, "effective_rank": adapter.effective_rank})
        kind["sites"] += 1
        kind["effective_rank"] = max(kind["effective_rank"], adapter.effective_rank)
    return {
        "method": recipe.adapter.method,
        "trainable_parameters": trained,
        "total_parameters": total,
        "trainable_share": trained / total,
        "effective_rank": {kind: facts["effective_rank"] for kind, facts in kinds.items()},
        "sites": {kind: facts["sites"] for kind, facts in kinds.items()},
        "steps_per_epoch": steps_per_epoch,
        "optimizer_steps": steps,
        "examples": len(data.train) if data else None,
        "validation_examples": len(data.validation) if data and data.validation else (0 if data else None),
        "dropped_examples": data.stats.dropped_over_length + data.stats.dropped_unsupervised if data else None,
        "tokens": int(data.train.lengths.sum()) if data else None,
        "supervised_tokens": int(data.train.supervised.sum()) if data else None,
        "longest_example": int(data.train.lengths.max()) if data else None,
        "memory_bytes": memory(recipe, model, sites, trained, total, data),
    }


def memory(
    recipe: Recipe, model: PreTrainedModel, sites: list[Site], trained: int, total: int, data: PreparedData | None
) -> dict[str, int | None]:
    """Estimate per worker, by part. Exact for what is counted; ``activations`` and ``logits`` are a model of the
    longest micro-batch: what the frozen layers keep for the backward pass, and the loss over the vocabulary."""
    config: PretrainedConfig = model.config.get_text_config()
    bytes_each = 4 if recipe.model.dtype == "float32" else 2
    states = 1 if isinstance(recipe.training.optimizer, LionW) else 2
    parts: dict[str, int | None] = {
        "base_weights": total * bytes_each,
        "adapter_parameters": trained * 4,
        "gradients": trained * 4,
        "optimizer_state": trained * 4 * states,
        "activations": None,
        "logits": None,
    }
    longest = int(data.train.lengths.max()) if data else recipe.data.max_length
    size = recipe.training.micro_batch_size
    if size == "auto":
        size = max(1, min(16_384 // longest, recipe.training.batch_size))
    tokens = size * longest
    per_layer = (
        4 * config.hidden_size + sum(s.in_features + s.out_features for s in sites if s.layer == 0)
    ) * bytes_each
    layers = config.num_hidden_layers
    kept = (
        layers * config.hidden_size * bytes_each + per_layer
        if recipe.training.activation_checkpointing
        else layers * per_layer
    )
    parts["activations"] = tokens * kept
    parts["logits"] = tokens * config.vocab_size * (bytes_each + 8)
    parts["total"] = sum(v for v in parts.values() if v is not None)
    return parts
