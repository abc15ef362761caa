"""Products whose weight differs by row: rows sorted by expert, each multiplied by the weight of its expert.

Nothing in this module makes the host wait for the device, in the forward or the backward pass, except ``Rows.counts``;
and everything else can be compiled without a break of the graph. Torch's grouped product itself waits where it has no
kernel: on a GPU, torch 2.13 has one for bf16 and the compute capabilities 9 and 10.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """Which rows of a tensor (rows, features) belong to which expert, known on the device only."""

    expert: Tensor
    """The expert of each row, ascending: (rows,), int64."""
    ends: Tensor
    """The end of each expert's rows, which is the start of the next expert's: (experts,), int32."""

    @classmethod
    def sorted(cls, expert: Tensor, experts: int) -> Rows:
        """Return the rows of ``experts`` experts, given the expert of each row in ascending order."""
        numbers = torch.arange(experts, device=expert.device)
        return cls(expert, torch.searchsorted(expert, numbers, right=True, out_int32=True))

    @classmethod
    def of(cls, counts: Rows | Sequence[int], device: torch.device) -> Rows:
        """Return rows of which the first ``counts[0]`` belong to expert 0, the next ``counts[1]`` to expert 1, ..."""
        if isinstance(counts, Rows):
            return counts
        expert = torch.arange(len(counts)).repeat_interleave(torch.tensor(list(counts)))
        ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32)
        return cls(expert.to(device, non_blocking=True), ends.to(device, non_blocking=True))

    @cached_property
    def counts(self) -> list[int]:
        """The number of rows of each expert. The host waits for the device when this is first read."""
        return [end - start for start, end in pairwise([0, *self.ends.tolist()])]


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Return W_e x for each row x of expert e.

    Args:
        x: (rows, in), fp32, bf16 or fp16, sorted by expert.
        weight: W (experts, out, in), in the same dtype.
        ends: see ``Rows``.
    Returns:
        (rows, out).
    """
    if not len(x):  # the kernels need a row
        return F.linear(x, weight[0])
    out, in_ = weight.shape[-2:]
    # The kernels need rows of a multiple of 16 bytes. Models have them; the factors of an adapter may not.
    more_out, more_in = -out % _unit(x), -in_ % _unit(x)
    if more_out or more_in:
        weight = F.pad(weight, (0, more_in, 0, more_out))
    y: Tensor = _GroupedLinear.apply(F.pad(x, (0, more_in)) if more_in else x, weight, ends)  # type: ignore[no-untyped-call]
    return y[:, :out] if more_out else y


def spread(x: Tensor, token: Tensor, places: Tensor) -> Tensor:
    """Return ``x[token]`` (rows, features), a copy of each row of x (tokens, features) for each of its experts.

    ``places`` (experts per token, tokens) has the rows of the result that are copies of each token, so that the
    gradients of copies are added one after another, without atomics.
    """
    y: Tensor = _Spread.apply(x, token, places)  # type: ignore[no-untyped-call]
    return y


def collect(y: Tensor, token: Tensor, places: Tensor) -> Tensor:
    """Return the sum of the rows of y (rows, features) that belong to each token: (tokens, features). They are added in
    the order of ``places``, each sum rounded to the dtype of y. The arguments are as for ``spread``."""
    x: Tensor = _Collect.apply(y, token, places)  # type: ignore[no-untyped-call]
    return x


class _GroupedLinear(torch.autograd.Function):
    """torch's grouped product, with a backward pass that takes gradients of any strides, and that keeps x only if the
    weight is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        x = _aligned(x)
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, ends)
        return _grouped_mm(x, weight.mT, ends)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        dy = _aligned(dy)
        dx = None if weight is None else _grouped_mm(dy, weight, ends)
        return dx, None if x is None else _grouped_mm(dy.t(), x, ends), None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x[token]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return _sum(dy, places), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, token: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(token)
        return _sum(y, places)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        (token,) = ctx.saved_tensors
        return dx[token], None, None


def _sum(y: Tensor, places: Tensor) -> Tensor:
    first, *others = places.unbind()
    total = y[first]
    for place in others:
        total = total + y[place]
    return total


def _unit(x: Tensor) -> int:
    """Return the number of entries in 16 bytes."""
    return 16 // x.element_size()


def _aligned(x: Tensor) -> Tensor:
    """Return x (rows, features), with rows of which each is one piece of memory that begins at a multiple of 16 bytes
    from the first; an expanded tensor is copied."""
    rows, features = x.stride()
    return x if features == 1 and rows >= x.shape[1] and not rows % _unit(x) else x.contiguous()


def _grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Return torch's grouped product, which torch 2.13 can compile in bf16 only. In another dtype a compiled graph
    calls it as an operation of this package."""
    if torch.compiler.is_compiling() and a.dtype != torch.bfloat16:
        product: Tensor = torch.ops.rasa_train.grouped_mm(a, b, ends)
        return product
    return F.grouped_mm(a, b, offs=ends)


def _computed(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(a, b, offs=ends)


def _shape(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    lead = (len(ends),) if b.dim() == 2 else ()
    return a.new_empty(*lead, a.shape[0], b.shape[-1])


_ops = torch.library.Library("rasa_train", "FRAGMENT")  # type: ignore[no-untyped-call]
_ops.define("grouped_mm(Tensor a, Tensor b, Tensor ends) -> Tensor")  # type: ignore[no-untyped-call]
_ops.impl("grouped_mm", _computed, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("rasa_train::grouped_mm", _shape, lib=_ops)
