"""The cross-entropy of logits row by row, and its gradient in the place of the logits.

With x a row of the logits and t its target, ``losses`` gives log sum exp(x) - x[t], and ``losses_and_gradient_``
also overwrites x with softmax(x) - onehot(t). Both compute in fp32 whatever the dtype of the logits.

They are operators of torch (``torch.ops.rasa_train``), so that ``torch.compile`` does not look into them. On a GPU they
are the kernels of ``cross_entropy_triton``, which read a row twice and write it once; the functions in this module
compute the same on any device and serve as their reference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from .operators import trusted

BLOCK = 2**20
"""Number of logits that the reference converts to fp32 at one time: few enough to stay in a CPU's cache."""

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Dtypes that the kernels compute, and the largest error allowed in their check: that of rounding a gradient once."""


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each row, (rows), fp32.

    Args:
        logits: (rows, vocabulary), contiguous, fp32 or narrower.
        targets: (rows), int64, each in [0, vocabulary).
    """
    return _rows(logits, targets, overwrite=False)


def losses_and_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each row, and overwrite each row with the gradient of its loss, in the dtype of the logits."""
    return _rows(logits, targets, overwrite=True)


def _rows(logits: Tensor, targets: Tensor, overwrite: bool) -> Tensor:
    result = logits.new_empty(len(logits), 1, dtype=torch.float32)
    rows = max(1, BLOCK // logits.shape[1])
    parts = (torch.split(t, rows) for t in (logits, targets.unsqueeze(1), result))  # type: ignore[no-untyped-call]
    for some, target, loss in zip(*parts, strict=True):
        p = some.float()
        highest = p.amax(1, keepdim=True)
        of_target = p.gather(1, target) - highest
        p = p.sub_(highest) if overwrite or p.dtype != some.dtype else p - highest
        total = p.exp_().sum(1, keepdim=True)
        torch.sub(total.log(), of_target, out=loss)
        if overwrite:
            p.div_(total).scatter_add_(1, target, torch.full_like(total, -1.0))
            some.copy_(p)  # does nothing for fp32, where p is the row itself
    return result.squeeze(1)


def _on_gpu(reference: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def run(logits: Tensor, targets: Tensor) -> Tensor:
        module = _kernels() if _works(logits.device, logits.dtype) else None
        function = getattr(module, reference.__name__) if module else reference
        result: Tensor = function(logits, targets)
        return result

    return run


def _fake(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.float32)


_ops = torch.library.Library("rasa_train", "FRAGMENT")  # type: ignore[no-untyped-call]
_ops.define("losses(Tensor logits, Tensor targets) -> Tensor")  # type: ignore[no-untyped-call]
_ops.define("losses_and_gradient_(Tensor(a!) logits, Tensor targets) -> Tensor")  # type: ignore[no-untyped-call]
for _function in (losses, losses_and_gradient_):
    _ops.impl(_function.__name__, _function, "CPU")  # type: ignore[no-untyped-call]
    _ops.impl(_function.__name__, _on_gpu(_function), "CUDA")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"rasa_train::{_function.__name__}", _fake, lib=_ops)


@cache
def _kernels() -> ModuleType | None:
    """Return the module of the kernels, or None without Triton."""
    if not find_spec("triton"):
        return None
    from . import cross_entropy_triton

    return cross_entropy_triton


@cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels can be compiled for this GPU and give correct results."""
    if dtype not in TOLERANCE:
        return False

    def measured() -> float:
        if (kernels := _kernels()) is None:
            raise ImportError("Triton is not installed")
        return error(kernels, device, dtype)

    return trusted(measured, TOLERANCE[dtype], "the loss is computed by torch's operations and not by one kernel")


def error(kernels: ModuleType, device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest error of the losses, relative to the largest loss, and of the gradient, for rows that are
    longer than a block and hold large and infinite logits."""
    random = torch.Generator(device).manual_seed(0)  # a generator that no run uses
    logits = torch.randn(3, 40_016, generator=random, device=device).mul_(3)
    logits[1] *= 1000
    logits[2, ::3] = -torch.inf
    logits = logits.to(dtype)
    targets = torch.tensor([39_999, 0, 20_000], device=device)
    plain, wide, found = kernels.losses(logits, targets), logits.float(), logits.clone()
    loss = kernels.losses_and_gradient_(found, targets)
    right = losses_and_gradient_(wide, targets)
    wrong = [(plain - right) / right.max(), (loss - right) / right.max(), found.float() - wide]
    return max(float(t.abs().max().nan_to_num(torch.inf)) for t in wrong)
