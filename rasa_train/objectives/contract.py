"""The contract of an objective: what a run minimises, and the tensors that it is computed from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar

import numpy as np
from torch import Tensor, nn

from ..data.cache import TokenDataset
from ..data.encode import Example

Batch = Mapping[str, Tensor | int]
"""The keyword arguments of a model for some examples: tensors, and the lengths that attention takes as numbers."""
Loss = Callable[[nn.Module, Batch], Tensor]
"""The loss of a batch, a sum over its targets, by the model or the wrapper that a strategy has put around it."""


class Objective(ABC):
    """A loss that is a sum over targets. A step divides the sum by the number of targets in its global batch."""

    causal: ClassVar[bool] = True
    """Whether no target may depend on the tokens after it."""

    @abstractmethod
    def tensors(self, examples: Sequence[Example], *, flat: bool) -> Batch:
        """Make the tensors of a batch: right-padded, or one row (``flat``)."""

    @abstractmethod
    def install(self, model: nn.Module) -> Loss:
        """Let the model return the loss of a batch, and return the function that calls it."""

    @abstractmethod
    def with_logits(self, model: nn.Module) -> AbstractContextManager[None]:
        """Let the model return logits again inside the block, so that it can generate."""

    @abstractmethod
    def targets(self, dataset: TokenDataset, indices: np.ndarray | slice = slice(None)) -> int:
        """Return the number of targets in these examples, or in all of them."""
