"""The gradients of one optimizer step, and the loss of a held-out set."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from ..data.ahead import ahead
from ..data.batching import Limit
from ..data.cache import TokenDataset
from ..distributed import collectives
from ..errors import UserError
from . import micro_batches
from .micro_batches import Step, batch_of, on_device
from .trainable_model import TrainableModel


def train_step(model: TrainableModel, train: TokenDataset, work: Step, step: int) -> float | None:
    """Compute the gradients of a global batch, accumulated over the micro-batches of this worker. Returns the mean loss
    over the targets of the global batch; None if a worker ran out of memory.

    Args:
        step: number of the step, from 0; dropout masks depend on it.
    Raises:
        torch.OutOfMemoryError: memory ran out where workers wait for each other in the forward pass, and cannot retry.
    """
    engine = model.engine
    mine, failed = None, 0.0
    try:
        with model.packed():
            mine = accumulate(model, train, work, step)
    except torch.OutOfMemoryError:
        if engine.sharded:
            raise
        failed = 1.0
    if failed and engine.accelerator.device.type == "cuda":
        torch.cuda.empty_cache()  # free memory may be fragmented into pieces that are too small
    # The loss is read here and not inside ``packed``: there the host would wait for the GPU before it queues the work
    # that ``packed`` does at its end.
    loss_sum, failed = collectives.sum_over_workers(engine.accelerator, [0.0 if mine is None else float(mine), failed])
    return None if failed else loss_sum / model.objective.targets(train, work.batch)


def accumulate(model: TrainableModel, train: TokenDataset, work: Step, step: int) -> Tensor:
    """Run forward and backward of this worker's micro-batches. Returns the sum of their losses: fp64, on the device."""
    engine, recipe = model.engine, model.recipe
    accelerator = engine.accelerator
    targets = model.objective.targets(train, work.batch)
    loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for i, (indices, tensors) in enumerate(zip(work.mine, work.tensors, strict=True)):
        last = i + 1 == len(work.mine)
        torch.manual_seed(micro_batches.micro_batch_seed(recipe.seed, step, int(indices[0]) if len(indices) else -1))
        with engine.synchronizing(last):
            # The stand-in for an empty micro-batch must not enter any statistics; but workers that gather weights
            # from each other must all run the same code.
            engine.model.train(len(indices) > 0 or engine.sharded)
            loss = model.loss(on_device(tensors, accelerator.device))
            loss_sum += loss.detach()
            if recipe.training.loss_average == "tokens":
                weight = 1.0 / targets
            else:  # the mean of each micro-batch, then the mean of these
                weight = 1.0 / (max(model.objective.targets(train, indices), 1) * work.micro_batches)
            loss = loss * weight * accelerator.num_processes  # engines average gradients; the sum is wanted
            if last and (penalty := recipe.adapter.penalty(model.adapters)) is not None:
                loss = loss + penalty
            if not loss.requires_grad:
                raise nothing_trains(len(model.sites))
            engine.backward(loss, last=last)
    return loss_sum


@torch.no_grad()
def validate(model: TrainableModel, dataset: TokenDataset, limit: Limit) -> tuple[float, dict[int, float]]:
    """Return the mean loss over the targets of the held-out examples, and that of each set they are from, by its place
    among the sets. The examples of a micro-batch are from one set, so no example is computed twice."""
    engine, accelerator, lengths = model.engine, model.engine.accelerator, dataset.lengths
    engine.model.eval()
    by_length = np.argsort(-lengths, kind="stable")
    places = [int(place) for place in np.unique(dataset.origins)]
    losses = []
    for place in places:
        examples = by_length[dataset.origins[by_length] == place]
        mine = limit.split(examples, lengths, accelerator.num_processes)[accelerator.process_index]
        with closing(ahead(batch_of(model, dataset, indices) for indices in mine)) as batches:
            losses.append(sum(float(model.loss(on_device(batch, accelerator.device))) for batch in batches))
    engine.release()
    losses = collectives.sum_over_workers(accelerator, losses)
    targets = [model.objective.targets(dataset, np.flatnonzero(dataset.origins == place)) for place in places]
    each = {place: loss / number for place, loss, number in zip(places, losses, targets, strict=True)}
    return sum(losses) / sum(targets), each


def nothing_trains(linears: int) -> UserError:
    return UserError(
        f"adapter.targets: the first step has changed nothing: no gradient reaches any of the {linears} adapted "
        "linears, so the run would train for nothing. Choose linears that the model calls with adapter.targets",
        key="adapter.targets",
    )
