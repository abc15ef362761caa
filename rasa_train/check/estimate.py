"""Facts about a run before it starts: parameters, steps, memory. ``rasa-train check`` prints them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..adapters.inject import adapt
from ..adapters.site import Site
from ..adapters.state import adapters, effective_ranks, saved_tensors, trainable
from ..data.prepare import PreparedData, known_head
from ..distributed.config import STRATEGIES, Capabilities, Strategy
from ..kernels.linear_cross_entropy import CHUNK
from ..models.families import decoder_layers, has_plain_head
from ..models.load import count_parameters, meta_model
from ..models.padding_free import check_packable
from ..recipe.schema import Recipe
from ..training.memory_search import MOST, ON_CPU

USABLE = 0.9
"""Share of the memory that workers may fill: the rest is for CUDA, NCCL's buffers and fragments, or the system."""


@dataclass(frozen=True)
class Estimate:
    """Facts about a run before it starts. None stands for a fact that cannot be known without the data."""

    method: str
    trainable_parameters: int
    total_parameters: int
    trainable_share: float
    effective_rank: dict[str, int]
    """Largest effective rank of each kind."""
    sites: dict[str, int]
    """Number of adapted linears of each kind."""
    steps_per_epoch: int | None
    optimizer_steps: int | None
    examples: int | None
    validation_examples: int | None
    dropped_examples: int | None
    tokens: int | None
    supervised_tokens: int | None
    longest_example: int | None
    median_example: float | None
    truncated_examples: int | None
    contaminated_rows: int | None
    """Rows that have questions of an evaluation set; None unless ``data.decontaminate`` looks for them."""
    contaminated_rows_by_set: dict[str, int]
    duplicates: int | None
    """Training examples that equal an earlier one and are dropped; None unless ``data.deduplicate`` looks for them."""
    disk_bytes_needed: int | None
    strategy: Strategy
    workers: int
    micro_batch_size: int | None
    """None where micro-batches are limited by tokens alone."""
    micro_batch_tokens: int
    longest: int
    """Most tokens of an example: those of ``longest_example``, or the recipe's limit."""
    memory_bytes: dict[str, int]
    """Memory of a worker by part, and their ``total``."""
    memory_bytes_least: int
    """Memory of a worker with the fewest tokens and the most recomputed layers that the search before the first step on
    a GPU may choose; the ``total`` where nothing is searched for."""
    memory_bytes_by_strategy: dict[Strategy, int]
    advice: list[str]
    examples_by_dataset: dict[str, int] | None
    """Examples of each set in an epoch."""
    tokens_by_dataset: dict[str, int] | None
    """Tokens of each set in an epoch; the mean over epochs if these show different examples."""


def plan(recipe: Recipe, data: PreparedData | None, workers: int = 1, *, on_cpu: bool = False) -> Estimate:
    """Return the facts of a run: on GPUs, unless it is to run ``on_cpu``.

    Raises:
        UserError: the architecture is not available, or the adapter does not fit it.
    """
    head = data.head if data else known_head(recipe.data, recipe.task)
    model = meta_model(recipe.model, head)
    if recipe.training.flat:
        check_packable(model)
    total = count_parameters(model)
    with torch.device("meta"):
        model, sites = adapt(model, recipe.adapter)
    trained = sum(p.numel() for p in trainable(model).values())
    training = recipe.training
    steps_per_epoch = math.ceil(len(data.train) / training.batch_size) if data else None
    steps = training.max_steps or (training.epochs * steps_per_epoch if steps_per_epoch else None)
    found = int(data.train.lengths.max()) if data else None
    longest = found or recipe.data.max_length
    size, tokens = _micro_batch(recipe, longest, workers, ON_CPU if on_cpu else MOST)
    parts = {strategy: memory(recipe, model, sites, strategy, workers, tokens=tokens) for strategy in STRATEGIES}
    totals = {strategy: part["total"] for strategy, part in parts.items()}
    strategy = recipe.distributed.strategy
    least = totals[strategy]
    if not on_cpu and STRATEGIES[strategy].stage == 0:
        smallest = _micro_batch(recipe, longest, workers, longest)[1]
        least = memory(_recomputed(recipe), model, sites, strategy, workers, tokens=smallest)["total"]
    return Estimate(
        method=recipe.adapter.method,
        trainable_parameters=trained,
        total_parameters=total,
        trainable_share=trained / total,
        effective_rank=effective_ranks(model),
        sites=dict(Counter(adapter.site.kind for adapter in adapters(model).values())),
        steps_per_epoch=steps_per_epoch,
        optimizer_steps=steps,
        examples=len(data.train) if data else None,
        validation_examples=len(data.validation or ()) if data else None,
        dropped_examples=data.stats.dropped_over_length + data.stats.dropped_unsupervised if data else None,
        tokens=data.stats.tokens if data else None,
        supervised_tokens=data.stats.supervised_tokens if data else None,
        longest_example=found,
        median_example=float(np.median(data.train.lengths)) if data else None,
        truncated_examples=data.stats.truncated if data else None,
        contaminated_rows=data.stats.contaminated_rows if data and recipe.data.decontaminate else None,
        contaminated_rows_by_set=data.stats.contaminated if data else {},
        duplicates=data.stats.duplicates if data and recipe.data.deduplicate else None,
        disk_bytes_needed=disk_bytes(recipe, model, steps, steps_per_epoch),
        strategy=strategy,
        workers=workers,
        micro_batch_size=size,
        micro_batch_tokens=tokens,
        longest=longest,
        memory_bytes=parts[strategy],
        memory_bytes_least=least,
        memory_bytes_by_strategy=totals,
        advice=advice(recipe, totals, workers),
        examples_by_dataset=data.examples_by_dataset if data else None,
        tokens_by_dataset=data.tokens_by_dataset if data else None,
    )


def disk_bytes(recipe: Recipe, model: nn.Module, steps: int | None, steps_per_epoch: int | None) -> int | None:
    """Return the bytes of the checkpoints (one more than are kept, while it is written) and of the final adapter."""
    training = recipe.training
    every = steps_per_epoch if isinstance(training.checkpoint_every, str) else training.checkpoint_every
    if steps is None or every is None:
        return None
    adapter = sum(_bytes(tensor) for tensor in saved_tensors(model).values())
    moments = training.optimizer.moments
    state = moments * 4 * sum(p.numel() for p in trainable(model).values())
    number = math.ceil(steps / every)
    kept = number if training.keep_last is None else min(number, training.keep_last + 1)
    return (kept + bool(training.keep_best)) * (adapter + state) + adapter


def _recomputed(recipe: Recipe) -> Recipe:
    """Return the recipe with all layers recomputed if it leaves that to the search."""
    if recipe.training.activation_checkpointing != "auto":
        return recipe
    training = recipe.training.model_copy(update={"activation_checkpointing": True})
    return recipe.model_copy(update={"training": training})


def _micro_batch(recipe: Recipe, longest: int, workers: int, most: int) -> tuple[int | None, int]:
    """Return the most sequences of a micro-batch, None where only tokens are limited, and its most tokens; for ``auto``
    about ``most`` tokens."""
    wanted = recipe.training.micro_batch_size
    if recipe.training.flat and wanted == "auto":
        return None, max(recipe.training.micro_batch_tokens or most, longest)
    size = max(1, most // longest) if wanted == "auto" else wanted
    size = min(size, math.ceil(recipe.training.batch_size / workers))
    return size, size * longest


def memory(
    recipe: Recipe, model: PreTrainedModel, sites: list[Site], strategy: Strategy, workers: int, *, tokens: int
) -> dict[str, int]:
    """Estimate one worker's GPU memory in bytes, by part. Most parts are counted and exact. ``activations`` and
    ``logits`` come from a model of the largest micro-batch, of ``tokens`` tokens with padding: the activations that
    layers keep for the backward pass unless they are recomputed (``auto``: no layer is, but all of them are where
    workers wait for each other in the forward pass), and the loss over the vocabulary."""
    config: PretrainedConfig = model.config.get_text_config()
    half = 4 if recipe.model.dtype == "float32" else 2
    # All trained parameters are fp32; trained base weights (full fine-tuning) have no second copy.
    of_base = {id(p): p.numel() for n, p in model.named_parameters() if p.requires_grad and recipe.adapter.trains(n)}
    trained = sum(p.numel() for p in trainable(model).values())
    adapter = trained - sum(of_base.values())
    base = sum(p.numel() * (4 if id(p) in of_base else half) for p in model.parameters()) - adapter * half
    moments = recipe.training.optimizer.moments
    if recipe.model.quantization == "nf4":  # 4 bits, and a scale of 8 bits for each 64 of them
        linears = sum(math.prod((*s.lead, *s.shape)) for s in sites if s.num_experts is None)
        base -= int(linears * (half - 0.5 - 1 / 64))
    capabilities = STRATEGIES[strategy]

    def divided(size: int, from_stage: int) -> int:
        return math.ceil(size / workers) if capabilities.stage >= from_stage else size

    offload = recipe.distributed.offload if strategy == recipe.distributed.strategy else "none"
    parts = {
        "base_weights": 0 if offload == "all" else divided(base, 3),
        "adapter_parameters": divided(adapter * 4, 3) if capabilities.divides_adapter else adapter * 4,
        "gradients": divided(trained * 4, 2),
        "optimizer_state": 0 if offload != "none" else divided(trained * 4 * (moments + capabilities.own_masters), 1),
    }
    if capabilities.divides_weights and (workers > 1 or offload == "all"):
        parts["gathered_weights"] = _gathered(model, capabilities)
    per_layer = (4 * config.hidden_size + sum(s.in_features + s.out_features for s in sites if s.layer == 0)) * half
    layers = config.num_hidden_layers
    wanted = recipe.training.activation_checkpointing
    if wanted == "light":  # only the results of products and attention are kept
        per_layer = (3 * config.hidden_size + sum(s.out_features for s in sites if s.layer == 0)) * half
        wanted = False
    if wanted == "auto":
        wanted = capabilities.stage > 0
    recomputed = layers if wanted is True else min(int(wanted), layers)
    kept = recomputed * config.hidden_size * half + (layers - recomputed + bool(recomputed)) * per_layer
    if recipe.training.activation_offload:
        kept = per_layer  # only for the layer that is being computed
    parts["activations"] = tokens * kept
    chunked = has_plain_head(model)
    outputs = config.vocab_size if recipe.task.name == "causal_lm" else 0  # a classifier has a few for each text
    parts["logits"] = outputs * (min(tokens, CHUNK) * half if chunked else tokens * (half + 8))
    parts["total"] = sum(parts.values())
    return parts


def _gathered(model: nn.Module, capabilities: Capabilities) -> int:
    """Return the bytes of the weights that are whole at one time: those of a layer, of the next layer, which is fetched
    meanwhile, and of the parameters outside the layers (FSDP: all of them; ZeRO-3: one of them)."""
    layers = [[p for p in layer.parameters()] for layer in decoder_layers(model)]
    inside = {id(p) for layer in layers for p in layer}
    outside = [_bytes(p) for p in model.parameters() if id(p) not in inside]
    rest = sum(outside) if capabilities.gathers_the_rest_at_once else max(outside, default=0)
    return 2 * max(sum(map(_bytes, layer)) for layer in layers) + rest


def _bytes(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()


def advice(recipe: Recipe, totals: Mapping[Strategy, int], workers: int) -> list[str]:
    """Return advice on the strategy for the GPU named in the recipe, or else for this machine's; empty without one."""
    size = recipe.distributed.gpu_memory_gib
    if size is None and torch.cuda.is_available():
        size = torch.cuda.get_device_properties(0).total_memory / 2**30
    if size is None:
        return []
    fits = [strategy for strategy, total in totals.items() if total <= USABLE * size * 2**30]
    if fits:
        best = fits[0]  # in the order of STRATEGIES each divides more, and so exchanges more, than the one before
        return [f"distributed.strategy={best}: {totals[best] / 2**30:,.1f} of {size:,.0f} GiB"]
    least = min(totals, key=lambda strategy: totals[strategy])
    ways = [] if recipe.training.activation_checkpointing else ["training.activation_checkpointing=true"]
    ways += ["training.micro_batch_size=1", "data.max_length", "more workers"]
    ways += ["distributed.offload=all with zero3"] if workers > 1 else ["distributed.strategy=zero3 offload=all"]
    return [f"no strategy fits {size:,.0f} GiB; {least} needs {totals[least] / 2**30:,.1f}. Try", *ways]
