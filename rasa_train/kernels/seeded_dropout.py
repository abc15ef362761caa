"""Products with a dropped input whose mask is never stored: it is generated from a seed wherever it is needed.

With m the mask and s = 1 / (1 - p), for x (tokens, in), A (R, in), g (tokens, R):

    project   z = s (m * x) A^T        gradient   dA = s g^T (m * x)        add_back   dx += s m * (g A)

Each operation reads its tensors once: neither m nor m * x is written, read or kept. Where there are too many ranks for
one block, or blocks instead of ranks, ``drop`` gives s m * x for as long as a product needs it.

An entry's random number is 16 bits of Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
3"), with torch's seed as the key, and the entry's position and the number of the call as the counter. So p is a
multiple of 2^-16.

On a GPU the operations are the kernels of ``seeded_dropout_triton``; the functions in this module compute the same on
any device and serve as their reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from .dropout import scale, zeros
from .operators import library, trusted

MOST_RANKS = 256
"""Largest number of ranks of a group: a kernel holds all columns of z at once."""

TOLERANCE = 1e-2
"""Largest error allowed in the check of the kernels, whose results are rounded to bf16 once."""

_forced: Iterator[int] | None = None


class Draw(NamedTuple):
    """The definition of a mask: whether entry (t, j) of an x with a given number of columns is kept."""

    zero: int
    """Number of the 2^16 values of a random number that drop the entry."""
    seed: int
    call: int

    @property
    def factor(self) -> float:
        return scale(self.zero)


def usable(device: torch.device, dtype: torch.dtype, ranks: int = 0) -> bool:
    """Whether inputs of this kind are dropped by a seed: not on a CPU, in fp32, or without Triton; ``dropout`` is then
    to be used.

    Args:
        ranks: number of ranks of the products; 0 for ``drop`` alone.
    """
    if _forced is not None:
        return True
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and _works(device, dtype, ranks)


def draw(device: torch.device, p: float) -> Draw:
    """Return a mask that no other call gets."""
    zero = zeros(p)
    if _forced is not None:
        return Draw(zero, torch.initial_seed() & (2**63 - 1), next(_forced))
    generator = torch.cuda.default_generators[device.index]
    call = generator.get_offset()  # type: ignore[attr-defined]
    generator.set_offset(call + 4)  # type: ignore[attr-defined]
    return Draw(zero, generator.initial_seed() & (2**63 - 1), call)


@contextmanager
def forced() -> Iterator[None]:
    """Inside the block, make ``draw`` return masks on every device as on a GPU, with calls numbered from 0, so that
    this form can be measured and tested."""
    global _forced
    before, _forced = _forced, count()
    try:
        yield
    finally:
        _forced = before


def kept(shape: tuple[int, int], draw: Draw, device: torch.device) -> Tensor:
    """Return the mask m (tokens, in), bool."""
    tokens, width = shape
    eighths = -(-width // 8)  # eight adjacent entries use one Philox block
    positions = torch.arange(tokens * eighths, device=device)
    zero, one = positions.new_zeros(()), positions.new_ones(())  # torch's own random numbers never have such counters
    words = philox((positions, zero + draw.call, zero, one), draw.seed)
    halves = [[word & 0xFFFF, word >> 16] for word in words]
    order = [(0, 0), (0, 1), (2, 0), (2, 1), (1, 0), (1, 1), (3, 0), (3, 1)]  # (word, half) of the eight entries
    numbers = torch.stack([halves[word][half] for word, half in order], -1)
    return (numbers >= draw.zero).view(tokens, eighths * 8)[:, :width]


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Philox 4x32-10 of 128-bit counters and a 64-bit key: four 32-bit words each, in int64."""
    c0, c1, c2, c3 = (word & 0xFFFFFFFF for word in counter)
    k0, k1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(10):
        high_a, low_a = _multiply(0xD2511F53, c0)
        high_b, low_b = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and the low word of a product of words. b is split in halves because int64 has only 63 bits."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = high + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF


def drop(x: Tensor, zero: int, seed: int, call: int) -> Tensor:
    return x * _scaled_mask(x, zero, seed, call)


def project(x: Tensor, A: Tensor, zero: int, seed: int, call: int) -> Tensor:
    return (x * _scaled_mask(x, zero, seed, call)) @ A.t()


def gradient(g: Tensor, x: Tensor, zero: int, seed: int, call: int) -> Tensor:
    """Return parts (number, R, in), in fp32 or better, whose sum is the gradient."""
    wide = torch.promote_types(x.dtype, torch.float32)
    g, x = g.to(wide), x.to(wide)
    return (g.t() @ (x * _scaled_mask(x, zero, seed, call))).unsqueeze(0)


def sum_parts(parts: Tensor, out: Tensor) -> Tensor:
    return out.copy_(parts.sum(0))


def add_back(dx: Tensor, g: Tensor, A: Tensor, zero: int, seed: int, call: int) -> Tensor:
    return dx.addcmul_(g @ A, _scaled_mask(dx, zero, seed, call))


def _scaled_mask(x: Tensor, zero: int, seed: int, call: int) -> Tensor:
    """Return s m, in the dtype of x."""
    draw = Draw(zero, seed, call)
    return kept((x.shape[0], x.shape[1]), draw, x.device).to(x.dtype) * draw.factor


_ARGUMENTS = "int zero, int seed, int call"
library.define(f"drop(Tensor x, {_ARGUMENTS}) -> Tensor")  # type: ignore[no-untyped-call]
library.define(f"project(Tensor x, Tensor A, {_ARGUMENTS}) -> Tensor")  # type: ignore[no-untyped-call]
library.define(f"gradient(Tensor g, Tensor x, {_ARGUMENTS}) -> Tensor")  # type: ignore[no-untyped-call]
library.define("sum_parts(Tensor parts, Tensor(a!) out) -> Tensor(a!)")  # type: ignore[no-untyped-call]
library.define(f"add_back(Tensor(a!) dx, Tensor g, Tensor A, {_ARGUMENTS}) -> Tensor(a!)")  # type: ignore[no-untyped-call]
_FUNCTIONS = (drop, project, gradient, sum_parts, add_back)
for _function in _FUNCTIONS:
    library.impl(_function.__name__, _function, "CPU")  # type: ignore[no-untyped-call]


@cache
def _kernels() -> bool:
    """Return whether Triton is installed; if so, register its kernels as the operations on a GPU."""
    if not find_spec("triton"):
        return False
    from . import seeded_dropout_triton as seeded_triton

    for function in _FUNCTIONS:
        library.impl(function.__name__, getattr(seeded_triton, function.__name__), "CUDA")  # type: ignore[no-untyped-call]
    return True


@cache
def _works(device: torch.device, dtype: torch.dtype, ranks: int) -> bool:
    """Whether the kernels can be compiled for this GPU and give correct results."""
    instead = "dropout is not fused with the products of the adapter"
    return _kernels() and trusted(lambda: error(device, dtype, ranks), TOLERANCE, instead)


def error(device: torch.device, dtype: torch.dtype, ranks: int) -> float:
    """Return the largest error of the operations on ``device``, relative to the largest value, for a small x of odd
    sizes."""
    random = torch.Generator(device).manual_seed(0)  # a generator that no run uses
    x, A, g, dx = (
        torch.randn(shape, generator=random, device=device).to(dtype)
        for shape in ((77, 208), (ranks, 208), (77, ranks), (77, 208))
    )
    some, ops = Draw(20_000, 3 << 40 | 7, 12), torch.ops.rasa_train
    found, wide = [ops.drop(x, *some)], x.float()
    expected = [drop(wide, *some)]
    if ranks:
        found += [ops.project(x, A, *some), ops.sum_parts(ops.gradient(g, x, *some), torch.empty_like(A))]
        found += [ops.add_back(dx.clone(), g, A, *some)]
        A, g, dx = A.float(), g.float(), dx.float()
        expected += [project(wide, A, *some), gradient(g, wide, *some)[0], add_back(dx, g, A, *some)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))
