"""Linears that share an input, with their updates, as one operation.

For eager code it is a function; for compiled code it is an operator of torch's registry (``rasa_train::low_rank``,
``rasa_train::block_diagonal``), which the compiler and selective checkpointing leave whole, while they fuse or
recompute what is around it.

Both call ``Operands.compute`` and ``Operands.gradients``. Eager code does not call the operators, because one with a
gradient costs ten times as much host time per call as a function.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .quantized_weight import Narrow, full_sums

_log = logging.getLogger(__name__)
library = torch.library.Library("rasa_train", "DEF")  # type: ignore[no-untyped-call]
INSIDE: dict[str, Callable[..., Any]] = {}
"""The Python functions that compute operators, by name, for those who count what an operator does."""


_whole = False


@contextmanager
def whole() -> Iterator[None]:
    """Let eager code call the operators inside the block, so that a dispatch mode sees each group as one operation."""
    global _whole
    before, _whole = _whole, True
    try:
        yield
    finally:
        _whole = before


class Operands(ABC):
    """The operands of a group: the members' frozen weights W_i (out_i, in) and biases, and the trained operands, which
    are views of ``flat``, the group's row of a ``flat_buffer.Flat``."""

    name: ClassVar[str]
    """Name of the operator."""
    schema: ClassVar[str]
    """Types and names of the values in ``layout``."""

    def __init__(
        self,
        flat: Tensor,
        weights: Sequence[Tensor | Narrow],
        biases: Sequence[Tensor | None],
        seeded: bool,
        layout: tuple[Any, ...],
    ) -> None:
        self.flat, self.weights, self.biases, self.seeded, self.layout = flat, weights, biases, seeded, layout
        """``seeded``: whether dropout is that of ``seeded_dropout``. ``layout``: the meaning of ``flat``."""
        self.read(flat.detach())

    @abstractmethod
    def read(self, flat: Tensor) -> None:
        """Set the trained operands: views of ``flat``, which ``layout`` describes."""

    @abstractmethod
    def compute(self, x: Tensor, p: float) -> tuple[list[Tensor], list[Tensor]]:
        """Return y_i (tokens, out_i) of all members for x (tokens, in), each entry of which is dropped with probability
        p before the update; and the tensors that ``gradients`` needs. None of the results is x or a view of it."""

    @abstractmethod
    def gradients(
        self, dys: Sequence[Tensor | None], x: Tensor | None, kept: Sequence[Tensor], p: float, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of x (tokens, in) and of ``flat``, those that ``needs`` asks for.

        Args:
            dys: the gradient of each y_i; None if y_i is not used.
            x: the input; None unless ``needs_input``.
            kept: the tensors that ``compute`` returned.
        """

    @abstractmethod
    def without_values(self, x: Tensor, p: float) -> tuple[list[Tensor], list[Tensor]]:
        """Return empty tensors like the results of ``compute``."""

    def needs_input(self, p: float) -> bool:
        """Whether ``gradients`` needs x beside the kept tensors."""
        return not p or self.seeded

    def operation(self, x: Tensor, p: float) -> list[Tensor]:
        """Return the results of ``compute``, as one operation."""
        operator = getattr(torch.ops.rasa_train, self.name)
        made: list[Tensor] = operator(x, p, self.flat, list(self.weights), list(self.biases), self.seeded, *self.layout)
        return made

    def outputs(self, x: Tensor, p: float) -> list[Tensor]:
        """Return y_i (..., out_i) of all members for x (..., in), differentiable in x and in ``flat``."""
        rows = x.reshape(-1, x.shape[-1])
        results: Sequence[Tensor]
        if torch.compiler.is_compiling():
            results = self.operation(rows, p)[: len(self.weights)]
        else:
            results = SharedInput.apply(rows, p, self, self.flat)  # type: ignore[no-untyped-call]
        # Shaped here, because a model may add to y in place, and autograd forbids that for a view that a function made.
        return [y.view(*x.shape[:-1], -1) for y in results]


class SharedInput(torch.autograd.Function):
    """``compute`` and ``gradients`` of ``Operands`` as a function that is differentiable in x and in ``flat``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, operands: Operands, flat: Tensor) -> tuple[Tensor, ...]:
        if _whole and not any(isinstance(W, Narrow) for W in operands.weights):
            made = operands.operation(x, p)
            results, kept = made[: len(operands.weights)], made[len(operands.weights) :]
        else:
            results, kept = operands.compute(x, p)
        ctx.save_for_backward(x if operands.needs_input(p) else None, *kept)
        ctx.p, ctx.operands = p, operands
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *kept = ctx.saved_tensors
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        with full_sums():
            dx, d_flat = ctx.operands.gradients(dys, x, kept, ctx.p, needs)
        return dx, None, None, d_flat


def define(kind: type[Operands]) -> type[Operands]:
    """Define the operator ``kind.name``, its gradients as the operator ``..._gradients``, and return ``kind``."""
    name = kind.name
    given = f"Tensor flat, Tensor[] weights, Tensor?[] biases, bool seeded, {kind.schema}"

    def made(of: Sequence[Any]) -> Operands:
        flat, weights, biases, seeded, *layout = of
        return kind(flat, weights, biases, seeded, tuple(layout))

    def forward(x: Tensor, p: float, *of: Any) -> list[Tensor]:
        results, kept = made(of).compute(x, p)
        return [*results, *kept]

    def fake(x: Tensor, p: float, *of: Any) -> list[Tensor]:
        results, kept = made(of).without_values(x, p)
        return [*results, *kept]

    def gradients(
        dys: list[Tensor | None], x: Tensor | None, kept: list[Tensor], p: float, needs: list[bool], *of: Any
    ) -> list[Tensor]:
        with full_sums():
            found = made(of).gradients(dys, x, kept, p, needs)
        return [of[0].new_empty(0) if gradient is None else gradient for gradient in found]

    def fake_gradients(
        dys: list[Tensor | None], x: Tensor | None, kept: list[Tensor], p: float, needs: list[bool], *of: Any
    ) -> list[Tensor]:
        flat, weights = of[:2]
        rows = next(dy for dy in dys if dy is not None)
        dx = flat.new_empty((rows.shape[0], weights[0].shape[1]) if needs[0] else 0)
        return [dx, torch.empty_like(flat) if needs[1] else flat.new_empty(0)]

    implement(f"{name}(Tensor x, float p, {given}) -> Tensor[]", forward, fake)
    before = "Tensor?[] dys, Tensor? x, Tensor[] kept, float p, bool[] needs"
    implement(f"{name}_gradients({before}, {given}) -> Tensor[]", gradients, fake_gradients)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        x, p, flat, weights, _, *rest = inputs
        seeded = rest[0]
        ctx.save_for_backward(x if seeded or not p else None, flat, *weights, *output[len(weights) :])
        ctx.p, ctx.members, ctx.rest, ctx.nothing = p, len(weights), rest, [_nothing(value) for value in inputs]
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, dys: list[Tensor | None]) -> tuple[Any, ...]:
        x, flat, *others = ctx.saved_tensors
        weights, kept = others[: ctx.members], others[ctx.members :]
        needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
        found = list(ctx.nothing)
        if any(dy is not None for dy in dys[: ctx.members]):
            dx, d_flat = getattr(torch.ops.rasa_train, f"{name}_gradients")(
                dys[: ctx.members], x, kept, ctx.p, needs, flat, weights, [None] * ctx.members, *ctx.rest
            )
            found[0], found[2] = dx if needs[0] else None, d_flat if needs[1] else None
        return tuple(found)

    torch.library.register_autograd(f"rasa_train::{name}", backward, setup_context=setup, lib=library)
    return kind


def trusted(error: Callable[[], float], most: float, instead: str) -> bool:
    """Whether kernels can be compiled for this GPU and give correct results; if not, a line says why.

    Args:
        error: runs them and returns their error, which must be below ``most``.
        instead: what happens without them.
    """
    try:
        wrong = error()
        why = "" if wrong < most else f"a check of its kernels failed with an error of {wrong:.1e}"
    except torch.OutOfMemoryError:  # says nothing about the kernels; the caller retries with less work at once
        raise
    except Exception as failure:  # no C compiler, a GPU that is too old, ...: in any case the plain form still works
        why = str(failure).strip().split("\n")[0] or type(failure).__name__
    if why:
        _log.warning("%s: %s", instead, why)
    return not why


def _nothing(value: Any) -> list[None] | None:
    """Return no gradient for an argument, in the form that torch wants: a list for a list of tensors."""
    tensors = isinstance(value, list | tuple) and all(isinstance(item, Tensor) for item in value)
    return [None] * len(value) if tensors else None


def implement(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an operator by one function for all devices.

    Args:
        schema: ``name(arguments) -> results``.
        fake: returns empty tensors like the results.
    """
    name = schema.partition("(")[0]
    library.define(schema)  # type: ignore[no-untyped-call]
    library.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"rasa_train::{name}", fake, lib=library)
    INSIDE[name] = function
