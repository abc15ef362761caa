"""The operations of ``cross_entropy`` as one Triton kernel: one program for each row of the logits.

A program sweeps over its row twice, in blocks: for the largest logit and the sum of exponentials, which is corrected
whenever a larger logit is met (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"); and, if
wanted, to write the gradient. Programs are large, so that few rows are in work at one time and the second sweep finds
most of its row in the cache of the GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

MOST_COLUMNS = 16_384
"""Largest number of logits in one block: 32 for each thread."""


@triton.jit
def _row(logits, targets, loss, columns, GRADIENT: constexpr, BLOCK: constexpr):
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * columns
    c = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    # A target outside the vocabulary gives NaN, and reads nothing.
    of_target = tl.load(x + target, (target >= 0) & (target < columns), float("nan")).to(tl.float32)
    highest = -float("inf")
    shift = 0.0  # the highest logit so far, unless that is -inf, which cannot be subtracted from itself
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + c
        values = tl.load(x + at, at < columns, -float("inf"), eviction_policy="evict_last").to(tl.float32)
        higher = tl.maximum(highest, tl.max(values, 0))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        sums = sums * tl.where(highest == -float("inf"), 0.0, tl.exp(highest - higher)) + tl.exp(values - shift)
        highest = higher
    total = tl.sum(sums, 0)
    tl.store(loss + row, tl.log(total) - (of_target - shift))
    if GRADIENT:
        scale = 1.0 / total
        for start in range(0, columns, BLOCK):
            at = start + c
            values = tl.load(x + at, at < columns, -float("inf"), eviction_policy="evict_first").to(tl.float32)
            p = tl.exp(values - shift) * scale
            tl.store(x + at, tl.where(at == target, p - 1.0, p), at < columns, eviction_policy="evict_first")


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    return _run(logits, targets, gradient=False)


def losses_and_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    return _run(logits, targets, gradient=True)


def _run(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    assert logits.is_contiguous()  # a copy would take the memory of the logits again
    (rows, columns), targets = logits.shape, targets.contiguous()
    loss = logits.new_empty(rows, dtype=torch.float32)
    if rows:
        with torch.cuda.device_of(logits):
            _row[(rows,)](logits, targets, loss, columns, gradient, **_blocks(columns))
    return loss


def _blocks(columns: int) -> dict[str, int]:
    block = min(MOST_COLUMNS, max(128, triton.next_power_of_2(columns)))
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 1024))}
