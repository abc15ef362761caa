"""The fast path: linears that share an input are one operation, and their factors are packed once per step.

Inside ``packed`` the factors of a ``Group`` are buffers in the dtype of W. They are made once from the methods' fp32
``factors()`` and used by ``kernels.low_rank``; their gradients (fp32, summed over micro-batches) go back through
``factors()`` once. ``PackedForward`` does the same for every forward pass of a model in the user's own training loop.
Without either, the adapter's own ``forward`` is called: it is the reference, which gives the same numbers and works
wherever parameters have hooks or are partitioned. Block-diagonal updates have a fast path of the same kind, in
``kernels.block_diagonal``; an adapter of any other form is always computed by its own ``forward``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.block_diagonal import pack_blocks
from ..kernels.flat_buffer import Buffers, Flat
from ..kernels.low_rank import Factors, pack_factors
from ..kernels.operators import Operands
from ..kernels.quantized_weight import Narrow, NarrowLinear, dequantized, is_bitsandbytes
from .block_adapter import BlockAdapter
from .contract import Adapter, FactorAdapter
from .stacking import at_once, form


class Linear(Protocol):
    """A linear with an adapter."""

    weight: Any  # Tensor; nn.Module's attributes are looser
    narrow: Narrow | None
    bias: Any
    transposed: bool
    adapter: Adapter
    base: Any
    own_forward: bool


class Group:
    """Linears that one layer calls one after the other, in this order, with the same input.

    With packed factors the first linear that is called computes the outputs of all, and the others find their results
    here. A layer that calls its linears differently still gets the right result: its linears are then computed one by
    one, by the plain path.
    """

    def __init__(self, members: Sequence[Linear]) -> None:
        self.members = tuple(members)
        self.packed: Operands | None = None
        self.usable: Callable[[], bool] | None = None
        """Function that returns whether ``packed`` holds the parameters' current values; None: it always does."""
        self._together = True
        self._input: Tensor | None = None
        self._ready: dict[int, Tensor] = {}
        """For each member that is still to be called: its output or, without packed factors, its adapter's input."""
        self._fused = False

    def __call__(self, index: int, x: Tensor) -> Tensor:
        """Return y (..., out) of member ``index`` for x (..., in)."""
        if index not in self._ready or not _same(self._input, x):
            self._together &= index not in self._ready
            self._compute(range(len(self.members)) if self._together else (index,), x)
        ready = self._ready.pop(index)
        if not self._ready:
            self._input = None
        # A member is computed only when it is called: partitioned parameters are not available before.
        return ready if self._fused else plain(self.members[index], x, ready)

    def _compute(self, indices: Sequence[int], x: Tensor) -> None:
        adapters = [self.members[index].adapter for index in indices]
        for adapter in adapters:
            watched(adapter, x)
        packed = self.packed if self.usable is None or self.usable() else None
        self._fused = self._together and packed is not None and x.dtype == packed.flat.dtype
        if self._fused and packed is not None:
            ready: Sequence[Tensor] = packed.outputs(x, adapters[0].dropout if adapters[0].training else 0.0)
        else:
            # One mask for all members, as in the packed form. The packed form draws the same mask, unless its kernels
            # make their own (``kernels.seeded_dropout``).
            ready = (adapters[0].drop(x),) * len(adapters)
        self._ready = dict(zip(indices, ready, strict=True))
        self._input = x


def _same(a: Tensor | None, b: Tensor) -> bool:
    """Whether a and b are one tensor. DeepSpeed passes each module a view of its input: the objects then differ, but
    the memory is the same (``a`` keeps it allocated, so no other tensor can be there). In compiled code a tensor has no
    address, and nothing passes views."""
    if a is b or torch.compiler.is_compiling():
        return a is b
    return a is not None and a.data_ptr() == b.data_ptr() and (a.shape, a.stride()) == (b.shape, b.stride())


def watched(adapter: Adapter, x: Tensor) -> None:
    """Show the adapter its input if the rule of its method needs it."""
    if adapter.watches and adapter.training:
        adapter.watch(x)


def weight_of(member: Linear) -> Tensor:
    """Return W (out, in), in whichever form it is stored."""
    if member.narrow is not None:
        return member.narrow.dense()
    if is_bitsandbytes(member.base):
        return dequantized(member.base)
    weight: Tensor = member.weight
    return weight.t() if member.transposed else weight


def plain(member: Linear, x: Tensor, dropped: Tensor) -> Tensor:
    """Return y = W x + b + dW drop(x), computed by the adapter's own ``forward``."""
    weight = weight_of(member) if member.adapter.needs_weight or not member.own_forward else member.weight
    if member.own_forward:
        y: Tensor = member.base(x)
    elif member.narrow is None:
        y = F.linear(x, weight, member.bias)
    else:
        y = NarrowLinear.apply(x, member.narrow)  # type: ignore[no-untyped-call]
        y = y if member.bias is None else y + member.bias
    update: Tensor = member.adapter(dropped, weight)
    return y + update.to(y.dtype)


Held = dict[torch.dtype, Buffers]
"""The buffers of packed factors, by dtype, for use in later steps."""


@contextmanager
def packed(groups: Iterable[Group], held: Held | None = None) -> Iterator[None]:
    """Compute with packed factors inside the block; at its end pass the accumulated gradients on to the parameters.

    The parameters must not change inside the block, and their gradients are not complete before its end.

    Args:
        held: buffers of an earlier block with the same groups, whose graphs are no longer needed; new ones are added.
    """
    groups = list(groups)
    try:
        buffers = pack(groups, held)
        for buffer in buffers:
            buffer.train()
        yield
        found = [pair for buffer in buffers for pair in buffer.gradients()]
        if found:
            edges, gradients = zip(*found, strict=True)
            torch.autograd.backward(edges, gradients)
    finally:
        for group in groups:
            group.packed = None


def pack(groups: Iterable[Group], held: Held | None = None) -> list[Flat]:
    """Set ``packed`` of each group: None unless all its adapters compute factors, or all blocks, in the dtype of W, and
    every W is frozen and not partitioned. Groups of one form, those of all layers as a rule, are packed together.

    Returns:
        The buffers of the packed factors. The caller must call ``train`` or ``join`` of each.
    """
    alike: dict[tuple[Any, ...], list[Group]] = {}
    for group in groups:
        group.packed = None
        if (kind := _kind(group.members)) is not None:
            first = group.members[0].weight
            key = (kind, first.dtype, first.device, *(form(member.adapter) for member in group.members))
            alike.setdefault(key, []).append(group)
    held = {} if held is None else held
    for of_dtype in held.values():
        of_dtype.begin()
    frozen: dict[Any, Tensor] = {}
    buffers = []
    for (kind, dtype, *_), stack in alike.items():
        columns = list(zip(*([member.adapter for member in group.members] for group in stack), strict=True))
        weights = [[m.narrow if m.narrow is not None else weight_of(m) for m in group.members] for group in stack]
        biases = [[member.bias for member in group.members] for group in stack]
        into = held.setdefault(dtype, Buffers(dtype))
        with torch.enable_grad():
            if kind is FactorAdapter:
                factors = [Factors(*at_once(column, _factors)) for column in columns]
                made = pack_factors(factors, weights, biases, into, frozen)
            else:
                of_blocks = [at_once(column, _blocks)[0] for column in columns]
                made = pack_blocks(of_blocks, weights, biases, into)
        for group, own in zip(stack, made.operands, strict=True):
            group.packed = own
        buffers.append(made)
    return buffers


def packable(group: Group) -> bool:
    """Whether ``pack`` packs the group."""
    return _kind(group.members) is not None


def _factors(adapter: FactorAdapter) -> Factors:
    return adapter.factors()


def _blocks(adapter: BlockAdapter) -> tuple[Tensor]:
    return (adapter.blocks(),)


def _kind(members: Sequence[Linear]) -> type[Adapter] | None:
    """Return the class that all adapters have in common and a fast path computes; None if there is none, or if a linear
    has to be computed by itself."""
    if all(_stands_still(member) for member in members):
        for kind in (FactorAdapter, BlockAdapter):
            if all(isinstance(member.adapter, kind) for member in members):
                return kind
    return None


def _stands_still(member: Linear) -> bool:
    weight, bias = member.weight, member.bias
    return (
        member.adapter.compute_dtype is None
        and not member.own_forward
        and not weight.requires_grad
        and (weight.dim() == 2 or member.narrow is not None)
        and not (bias is not None and bias.requires_grad)
    )
