"""The operations of ``seeded_dropout`` as Triton kernels.

A thread reads eight adjacent entries of x, whose random numbers come from one Philox block, so the mask exists only in
registers. Sums are computed in fp32 and rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

ROWS = 64
"""Number of rows of x in one block."""
COLUMNS = 128
"""Number of columns of x in one block of ``drop``."""
PROGRAMS = 264
"""Number of programs that the sums of ``gradient`` are split into: two for each multiprocessor of a large GPU."""


@triton.jit
def _masked(values, t, eighth, width, zero, seed, call):
    """Return ``values`` (rows, columns) of x with dropped entries set to zero. t: their rows; eighth: columns / 8."""
    eighths = tl.cdiv(width, 8)
    position = (t[:, None] * eighths + eighth[None, :]).to(tl.uint32)
    nothing = position * 0
    w0, w1, w2, w3 = tl.philox(seed, position, nothing + call.to(tl.uint32), nothing, nothing + 1)
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))
    numbers = tl.join(words & 0xFFFF, words >> 16).reshape(values.shape)
    return tl.where(numbers >= zero, values, 0.0)


@triton.jit
def _factor(zero):
    return 65536.0 / (65536 - zero)


@triton.jit(do_not_specialize=["tokens", "zero", "seed", "call"])
def _drop(x, y, tokens, zero, seed, call, width, BT: constexpr, BC: constexpr):
    t = (tl.program_id(1) * BT + tl.arange(0, BT)).to(tl.int64)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    eighth = tl.program_id(0) * (BC // 8) + tl.arange(0, BC // 8)
    place, inside = t[:, None] * width + c[None, :], (t < tokens)[:, None] & (c < width)[None, :]
    values = tl.load(x + place, inside, 0.0).to(tl.float32) * _factor(zero)
    tl.store(y + place, _masked(values, t, eighth, width, zero, seed, call), inside)


@triton.jit(do_not_specialize=["tokens", "zero", "seed", "call"])
def _project(x, A, z, tokens, zero, seed, call, width, ranks: constexpr, BT: constexpr, BC: constexpr, BR: constexpr):
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    r = tl.arange(0, BR)
    total = tl.zeros((BT, BR), tl.float32)
    for start in range(0, width, BC):
        c = start + tl.arange(0, BC)
        inside = c < width
        values = tl.load(x + t[:, None] * width + c[None, :], (t < tokens)[:, None] & inside[None, :], 0.0)
        values = _masked(values, t, start // 8 + tl.arange(0, BC // 8), width, zero, seed, call)
        factors = tl.load(A + r[:, None] * width + c[None, :], (r < ranks)[:, None] & inside[None, :], 0.0)
        total = tl.dot(values, tl.trans(factors), total)
    tl.store(z + t[:, None] * ranks + r[None, :], total * _factor(zero), (t < tokens)[:, None] & (r < ranks)[None, :])


@triton.jit(do_not_specialize=["tokens", "zero", "seed", "call", "share"])
def _gradient(
    g, x, parts, tokens, zero, seed, call, share, width, ranks: constexpr, BT: constexpr, BC: constexpr, BR: constexpr
):
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    eighth = tl.program_id(0) * (BC // 8) + tl.arange(0, BC // 8)
    r = tl.arange(0, BR)
    inside = c < width
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, tokens)
    total = tl.zeros((BR, BC), tl.float32)
    for start in range(first, last, BT):
        t = (start + tl.arange(0, BT)).to(tl.int64)
        values = tl.load(x + t[:, None] * width + c[None, :], (t < last)[:, None] & inside[None, :], 0.0)
        values = _masked(values, t, eighth, width, zero, seed, call)
        gs = tl.load(g + t[:, None] * ranks + r[None, :], (t < last)[:, None] & (r < ranks)[None, :], 0.0)
        total = tl.dot(tl.trans(gs), values, total)
    place = parts + tl.program_id(1) * ranks * width
    tl.store(place + r[:, None] * width + c[None, :], total * _factor(zero), (r < ranks)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["number"])
def _sum_parts(parts, out, number, size, BLOCK: constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(number):
        total += tl.load(parts + part * size + at, at < size, 0.0)
    tl.store(out + at, total, at < size)


@triton.jit(do_not_specialize=["tokens", "zero", "seed", "call"])
def _add_back(dx, g, A, tokens, zero, seed, call, width, ranks: constexpr, BT: constexpr, BC: constexpr, BR: constexpr):
    t = (tl.program_id(1) * BT + tl.arange(0, BT)).to(tl.int64)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    r = tl.arange(0, BR)
    gs = tl.load(g + t[:, None] * ranks + r[None, :], (t < tokens)[:, None] & (r < ranks)[None, :], 0.0)
    factors = tl.load(A + r[:, None] * width + c[None, :], (r < ranks)[:, None] & (c < width)[None, :], 0.0)
    eighth = tl.program_id(0) * (BC // 8) + tl.arange(0, BC // 8)
    update = _masked(tl.dot(gs, factors) * _factor(zero), t, eighth, width, zero, seed, call)
    place, inside = dx + t[:, None] * width + c[None, :], (t < tokens)[:, None] & (c < width)[None, :]
    tl.store(place, tl.load(place, inside, 0.0) + update, inside)


def drop(x: Tensor, zero: int, seed: int, call: int) -> Tensor:
    x = x.contiguous()
    tokens, width = x.shape
    y = torch.empty_like(x)
    if tokens:
        grid = (triton.cdiv(width, COLUMNS), triton.cdiv(tokens, ROWS))
        with torch.cuda.device_of(x):
            _drop[grid](x, y, tokens, zero, seed, call, width, ROWS, COLUMNS)
    return y


def project(x: Tensor, A: Tensor, zero: int, seed: int, call: int) -> Tensor:
    x, A = x.contiguous(), A.contiguous()
    (tokens, width), ranks = x.shape, len(A)
    z = x.new_empty(tokens, ranks)
    if not tokens:
        return z
    with torch.cuda.device_of(x):
        grid = (triton.cdiv(tokens, ROWS),)
        _project[grid](x, A, z, tokens, zero, seed, call, width, ranks, **_blocks(ranks))
    return z


def gradient(g: Tensor, x: Tensor, zero: int, seed: int, call: int) -> Tensor:
    g, x = g.contiguous(), x.contiguous()
    (tokens, width), ranks = x.shape, g.shape[1]
    blocks = _blocks(ranks)
    columns = triton.cdiv(width, blocks["BC"])
    share = ROWS * max(1, triton.cdiv(tokens, ROWS * max(1, PROGRAMS // columns)))
    parts = x.new_empty(triton.cdiv(tokens, share), ranks, width, dtype=torch.float32)
    grid = (columns, len(parts))
    if not tokens:
        return parts
    with torch.cuda.device_of(x):
        _gradient[grid](g, x, parts, tokens, zero, seed, call, share, width, ranks, **blocks)
    return parts


def sum_parts(parts: Tensor, out: Tensor) -> Tensor:
    size = out.numel()
    with torch.cuda.device_of(out):
        _sum_parts[(triton.cdiv(size, 1024),)](parts, out, len(parts), size, 1024)
    return out


def add_back(dx: Tensor, g: Tensor, A: Tensor, zero: int, seed: int, call: int) -> Tensor:
    g, A = g.contiguous(), A.contiguous()
    (tokens, width), ranks = dx.shape, g.shape[1]
    blocks = _blocks(ranks)
    grid = (triton.cdiv(width, blocks["BC"]), triton.cdiv(tokens, ROWS))
    if not tokens:
        return dx
    with torch.cuda.device_of(dx):
        _add_back[grid](dx, g, A, tokens, zero, seed, call, width, ranks, **blocks)
    return dx


def _blocks(ranks: int) -> dict[str, int]:
    """Return block sizes that fit into the shared memory of any GPU from Ampere on (99 KiB)."""
    padded = max(16, triton.next_power_of_2(ranks))
    small = padded <= 64
    return {
        "BT": ROWS,
        "BC": 128 if small else 64,
        "BR": padded,
        "num_warps": 4 if small else 8,
        "num_stages": 3 if padded <= 128 else 2,
    }
