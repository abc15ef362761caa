"""Block-diagonal updates and their fast path.

    dW x = tile([T_0 x_0; T_1 x_1; ...])        T_g (q x q), x_g: features g q ... (g + 1) q - 1 of x

n blocks read the first n q features (x is continued with its own first features if it has fewer), and the n q outputs
are repeated or cut to the number of outputs of the linear. Such an update reads no more memory than a low-rank one,
although its rank can be full.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import seeded_dropout
from .dropout import kept_scale, masked, masked_without_values
from .flat_buffer import Buffers, Flat, blocks
from .operators import Operands, define
from .quantized_weight import Narrow, add_gradient, products


def tile(z: Tensor, size: int) -> Tensor:
    """Return the first ``size`` features of z, where its first feature follows the last one again."""
    times, rest = size // z.shape[-1], size % z.shape[-1]  # a compiled graph may hold sizes that divmod refuses
    parts = [z] * times + ([z[..., :rest]] if rest else [])
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def pack_blocks(
    made: Sequence[Tensor],
    weights: Sequence[list[Tensor | Narrow]],
    biases: Sequence[list[Tensor | None]],
    into: Buffers,
) -> Flat:
    """Pack the blocks of groups of one form in the dtype of ``into``. The caller must then call ``train`` or ``join``
    of the buffer.

    Args:
        made: for each member of a group its blocks, fp32, with a leading dimension of groups.
        weights, biases: for each group those of its members.
        into: where the buffer is taken from.
    """
    flat = into.take(len(weights), [tuple(T.shape[1:]) for T in made], made[0])
    for place, T in zip(flat.views, made, strict=True):
        flat.put(place, T)
    layout = ([size for T in made for size in T.shape[1:3]],)
    seeded = seeded_dropout.usable(made[0].device, into.dtype)
    return flat.packed(BlockDiagonal, weights, biases, seeded, [layout] * len(weights))


@define
class BlockDiagonal(Operands):
    """The operands of y_i = x W_i^T + bias_i + tile(drop(x)_g T_ig^T for all g), where T_i is (n_i, q_i, q_i)."""

    name, schema = "block_diagonal", "int[] sizes"

    def read(self, flat: Tensor) -> None:
        (sizes,) = self.layout  # n_i and q_i of each member
        self.shapes = [(n, q, q) for n, q in zip(sizes[::2], sizes[1::2], strict=True)]
        self.blocks = blocks(flat, self.shapes)

    def compute(self, x: Tensor, p: float) -> tuple[list[Tensor], list[Tensor]]:
        dropped, mask = x, list[Tensor]()
        if p and self.seeded:
            draw = seeded_dropout.draw(x.device, p)
            dropped, mask = torch.ops.rasa_train.drop(x, *draw), [torch.tensor(draw)]
        elif p:
            mask = list(masked(x, p))
            dropped = mask[0]
        results = []
        for y, T in zip(products(x, self.weights, self.biases), self.blocks, strict=True):
            z = _by_block(tile(dropped, _size(T)), T.mT)
            for start in range(0, y.shape[1], _size(T)):
                y[:, start : start + _size(T)].add_(z[:, : y.shape[1] - start])
            results.append(y)
        return results, mask

    def without_values(self, x: Tensor, p: float) -> tuple[list[Tensor], list[Tensor]]:
        results = [x.new_empty(x.shape[0], len(W)) for W in self.weights]
        return results, masked_without_values(x, p, self.seeded)

    def gradients(
        self, dys: Sequence[Tensor | None], x: Tensor | None, kept: Sequence[Tensor], p: float, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        needs_x, needs_flat = needs
        draw = kept[0].tolist() if p and self.seeded else None
        dropped = kept[0] if x is None else x if draw is None else torch.ops.rasa_train.drop(x, *draw)
        new = torch.empty_like if all(dy is not None for dy in dys) else torch.zeros_like
        d_flat, dx = new(self.flat, requires_grad=False), None
        d_dropped = torch.zeros_like(dropped) if needs_x and p else None
        places = blocks(d_flat, self.shapes)
        for dy, W, T, place in zip(dys, self.weights, self.blocks, places, strict=True):
            if dy is None:
                continue
            dz = _gathered(dy, _size(T))
            if needs_flat:
                torch.bmm(_split(dz, T).mT, _split(tile(dropped, _size(T)), T), out=place)
            if needs_x:
                dx = add_gradient(dx, dy, W)
                _add_wrapped(dx if d_dropped is None else d_dropped, _by_block(dz, T))
        if dx is not None and d_dropped is not None:
            if draw is None:
                dx.addcmul_(d_dropped, kept[1], value=kept_scale(dx, p))
            else:
                dx.add_(torch.ops.rasa_train.drop(d_dropped, *draw))
        return dx, d_flat if needs_flat else None


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
