"""The summed cross-entropy of the supervised tokens, computed inside the model's forward.

Only the hidden states that predict a supervised token reach the LM head, and logits exist for one chunk of those
states at a time. The loss is computed in forward because DDP, ZeRO-3 and FSDP2 gather weights and reduce gradients
around that call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.batching import collate, flatten, with_targets
from ..data.cache import TokenDataset
from ..data.encode import Example
from ..kernels.linear_cross_entropy import linear_cross_entropy
from ..models.families import PREFIX_MODELS, has_plain_head
from ..models.words import ROWS, first_of
from .contract import Batch, Loss, Objective


class NextToken(Objective):
    """The objective of causal language models. Its targets are the supervised tokens."""

    def tensors(self, examples: Sequence[Example], *, flat: bool) -> Batch:
        return with_targets((flatten(examples) if flat else collate(examples, pad_token_id=0)) or {})

    def install(self, model: nn.Module) -> Loss:
        """Make ``model(**batch)`` return the loss of a batch, in fp32.

        A model that another library (PEFT) has wrapped is left unchanged: its loss is computed outside the model, from
        its logits.
        """
        if not isinstance(model, PreTrainedModel):
            return from_logits
        if has_plain_head(model):
            model.set_output_embeddings(LossHead(model.get_output_embeddings()))
            model.forward = partial(_chunked, model)
        else:
            loss = _of_prefix_model if model.config.model_type in PREFIX_MODELS else _of_own_logits
            model.forward = partial(loss, model.forward)
        return lambda model, batch: model(**batch)

    @contextmanager
    def with_logits(self, model: nn.Module) -> Iterator[None]:
        forward = model.__dict__.pop("forward", None)
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        if isinstance(model, PreTrainedModel) and isinstance(head, LossHead):
            model.set_output_embeddings(head.base)
        try:
            yield
        finally:
            if isinstance(model, PreTrainedModel) and isinstance(head, LossHead):
                model.set_output_embeddings(head)
            if forward is not None:
                model.__dict__["forward"] = forward

    def targets(self, dataset: TokenDataset, indices: np.ndarray | slice = slice(None)) -> int:
        return int(dataset.supervised[indices].sum())


def from_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Compute the same loss from all logits of a model that ``install`` has left unchanged."""
    loss: Callable[..., Tensor] = partial(_of_own_logits, model)
    return loss(**batch)


class LossHead(nn.Module):
    """The LM head ``base`` with the same parameter names, returning the loss instead of the logits."""

    base: nn.Linear

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        object.__setattr__(self, "base", base)  # not registered: this module holds its tensors
        self.register_parameter(ROWS, base._parameters.get(ROWS))
        self.first = 0 if self._parameters[ROWS] is None else first_of(base)

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of the cross-entropies, fp32; ``hidden`` (tokens, width), ``targets`` (tokens)."""
        new = self._parameters[ROWS]
        rows = None if new is None else (self.first, new)
        return linear_cross_entropy(hidden, self.weight, self.bias, targets, rows=rows)


def _chunked(model: PreTrainedModel, positions: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
    hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    loss: Tensor = model.get_output_embeddings()(hidden.flatten(0, 1)[positions], targets)
    return loss


def _of_prefix_model(forward: Callable[..., Any], positions: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
    """Compute the loss of a model that is told which tokens are its prompt, whose tokens see each other: here those
    before the first supervised one of a row."""
    rows, length = inputs["input_ids"].shape
    before = positions.new_full((rows,), length)
    before.scatter_reduce_(0, positions // length, positions % length, "amin")
    kinds = (torch.arange(length, device=positions.device) > before[:, None]).long()
    return _of_own_logits(partial(forward, token_type_ids=kinds), positions, targets, **inputs)


def _of_own_logits(forward: Callable[..., Any], positions: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
    """Compute the loss from the model's own logits: only those of the supervised tokens if the batch is one row and
    the model's forward has ``logits_to_keep``, else those of all tokens."""
    keeps = len(inputs["input_ids"]) == 1 and "logits_to_keep" in inspect.signature(forward).parameters
    if keeps:
        logits = forward(**inputs, use_cache=False, logits_to_keep=positions).logits[0]
    else:
        logits = forward(**inputs, use_cache=False).logits.flatten(0, 1)[positions]
    return F.cross_entropy(logits.float(), targets, reduction="sum")
