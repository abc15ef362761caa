"""What a merge counts while it writes: sizes, updates and what rounding loses of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Tally:
    """Size of one output file, and squared norms over the adapted weights in the file."""

    bytes: int = 0
    """Size of the file."""
    update2: float = 0.0
    """Squared norm of dW."""
    error2: float = 0.0
    """Squared norm of the error from rounding to the output's dtype."""
    aware: dict[str, int] = field(default_factory=dict)
    """Number of directions of each tensor that was rounded with error feedback, by the tensor's name."""
    kept: tuple[str, Tensor] | None = None
    """Name and update of the parameter whose pieces are being written."""


def norm2(t: Tensor) -> float:
    """Return the squared norm of a tensor."""
    return float(torch.linalg.vector_norm(t)) ** 2
