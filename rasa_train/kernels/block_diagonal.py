"""Block-diagonal updates and their fast path.

    dW x = tile([T_0 x_0; T_1 x_1; ...])        T_g (q x q), x_g: features g q ... (g + 1) q - 1 of x

n blocks read the first n q features (x is continued with its own first features if it has fewer), and the n q outputs
are repeated or cut to the number of outputs of the linear. Such an update reads no more memory than a low-rank one,
although its rank can be full.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dropout import dropout
from .flat_buffer import Flat, Packed, blocks
from .quantized_weight import Narrow, add_gradient, full_sums, products


def tile(z: Tensor, size: int) -> Tensor:
    """Return the first ``size`` features of z, where its first feature follows the last one again."""
    times, rest = size // z.shape[-1], size % z.shape[-1]  # a compiled graph may hold sizes that divmod refuses
    parts = [z] * times + ([z[..., :rest]] if rest else [])
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def pack_blocks(
    made: Sequence[Tensor],
    weights: Sequence[list[Tensor | Narrow]],
    biases: Sequence[list[Tensor | None]],
    dtype: torch.dtype,
) -> list[Packed]:
    """Pack the blocks of groups of one form in the dtype of their weights. The caller must then call ``train`` or
    ``join`` of their buffer.

    Args:
        made: for each member of a group its blocks, fp32, with a leading dimension of groups.
        weights, biases: for each group those of its members.
    """
    flat = Flat(len(weights), [tuple(T.shape[1:]) for T in made], dtype, made[0])
    for place, T in zip(flat.views, made, strict=True):
        flat.put(place, T)
    blocks_of = zip(*(view.unbind() for view in flat.views), strict=True)
    operands = map(BlockOperands, weights, biases, map(list, blocks_of))
    return [Packed(SharedBlockInput, own, flat, row, dtype) for row, own in enumerate(operands)]


class BlockOperands(NamedTuple):
    """The operands of ``SharedBlockInput``."""

    weights: list[Tensor | Narrow]
    biases: list[Tensor | None]
    blocks: list[Tensor]
    """Views of the flat buffer, one after the other."""


class SharedBlockInput(torch.autograd.Function):
    """y_i = x W_i^T + bias_i + tile(drop(x)_g T_ig^T for all g) for all i, differentiable in x and the blocks.

    x (..., in), W_i (out_i, in), T_i (n_i, q_i, q_i), y_i (tokens, out_i), all of one dtype.

    Args:
        flat: the buffer that the blocks are views of; the gradient has the same layout.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, operands: BlockOperands, flat: Tensor) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        dropped, mask, factor = dropout(rows, p)
        results = []
        for y, T in zip(products(rows, operands.weights, operands.biases), operands.blocks, strict=True):
            z = _by_block(tile(dropped, _size(T)), T.mT)
            for start in range(0, y.shape[1], _size(T)):
                y[:, start : start + _size(T)].add_(z[:, : y.shape[1] - start])
            results.append(y)
        ctx.save_for_backward(dropped, mask)
        ctx.factor, ctx.operands, ctx.flat, ctx.lead = factor, operands, flat, x.shape[:-1]
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    @full_sums()
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        dropped, mask = ctx.saved_tensors
        needs_x, _, _, needs_flat = ctx.needs_input_grad
        new = torch.empty_like if all(dy is not None for dy in dys) else torch.zeros_like
        d_flat, dx = new(ctx.flat), None
        d_dropped = torch.zeros_like(dropped) if needs_x and mask is not None else None
        places = blocks(d_flat, [tuple(T.shape) for T in ctx.operands.blocks])
        for dy, W, T, place in zip(dys, ctx.operands.weights, ctx.operands.blocks, places, strict=True):
            if dy is None:
                continue
            dy = dy.reshape(-1, len(W))
            dz = _gathered(dy, _size(T))
            if needs_flat:
                torch.bmm(_split(dz, T).mT, _split(tile(dropped, _size(T)), T), out=place)
            if needs_x:
                dx = add_gradient(dx, dy, W)
                _add_wrapped(dx if d_dropped is None else d_dropped, _by_block(dz, T))
        if dx is not None:
            dx = dx if d_dropped is None else dx.addcmul_(d_dropped, mask, value=ctx.factor)
            dx = dx.view(*ctx.lead, -1)
        return (dx, None, None, d_flat if needs_flat else None)


def _size(T: Tensor) -> int:
    return T.shape[0] * T.shape[1]


def _split(x: Tensor, T: Tensor) -> Tensor:
    """Return x (tokens, n q) as a view (n, tokens, q)."""
    return x.view(len(x), *T.shape[:2]).transpose(0, 1)


def _by_block(x: Tensor, T: Tensor) -> Tensor:
    """Return the products x_g T_g side by side (tokens, n q)."""
    result = x.new_empty(x.shape)
    torch.bmm(_split(x, T), T, out=_split(result, T))
    return result


def _gathered(dy: Tensor, size: int) -> Tensor:
    """Return the gradient of z (tokens, size), where dy is the gradient of ``tile(z)``."""
    if dy.shape[1] < size:
        return F.pad(dy, (0, size - dy.shape[1]))
    if dy.shape[1] == size:
        return dy
    dz = dy[:, :size].clone()
    for start in range(size, dy.shape[1], size):
        part = dy[:, start : start + size]
        dz[:, : part.shape[1]].add_(part)
    return dz


def _add_wrapped(dx: Tensor, d_wrapped: Tensor) -> None:
    """Add the gradient of ``tile(x)`` to the gradient of x."""
    for start in range(0, d_wrapped.shape[1], dx.shape[1]):
        part = d_wrapped[:, start : start + dx.shape[1]]
        dx[:, : part.shape[1]].add_(part)
