"""What a step computes: the same tokens for every engine, and the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.batching import collate, flatten, with_targets
from ..data.encode import IGNORE, Example
from ..models.padding_free import use_varlen
from ..objectives.next_token import install
from ..training.micro_batches import on_device
from .shapes import LinearStack

WORKLOADS = {
    "packed": "sequences of mean length 250 laid end to end, about 70% of their tokens supervised",
    "long": "4 sequences, as long as the tokens allow",
    "padded": "3 sequences of mean length 250, padded to the longest: the paper's micro-batch",
}
MEAN_LENGTH = 250
"""Tokens of a MetaMathQA example."""
SPREAD = 0.45
"""Of the logarithm of the lengths."""
SUPERVISED = 0.7
"""Share of an example that carries loss: its end."""
PAPER_MICRO_BATCH = 3

Loss = Callable[[], Tensor]
"""Runs a forward: the mean loss over the supervised tokens."""


@dataclass(frozen=True)
class Problem:
    """A frozen model and what is computed with it."""

    base: nn.Module
    loss: Callable[[nn.Module], Loss]
    """Of a model made from ``base``, as in training. May change the model."""
    stock_loss: Callable[[nn.Module], Loss]
    """The same as transformers computes it: padded, with the logits of every position."""
    tokens: int
    """Of the sequences, without padding."""
    width: int
    """Of the model."""
    dtype: torch.dtype


def lengths(workload: str, tokens: int) -> list[int]:
    """Tokens of each sequence. ``packed`` and ``long`` have ``tokens`` of them together, ``padded`` always 3 of the
    mean length. The same for the same arguments, on every machine."""
    if workload == "long":
        return [tokens // 4] * 4
    random = np.random.default_rng(0)
    centre = np.log(MEAN_LENGTH) - SPREAD**2 / 2  # so that the mean is MEAN_LENGTH
    drawn = np.exp(random.normal(centre, SPREAD, size=max(PAPER_MICRO_BATCH, tokens // 16)))
    whole = [max(16, round(length)) for length in drawn.tolist()]
    if workload == "padded":
        return whole[:PAPER_MICRO_BATCH]
    result: list[int] = []
    for length in whole:
        left = tokens - sum(result)
        if left <= length:
            return [*result, left]
        result.append(length)
    raise AssertionError("fewer lengths than tokens / 16 were drawn")


def examples(sizes: list[int], vocabulary: int) -> list[Example]:
    """Random tokens; the last ``SUPERVISED`` of each sequence carry loss."""
    random = np.random.default_rng(1)
    result = []
    for size in sizes:
        input_ids = random.integers(vocabulary, size=size, dtype=np.int32)
        labels = input_ids.copy()
        labels[: round(size * (1 - SUPERVISED))] = IGNORE
        result.append(Example(input_ids, labels))
    return result


def language_model(base: PreTrainedModel, sizes: list[int], *, flat: bool) -> Problem:
    """The training loss of a model on sequences of these sizes: one after the other in a row (``flat``), or padded."""
    made = examples(sizes, base.config.vocab_size)
    stock = on_device(collate(made, pad_token_id=0) or {}, base.device)
    batch = on_device(with_targets((flatten(made) if flat else collate(made, pad_token_id=0)) or {}), base.device)
    supervised = len(batch["targets"])

    def loss(model: nn.Module) -> Loss:
        if flat and isinstance(model, PreTrainedModel):
            use_varlen(model)
        losses = install(model)
        return lambda: losses(model, batch) / supervised

    def stock_loss(model: nn.Module) -> Loss:
        return lambda: model(**stock, use_cache=False).loss

    return Problem(base, loss, stock_loss, sum(sizes), base.config.hidden_size, base.dtype)


def linears(base: LinearStack, sizes: list[int], *, padded: bool, dtype: torch.dtype, device: torch.device) -> Problem:
    """The seven linears of one layer on as many rows as there are tokens, forward and backward down to the input."""
    rows = len(sizes) * max(sizes) if padded else sum(sizes)
    generator = torch.Generator().manual_seed(1)
    x, g = (torch.randn(rows, base.width, generator=generator).to(device, dtype) for _ in range(2))
    x.requires_grad_()

    def loss(model: nn.Module) -> Loss:
        return lambda: (model(x) * g).sum() / rows

    return Problem(base, loss, loss, sum(sizes), base.width, dtype)


def describe(sizes: list[int]) -> Mapping[str, float]:
    return {
        "sequences": len(sizes),
        "tokens": sum(sizes),
        "longest": max(sizes),
        "mean_length": sum(sizes) / len(sizes),
    }
