"""Rates of the products that training is made of: which ranks and forms does this card like?"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from rasa_train.kernels.varlen_attention import varlen_attention

from .measure import BF16, DEVICE, TINY, Check, Values, milliseconds, random, rounded

TOKENS = (32,) if TINY else (768, 8192, 16384)
SHAPES = ((64, 128),) if TINY else ((4096, 14336), (4096, 4096), (14336, 4096))
"""Inputs and outputs of a linear."""
RANKS = (8, 39, 40, 48, 64, 128)
"""RaSA's 39 beside the multiples of 8 that it can be padded to."""
EXTENSIONS = (64, 128)
"""Columns of an adapter that are appended to the base's own, so that both are one product."""
REPEATS = 20


def microseconds(work: partial[Tensor]) -> float:
    """Median time of a call."""
    return rounded(1e3 * milliseconds(work, repeats=REPEATS))


def products(tokens: int, width: int, out: int) -> Values:
    """Time a linear's two products, the six of an adapter at each rank, and the linear's with columns appended."""
    x, W, dy = random(tokens, width), random(out, width), random(tokens, out)
    y, dx = torch.empty_like(dy), torch.empty_like(x)
    forward = microseconds(partial(torch.mm, x, W.t(), out=y))
    backward = microseconds(partial(torch.mm, dy, W, out=dx))
    operations = 2 * tokens * width * out
    values: Values = {
        "forward_us": forward,
        "backward_us": backward,
        "forward_tflops": rounded(operations / forward / 1e6),
        "backward_tflops": rounded(operations / backward / 1e6),
        "ranks": {},
        "appended": {},
    }
    for rank in RANKS:
        A, B, z = random(rank, width), random(out, rank), random(tokens, rank)
        parts = {
            "x A^T": partial(torch.mm, x, A.t()),
            "y += z B^T": partial(y.addmm_, z, B.t()),
            "dy B": partial(torch.mm, dy, B),
            "dy^T z": partial(torch.mm, dy.t(), z),
            "z^T x": partial(torch.mm, z.t(), x),
            "dx += z A": partial(dx.addmm_, z, A),
        }
        took = {name: microseconds(part) for name, part in parts.items()}
        total = sum(took.values())
        values["ranks"][str(rank)] = {
            **took,
            "sum_us": rounded(total),
            "of_base": rounded(total / (forward + backward)),
        }
    for columns in EXTENSIONS:
        longer, wider = random(tokens, width + columns), random(out, width + columns)
        longer_dx = torch.empty_like(longer)
        values["appended"][str(columns)] = {
            "forward_over_base": rounded(microseconds(partial(torch.mm, longer, wider.t(), out=y)) / forward),
            "backward_over_base": rounded(microseconds(partial(torch.mm, dy, wider, out=longer_dx)) / backward),
        }
    return values


def fp8_products(tokens: int, width: int, out: int) -> Values:
    """Time the forward product in fp8, with one scale a tensor and with one a row, beside that in bf16."""
    x, W = random(tokens, width, scale=0.05), random(out, width, scale=0.05)
    bf16 = microseconds(partial(torch.mm, x, W.t()))
    narrow_x, narrow_W = x.to(torch.float8_e4m3fn), W.to(torch.float8_e4m3fn)
    values: Values = {}
    ones = partial(torch.ones, device=DEVICE)
    for kind, of_x, of_W in (("tensorwise", ones(()), ones(())), ("rowwise", ones(tokens, 1), ones(1, out))):
        scaled = partial(torch._scaled_mm, scale_a=of_x, scale_b=of_W, out_dtype=BF16, use_fast_accum=True)
        took = microseconds(partial(scaled, narrow_x, narrow_W.t()))
        tflops = rounded(2 * tokens * width * out / took / 1e6)
        values[kind] = {"tflops": tflops, "bf16_over_fp8": rounded(bf16 / took)}
    return values


def attention(tokens: int, length: int) -> Values:
    """Time the attention of the 8B shape within sequences of one length."""
    starts = torch.arange(0, tokens + 1, length, device=DEVICE, dtype=torch.int32)
    q, k, v = (random(1, heads, tokens, 128).requires_grad_() for heads in (32, 8, 8))
    dout = random(1, tokens, 32, 128)

    def forward() -> Tensor:
        where = {"cu_seq_lens_q": starts, "max_length_q": length}
        return varlen_attention(nn.Identity(), q, k, v, None, **where)[0]  # type: ignore[arg-type]

    alone = microseconds(partial(forward))
    both = microseconds(partial(lambda: torch.autograd.grad(forward(), (q, k, v), dout)[0]))
    operations = 2 * length * 4096 * tokens  # two products, of which the causal mask leaves half
    return {
        "forward_tflops": rounded(operations / alone / 1e6),
        "both_tflops": rounded(3.5 * operations / both / 1e6),
        "us_per_token_of_32_layers": rounded(32 * both / tokens),
    }


ALL = [(tokens, *shape) for shape in SHAPES for tokens in TOKENS]
CHECKS = [
    *(Check(f"products {t} x {i} -> {o}", partial(products, t, i, o)) for t, i, o in ALL),
    *(Check(f"fp8 {t} x {i} -> {o}", partial(fp8_products, t, i, o), gpu=True) for t, i, o in ALL if t >= 8192),
    *(Check(f"attention, {n} tokens each", partial(attention, 16384, n), gpu=True) for n in (256, 1024, 4096)),
]
