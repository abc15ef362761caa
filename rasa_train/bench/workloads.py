"""The computation of a step: the tokens, which are the same for every engine, and the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.batching import collate
from ..data.encode import IGNORE, Example
from ..models.padding_free import use_varlen
from ..objectives.next_token import NextToken
from ..training.micro_batches import on_device
from .shapes import LinearStack

SUPERVISED = 0.7
"""Share of an example, at its end, on which the loss is computed, unless the workload says otherwise."""


class Workload(NamedTuple):
    """The sequences of a step, and the adapters' settings that belong to them."""

    description: str
    supervised: float = SUPERVISED
    """Share of an example, at its end, on which the loss is computed."""
    rank: int = 8
    dropout: float = 0.05
    most_tokens: int = 16_384
    """Largest number of tokens of a step on a GPU, unless the command gives a number."""


WORKLOADS = {
    "packed": Workload("sequences of mean length 250 laid end to end, about 70% of their tokens supervised"),
    "long": Workload("4 sequences, as long as the tokens allow"),
    "2x4096": Workload("2 sequences, all tokens supervised: NeMo AutoModel's benchmark", 1.0, 16, 0.1, 8_192),
    "padded": Workload("3 sequences of mean length 250, padded to the longest: the paper's micro-batch"),
}
"""Workloads by name."""
MEAN_LENGTH = 250
"""Mean number of tokens of a MetaMathQA example."""
SPREAD = 0.45
"""Standard deviation of the logarithm of the lengths."""
PAPER_MICRO_BATCH = 3
"""Number of sequences in the paper's micro-batch."""

Loss = Callable[[], Tensor]
"""Runs a forward pass. Returns the mean loss over the supervised tokens."""


@dataclass(frozen=True)
class Problem:
    """A frozen model and the loss to compute with it."""

    base: nn.Module
    loss: Callable[[nn.Module], Loss]
    """Returns the loss, as in training, of a model made from ``base``. May change the model."""
    stock_loss: Callable[[nn.Module], Loss]
    """Returns the loss as transformers computes it: padded, with the logits of every position."""
    tokens: int
    """Number of tokens of the sequences, without padding."""
    width: int
    """Width of the model."""
    dtype: torch.dtype


def lengths(workload: str, tokens: int) -> list[int]:
    """Return the number of tokens of each sequence, the same for the same arguments on every machine. They have
    ``tokens`` tokens together, except in ``padded``, which always has 3 sequences of the mean length."""
    if equal := {"long": 4, "2x4096": 2}.get(workload):
        return [tokens // equal] * equal
    whole = drawn_lengths(max(PAPER_MICRO_BATCH, tokens // 16))
    if workload == "padded":
        return whole[:PAPER_MICRO_BATCH]
    result: list[int] = []
    for length in whole:
        left = tokens - sum(result)
        if left <= length:
            return [*result, left]
        result.append(length)
    raise AssertionError("fewer lengths than tokens / 16 were drawn")


def drawn_lengths(count: int) -> list[int]:
    """Return random lengths of mean ``MEAN_LENGTH``, at least 16, the same each time."""
    random = np.random.default_rng(0)
    centre = np.log(MEAN_LENGTH) - SPREAD**2 / 2  # so that the mean is MEAN_LENGTH
    drawn = np.exp(random.normal(centre, SPREAD, size=count))
    return [max(16, round(length)) for length in drawn.tolist()]


def examples(sizes: list[int], vocabulary: int, supervised: float = SUPERVISED) -> list[Example]:
    """Return sequences of random tokens; the loss is computed on the last ``supervised`` share of each."""
    random = np.random.default_rng(1)
    result = []
    for size in sizes:
        input_ids = random.integers(vocabulary, size=size, dtype=np.int32)
        labels = input_ids.copy()
        labels[: round(size * (1 - supervised))] = IGNORE
        result.append(Example(input_ids, labels))
    return result


def language_model(base: PreTrainedModel, sizes: list[int], *, flat: bool, supervised: float = SUPERVISED) -> Problem:
    """Return the training loss of a model on sequences of these sizes: end to end in one row (``flat``), or padded."""
    made, objective = examples(sizes, base.config.vocab_size, supervised), NextToken()
    stock = on_device(collate(made, pad_token_id=0) or {}, base.device)
    batch = on_device(objective.tensors(made, flat=flat), base.device)
    targets = sum(int((example.labels[1:] != IGNORE).sum()) for example in made)

    def loss(model: nn.Module) -> Loss:
        if flat and isinstance(model, PreTrainedModel):
            use_varlen(model)
        losses = objective.install(model)
        return lambda: losses(model, batch) / targets

    def stock_loss(model: nn.Module) -> Loss:
        return lambda: model(**stock, use_cache=False).loss

    return Problem(base, loss, stock_loss, sum(sizes), base.config.hidden_size, base.dtype)


def linears(base: LinearStack, sizes: list[int], *, padded: bool, dtype: torch.dtype, device: torch.device) -> Problem:
    """Return a loss on the seven linears of one layer, with one row per token and gradients down to the input."""
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
