"""Single operations of the package on this device, against the same in fp32."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rasa_train.kernels import seeded_dropout as seeded
from rasa_train.kernels.linear_cross_entropy import linear_cross_entropy
from rasa_train.kernels.quantized_weight import Fp8, Narrow, Nf4
from rasa_train.kernels.varlen_attention import varlen_attention
from rasa_train.optim.optimizers import AdamW, Lion, LionW, make_optimizer

from .measure import BF16, DEVICE, TINY, Check, Values, error, hold, milliseconds, random, rounded

BF16_ERROR = 2e-2
"""Error of an operation with bf16 inputs and results: a few roundings of 2^-8 each."""
FP8_ERROR = 0.06
"""Error of a product of two fp8 operands: e4m3 has three bits after the point, so an entry is off by up to 1/16."""
NF4_ERROR = 0.15
"""Error of a product with a weight in 4 bits: quantising normal numbers alone costs about 0.09."""
FP32_ERROR = 1e-5
"""Error of parameters after three steps in fp32. A step moves them by 2e-4 and more of their size, so that a lost
factor is far above, and the rounding of a few operations far below."""


def varlen(window: int | None) -> Values:
    """Compare attention within sequences of one row, with grouped key heads: the output and three gradients."""
    lengths = [5, 130, 64, 1, 57]
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        where = {"cu_seq_lens_q": starts, "max_length_q": max(lengths), "sliding_window": window}
        return varlen_attention(nn.Identity(), q, k, v, None, **where)[0]  # type: ignore[arg-type]

    inputs = [random(1, heads, sum(lengths), 128).requires_grad_() for heads in (8, 2, 2)]
    exact = [t.detach().float().requires_grad_() for t in inputs]
    out, expected = run(*inputs), run(*exact)
    dout = torch.randn_like(out)
    found = (out, *torch.autograd.grad(out, inputs, dout))
    right = (expected, *torch.autograd.grad(expected, exact, dout.float()))
    values = {n: rounded(error(a, b)) for n, a, b in zip(("y", "dq", "dk", "dv"), found, right, strict=True)}
    return hold(max(values.values()) < BF16_ERROR, f"an error is above {BF16_ERROR}", values)


def seeded_kernels(dtype: torch.dtype) -> Values:
    """Compare the products with a seeded mask, at several ranks: each rank has a kernel of its own."""
    values: Values = {}
    for ranks in (0, 8, 16, 24, 40, 80, 120, 256):  # 0: the operation that only drops
        if not seeded.usable(DEVICE, dtype, ranks):
            return hold(False, f"the kernels are not used with {ranks} ranks; the log says why", values)
        values[f"r{ranks}"] = rounded(seeded.error(DEVICE, dtype, ranks))
    return hold(max(values.values()) < seeded.TOLERANCE, f"an error is above {seeded.TOLERANCE}", values)


def narrow_base(kind: type[Narrow], most: float) -> Values:
    """Compare both products with a frozen weight in fewer bits with those in bf16, and their times."""
    out, width, tokens = (64, 128, 32) if TINY else (14336, 4096, 8192)
    weight, x, dy = random(out, width, scale=0.02), random(tokens, width), random(tokens, out)
    narrow = kind(weight)
    values = {
        "forward_error": rounded(error(narrow.product(narrow.ready(x)), x @ weight.t())),
        "gradient_error": rounded(error(narrow.gradient(dy), dy @ weight)),
        "forward_ms": rounded(milliseconds(lambda: narrow.product(narrow.ready(x)))),
        "forward_bf16_ms": rounded(milliseconds(lambda: x @ weight.t())),
        "gradient_ms": rounded(milliseconds(lambda: narrow.gradient(dy))),
        "gradient_bf16_ms": rounded(milliseconds(lambda: dy @ weight)),
    }
    fine = max(values["forward_error"], values["gradient_error"]) < most
    return hold(fine, f"an error is above {most}", values)


def loss_head() -> Values:
    """Compare the chunked loss of the LM head and its gradient with fp32, and its time with its two products'."""
    vocabulary, width, tokens = (512, 64, 100) if TINY else (128256, 4096, 6000)
    weight, hidden = random(vocabulary, width, scale=0.02), random(tokens, width).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=DEVICE)

    def gradient(rows: int) -> tuple[Tensor, Tensor]:
        loss = linear_cross_entropy(hidden[:rows], weight, None, targets[:rows])
        return loss, torch.autograd.grad(loss, hidden)[0][:rows]

    some = min(512, tokens)
    loss, found = gradient(some)
    exact = hidden[:some].detach().float().requires_grad_()
    expected = F.cross_entropy(exact @ weight.float().t(), targets[:some], reduction="sum")
    (right,) = torch.autograd.grad(expected, exact)
    values = {
        "loss_error": rounded(abs(float(loss) / float(expected) - 1)),
        "gradient_error": rounded(error(found, right)),
        "ms": rounded(milliseconds(lambda: gradient(tokens), 5)),
        "products_alone_ms": rounded(milliseconds(lambda: (hidden.detach() @ weight.t()) @ weight, 5)),
    }
    fine = values["gradient_error"] < BF16_ERROR and values["loss_error"] < BF16_ERROR / 10
    return hold(fine, "the loss or its gradient is off", values)


def lion() -> Values:
    """Compare the parameters after three steps of Lion on this device and on a CPU."""
    found, right = (stepped(lambda p: Lion(p, LionW()), torch.device(place)) for place in (DEVICE, "cpu"))
    values = {"error": rounded(error(found, right))}
    return hold(values["error"] < FP32_ERROR, "the devices differ", values)


def adamw() -> Values:
    """Compare AdamW as training makes it, and torch's fused one, with the plain loop over tensors."""
    config = AdamW(weight_decay=0.1)
    given: Values = config.model_dump(exclude={"name"})
    plain = stepped(lambda p: torch.optim.AdamW(p, **given, foreach=False, fused=False), DEVICE)
    ours = stepped(lambda p: make_optimizer(config, p), DEVICE)
    fused = stepped(lambda p: torch.optim.AdamW(p, **given, fused=True), DEVICE)
    values = {"as_trained": rounded(error(ours, plain)), "fused": rounded(error(fused, plain))}
    return hold(max(values.values()) < FP32_ERROR, "AdamW differs from its plain loop", values)


def stepped(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], device: torch.device) -> Tensor:
    """Parameters after three steps with the same gradients, on the host."""
    random_numbers = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(64, 33, generator=random_numbers).to(device)

    parameters = [nn.Parameter(draw()) for _ in range(100)]
    optimizer = make(parameters)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = draw()
        optimizer.step()
    return torch.cat([p.detach().cpu().flatten() for p in parameters])


CHECKS = [
    Check("varlen attention", partial(varlen, None)),
    Check("varlen attention, window of 32", partial(varlen, 32)),
    Check("seeded dropout, bf16", partial(seeded_kernels, BF16), gpu=True),
    Check("seeded dropout, fp16", partial(seeded_kernels, torch.float16), gpu=True),
    Check("fp8 base", partial(narrow_base, Fp8, FP8_ERROR)),
    Check("nf4 base", partial(narrow_base, Nf4, NF4_ERROR), package="bitsandbytes"),
    Check("loss head", loss_head),
    Check("Lion", lion, gpu=True),
    Check("AdamW", adamw, gpu=True),
]
