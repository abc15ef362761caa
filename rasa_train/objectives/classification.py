"""The summed loss of texts that are classified, computed inside the model's forward, in fp32.

The loss of a text is that of transformers: the cross-entropy of its label (``single_label``), the binary cross-entropy
of each label, their mean over the labels (``multi_label``), or the squared error of its number (``regression``).
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

from ..data.cache import TokenDataset
from ..data.encode import Example
from ..data.encode_texts import NO_TYPE
from ..models.families import most_tokens
from ..models.task import Head, Problem
from .contract import Batch, Loss, Objective

MULTIPLE = 8
"""The length of a batch, in tokens, is a multiple of this, if the model can read so many."""


class Classification(Objective):
    """The objective of sequence classifiers. Its targets are the texts."""

    causal = False

    def __init__(self, head: Head) -> None:
        self.problem: Problem = head.problem
        self.outputs = head.outputs
        self._pad, self._most, self._types = 0, None, False

    def tensors(self, examples: Sequence[Example], *, flat: bool) -> Batch:
        """Make the tensors of a batch, right-padded. ``targets`` has the answers of the texts: int64, shape (texts,),
        for ``single_label``, else fp32, shape (texts, values); no rows for a stand-in that has no answer."""
        assert not flat
        texts = [example for example in examples if example.token_types is not None]
        longest = max(len(example.input_ids) for example in examples)
        length = max(longest, min(-(-longest // MULTIPLE) * MULTIPLE, self._most or longest + MULTIPLE))
        typed = self._types and all(text.token_types.min() != NO_TYPE for text in texts)  # type: ignore[union-attr]
        rows = {"input_ids": np.full((len(examples), length), self._pad, np.int64)}
        for name in ("attention_mask", *["token_type_ids"][:typed]):
            rows[name] = np.zeros((len(examples), length), np.int64)
        for row, (ids, _, types) in enumerate(examples):
            rows["input_ids"][row, : len(ids)] = ids
            rows["attention_mask"][row, : len(ids)] = 1
            if typed and types is not None:
                rows["token_type_ids"][row, : len(ids)] = types
        values = 1 if self.problem == "single_label" else self.outputs
        answers = torch.from_numpy(np.array([text.labels for text in texts], np.float64).reshape(-1, values))
        targets = answers[:, 0].long() if self.problem == "single_label" else answers.float()
        return {**{name: torch.from_numpy(row) for name, row in rows.items()}, "targets": targets}

    def install(self, model: nn.Module) -> Loss:
        """Make ``model(**batch)`` return the loss of a batch, in fp32. The loss of a model that another library (PEFT)
        has wrapped is computed outside of it, from its logits."""
        self.look_at(model)
        if not isinstance(model, PreTrainedModel):
            return lambda wrapped, batch: _loss(wrapped, self.problem, **batch)  # type: ignore[arg-type]
        model.forward = partial(_loss, model.forward, self.problem)
        return lambda called, batch: called(**batch)

    def look_at(self, model: nn.Module) -> None:
        """Make batches for this model from now on: with its padding, and token types if it takes them."""
        config: Any = model.config
        text = config.get_text_config()
        self._pad, self._most = text.pad_token_id or 0, most_tokens(model)
        base = model if isinstance(model, PreTrainedModel) else model.get_base_model()  # type: ignore[operator]
        takes = "token_type_ids" in inspect.signature(base.forward).parameters
        self._types = takes and getattr(text, "type_vocab_size", 2) > 1

    @contextmanager
    def with_logits(self, model: nn.Module) -> Iterator[None]:
        forward = model.__dict__.pop("forward", None)
        try:
            yield
        finally:
            if forward is not None:
                model.__dict__["forward"] = forward

    def targets(self, dataset: TokenDataset, indices: np.ndarray | slice = slice(None)) -> int:
        return len(dataset.lengths[indices])


def _loss(forward: Callable[..., Any], problem: Problem, targets: Tensor, **inputs: Any) -> Tensor:
    """Return the sum of the losses of the first ``len(targets)`` texts."""
    logits: Tensor = forward(**inputs).logits[: len(targets)].float()
    if problem == "single_label":
        return F.cross_entropy(logits, targets, reduction="sum")
    if problem == "multi_label":
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / logits.shape[1]
    return F.mse_loss(logits, targets, reduction="sum")
