"""The limit on what each worker computes at once, and the tensors of its micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..data.batching import Limit, plan_epoch
from ..data.cache import TokenDataset
from ..data.encode import IGNORE, Example
from ..distributed import collectives
from ..models.layers import checkpoint_layers
from ..objectives.contract import Batch
from ..recipe.schema import TrainingConfig
from . import memory_search
from .trainable_model import TrainableModel


@dataclass(frozen=True)
class Step:
    """One worker's part of a step, and the facts about the whole step that it needs."""

    batch: np.ndarray
    """Indices of the examples of the global batch."""
    mine: list[np.ndarray]
    """Indices of the examples of each micro-batch of this worker; empty where another worker has more to do."""
    tensors: list[Batch]
    """Tensors of each micro-batch, in host memory (pinned for a GPU)."""
    micro_batches: int
    """Number of micro-batches of all workers that are not empty."""


def plan_steps(
    model: TrainableModel, train: TokenDataset, limit: Limit, steps: range, steps_per_epoch: int
) -> Iterator[Step]:
    """Yield this worker's part of each of the ``steps``, with its tensors."""
    training, epoch_now, batches = model.recipe.training, -1, list[np.ndarray]()
    for step in steps:
        epoch, position = divmod(step, steps_per_epoch)
        if epoch != epoch_now:
            epoch_now, batches = (
                epoch,
                plan_epoch(
                    train.lengths,
                    batching=training.batching,
                    batch_size=training.batch_size,
                    seed=model.recipe.seed,
                    epoch=epoch,
                    shown=train.epoch(model.recipe.seed, epoch),
                ),
            )
        yield step_of(model, train, batches[position], limit)


def step_of(model: TrainableModel, train: TokenDataset, batch: np.ndarray, limit: Limit) -> Step:
    """Return this worker's part of a global batch."""
    accelerator = model.engine.accelerator
    divided = limit.split(batch, train.lengths, accelerator.num_processes)
    mine = divided[accelerator.process_index]
    tensors = [batch_of(model, train, indices) for indices in mine]
    return Step(batch, mine, tensors, sum(len(m) > 0 for worker in divided for m in worker))


def batch_of(model: TrainableModel, dataset: TokenDataset, indices: np.ndarray) -> Batch:
    """Make the tensors of these examples for the objective, in pinned memory if they go to a GPU.

    If there are no examples (the worker has less to do than others), the result is one unsupervised sequence, so that
    every worker calls the model equally often."""
    nothing = [Example(np.zeros(8, np.int32), np.full(8, IGNORE, np.int32))]
    examples = [dataset[i] for i in indices] or nothing
    batch, device = model.objective.tensors(examples, flat=model.recipe.training.flat), model.engine.accelerator.device
    if device.type != "cuda":
        return batch
    with torch.cuda.device(device):  # a new thread uses the first GPU, even if this worker has another
        return {name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in batch.items()}


def on_device(batch: Batch, device: torch.device) -> Batch:
    return {n: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for n, v in batch.items()}


def fit(model: TrainableModel, train: TokenDataset, say: Callable[[str], None]) -> Limit:
    """Choose how much each worker computes at once. ``auto`` on a GPU: as much as memory allows, tried with the longest
    examples, and as few recomputed layers as possible; ``auto`` on a CPU: 4k tokens and no recomputed layers.

    Workers that wait for each other in the forward pass cannot try: one that runs out of memory would hold up the
    rest. They compute 16k tokens at once, and recompute all layers.

    Raises:
        UserError: even the longest example alone does not fit on every worker.
    """
    engine, training = model.engine, model.recipe.training
    workers, longest = engine.accelerator.num_processes, int(train.lengths.max())
    limit = partial(limit_of, training, train, workers)
    if engine.accelerator.device.type != "cuda":
        if training.activation_checkpointing == "auto":
            checkpoint_layers(model.module, 0)
        return limit(memory_search.ON_CPU)
    if engine.sharded:
        return limit(memory_search.MOST)
    layers = len(model.layers)
    wanted = limit(memory_search.MOST)
    auto = training.micro_batch_size == "auto" and training.micro_batch_tokens is None
    given = wanted.tokens or (wanted.examples or 1) * longest

    def fits(setting: memory_search.Setting) -> bool:
        if training.activation_checkpointing == "auto":
            checkpoint_layers(model.module, setting.checkpointed)
        return memory_suffices(model, train, limit(setting.tokens))

    setting = memory_search.search(
        fits,
        longest=longest,
        layers=layers,
        tokens="auto" if auto else given,
        checkpointing=training.activation_checkpointing,
    )
    if training.activation_checkpointing == "auto":
        checkpoint_layers(model.module, setting.checkpointed)
    recomputed = f"{setting.checkpointed} of {layers} layers recomputed"
    if training.activation_checkpointing == "light":
        recomputed = "what is cheap is recomputed"
    say(f"{setting.tokens:,} tokens at a time, {recomputed}")
    return limit(setting.tokens)


def memory_suffices(model: TrainableModel, train: TokenDataset, limit: Limit) -> bool:
    """Whether the largest micro-batch and the optimizer's state fit on every worker's GPU, with
    ``memory_search.MARGIN`` of its memory to spare. The trial leaves no trace in the model."""
    engine, training = model.engine, model.recipe.training
    device = engine.accelerator.device
    by_length = np.argsort(-train.lengths, kind="stable")
    ends = np.cumsum(train.lengths[by_length])
    number = limit.examples or max(1, int((ends <= (limit.tokens or 0)).sum()))
    batch = batch_of(model, train, by_length[:number])
    rules = {name: tensor.clone() for name, tensor in model.rule_state.items()}
    size = training.optimizer.moments * sum(p.nbytes for p in model.parameters.values())  # fp32, as its state is
    spare = int(memory_search.MARGIN * torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else 0

    def attempt() -> None:  # a function, so that none of its tensors is held afterwards
        room = torch.empty(size, dtype=torch.uint8, device=device), torch.empty(spare, dtype=torch.uint8, device=device)
        with model.packed(), engine.synchronizing(False):
            engine.backward(model.loss(on_device(batch, device)), last=False)
        del room

    failed = 0.0
    engine.model.train()
    try:
        attempt()
    except torch.OutOfMemoryError:
        failed = 1.0
    model.restore(rules)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return collectives.sum_over_workers(engine.accelerator, [failed])[0] == 0


def limit_of(training: TrainingConfig, train: TokenDataset, workers: int, budget: int) -> Limit:
    """Return the recipe's limit; for ``auto`` about ``budget`` tokens, such that every worker has something to do."""
    most = math.ceil(training.batch_size / workers)
    if training.micro_batch_tokens:
        return Limit(tokens=training.micro_batch_tokens)
    if training.micro_batch_size != "auto":
        return Limit(examples=min(training.micro_batch_size, most))
    if training.flat:
        return Limit(tokens=budget, multiple_of=workers)
    return Limit(examples=max(1, min(budget // int(train.lengths.max()), most)))


def micro_batch_seed(seed: int, step: int, example: int) -> int:
    """Return the seed of the dropout masks of the micro-batch of ``step`` that begins with ``example``. The seed does
    not depend on the number of workers, so there is no RNG state to save, and a resumed run draws the masks that the
    uninterrupted run would draw."""
    return ((seed * 1_000_003 + step) * 16_777_619 + example) % 2**63
