"""Dropout of an adapter's input.

On a GPU torch's dropout is one kernel. On a CPU it spends most of its time on drawing random numbers, so four numbers
are made of each draw: an adapter with dropout then costs little more than one without.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary


def dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor | None, float]:
    """Return x with each entry set to zero with probability p and divided by 1 - p otherwise; a mask of x's shape; and
    a number s such that the first result is ``x * mask * s``. Differentiable in x. For p = 0: x itself and no mask.

    On a CPU p is rounded to the nearest multiple of 2^-16.
    """
    if not p:
        return x, None, 1.0
    if has_torch_function_unary(x):
        dropped: tuple[Tensor, Tensor | None, float] = handle_torch_function(dropout, (x,), x, p)
        return dropped
    return _with_few_draws(x, p) if x.device.type == "cpu" else fused(x, p)


def fused(x: Tensor, p: float) -> tuple[Tensor, Tensor, float]:
    """Compute ``dropout`` as one operation."""
    dropped, mask = torch.native_dropout(x, p, True)
    return dropped, mask, 1.0 / (1.0 - p)


def masked(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return the first two results of ``dropout``, for p > 0."""
    dropped, mask, _ = dropout(x, p)
    assert mask is not None
    return dropped, mask


def masked_without_values(x: Tensor, p: float, seeded: bool) -> list[Tensor]:
    """Return empty tensors like those that define a mask: the numbers of a ``seeded_dropout.Draw``, or ``masked``."""
    if not p or seeded:
        return [torch.empty(3, dtype=torch.int64, device="cpu")] if p else []
    return [torch.empty_like(x), torch.empty_like(x, dtype=x.dtype if x.device.type == "cpu" else torch.bool)]


def kept_scale(x: Tensor, p: float) -> float:
    """Return the number s of ``dropout(x, p)``."""
    return scale(zeros(p)) if x.device.type == "cpu" else 1.0 / (1.0 - p)


def dropped(x: Tensor, p: float) -> Tensor:
    """Return only the first result of ``dropout``; in compiled code, use torch's own dropout."""
    return F.dropout(x, p) if torch.compiler.is_compiling() else dropout(x, p)[0]


def zeros(p: float) -> int:
    """Return how many of the 2^16 values of 16 random bits must drop an entry, so that it is dropped with probability
    p."""
    return min(round(p * 2**16), 2**16 - 1)


def scale(zeros: int) -> float:
    """Return the factor by which kept entries are multiplied."""
    return 2**16 / (2**16 - zeros)


def _with_few_draws(x: Tensor, p: float) -> tuple[Tensor, Tensor, float]:
    zero = zeros(p)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(torch.iinfo(torch.int64).min, None)
    values = draws.view(torch.int16)[: x.numel()].view(x.shape)
    # In the dtype of x: a product with a bool takes three times as long.
    mask = torch.ge(values, zero - 2**15, out=torch.empty_like(values, dtype=x.dtype))
    factor = scale(zero)
    return (x * mask).mul_(factor), mask, factor
