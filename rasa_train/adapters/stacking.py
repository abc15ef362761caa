"""Factors of many adapters at once: where layers are alike, a few operations serve all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .contract import Adapter

_OF_MODULES = {*vars(nn.Module()), "site"}
"""Attributes of an adapter that are not its method's."""


def form(adapter: Adapter) -> tuple[object, ...]:
    """Return what adapters must have in common so that ``at_once`` can compute them together. Those of a method that
    does not promise ``stacks`` have nothing in common with others."""
    if not adapter.stacks:
        return (id(adapter),)
    named = chain(adapter.named_parameters(), adapter.named_buffers())
    tensors = [(name, t.shape, t.dtype, t.device, t.requires_grad) for name, t in named]
    others = [(name, _value(value)) for name, value in vars(adapter).items() if name not in _OF_MODULES]
    named_parts = [(name, part) for name, part in adapter.named_children() if isinstance(part, Adapter)]
    parts = [(name, part.site.rows, part.site.groups, form(part)) for name, part in named_parts]
    kind = (type(adapter), adapter.site.shape, adapter.site.lead, adapter.training)
    return (*kind, tuple(tensors), tuple(others), tuple(parts))


def _value(value: object) -> object:
    if isinstance(value, MethodType):
        return id(value.__self__), value.__func__
    return value if isinstance(value, bool | int | float | str | torch.dtype | None) else id(value)


def at_once(adapters: Sequence[Adapter], parts: Callable[[Any], Sequence[Any]]) -> tuple[Any, ...]:
    """Return ``parts(adapter)`` for adapters of one ``form``, each tensor with a leading dimension of adapters. A part
    that is the same for all (a tensor that sites share) is expanded: its leading stride is 0.

    Args:
        parts: returns tensors, or None, that an adapter computes from its own tensors and from those that it shares.
    """
    first = adapters[0]
    named = chain(first.named_parameters(), first.named_buffers())
    names = [name for name, _ in named if name not in first.rule_state]  # no update needs those
    if len(adapters) == 1 or not names:
        return tuple(None if t is None else t.expand(len(adapters), *t.shape) for t in parts(first))
    tensors = [dict(chain(adapter.named_parameters(), adapter.named_buffers())) for adapter in adapters]
    own = {f"adapter.{name}": _Stack.apply(*(of[name] for of in tensors)) for name in names}  # type: ignore[no-untyped-call]
    call, absent = _Call(first, parts), list[bool]()

    def of_one(own: dict[str, Tensor]) -> tuple[Tensor, ...]:
        made: Sequence[Any] = functional_call(call, own)
        absent[:] = [t is None for t in made]
        return tuple(t for t in made if t is not None)

    made = iter(torch.vmap(of_one)(own))
    return tuple(None if none else next(made) for none in absent)


class _Stack(torch.autograd.Function):
    """``torch.stack``, with gradients in the layout of the parameters: autograd would copy each of them by itself."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        return torch.stack(tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient.contiguous().unbind()


class _Call(nn.Module):
    """A function of an adapter as a module, which is what ``functional_call`` calls."""

    def __init__(self, adapter: Adapter, parts: Callable[[Any], Sequence[Any]]) -> None:
        super().__init__()
        self.adapter, self.parts = adapter, parts

    def forward(self) -> Sequence[Any]:
        return self.parts(self.adapter)
