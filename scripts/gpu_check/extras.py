"""What else could be gained: fused norms, a compiled base, and how far our kernels are from cuBLAS."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from transformers.models.llama import modeling_llama

from rasa_train.bench.engines import Contender
from rasa_train.kernels import seeded_dropout as seeded
from rasa_train.models.layers import compile_layers, light_contexts, uncompile_layers

from .large_model import ENGINES, TOKENS, built, problem, step_of
from .measure import DEVICE, ON_GPU, Check, Values, hold, milliseconds, random, rounded, synchronize

LAYERS = 8
"""Layers of the 8B shape that are run: what is gained in a layer is the same with fewer."""
COMPILED_LAYERS = 4
SHAPES = ((4096, 24), (4096, 120), (4096, 40), (14336, 8), (14336, 40))
"""Width and ranks of the products with a dropped input."""


def fused_base() -> Values:
    """Time the frozen base, LoRA and RaSA as they are, and with Liger's norms, SwiGLU and rotary embedding."""
    values: dict[str, Any] = {"layers": LAYERS, "tokens": TOKENS, "eager": timed()}
    if ON_GPU and find_spec("liger_kernel"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama  # type: ignore[import-not-found]

        problem(COMPILED_LAYERS)  # made while the classes are transformers' own: Liger replaces them for the process
        rotary = modeling_llama.apply_rotary_pos_emb
        apply_liger_kernel_to_llama(
            model=problem(LAYERS).base, rope=True, cross_entropy=False, fused_linear_cross_entropy=False
        )
        try:
            values["liger"] = timed()
        finally:
            modeling_llama.apply_rotary_pos_emb = rotary
    return values


def timed() -> dict[str, dict[str, float | None]]:
    """Milliseconds of a step without dropout, and peak memory, of the base, LoRA and RaSA."""
    return {name: timed_step(built(name, 0.0, LAYERS)) for name in ENGINES}


def compiled_layers() -> Values:
    """Time the base and RaSA with dropout, as they are, with light checkpointing, and compiled with and without it. The
    gradients of compiled layers must be those of the layers themselves."""
    values: Values = {"layers": COMPILED_LAYERS, "tokens": TOKENS}
    worst = 0.0
    for name in ("base", "RaSA"):
        found: dict[str, Any] = {"eager": timed_step(built(name, 0.05, COMPILED_LAYERS))}
        for light in (False, True):
            ran = built(name, 0.05, COMPILED_LAYERS)
            before = gradient_of(ran)
            compile_layers(ran.model, light=light)
            began = time.perf_counter()
            after = gradient_of(ran)
            synchronize()
            first = rounded(time.perf_counter() - began)
            difference = float((after - before).norm() / before.norm()) if name != "base" else 0.0
            worst = max(worst, difference)
            found["compiled, light" if light else "compiled"] = {
                **timed_step(ran),
                "first_step_s": first,
                "gradient_difference": rounded(difference),
            }
            uncompile_layers(ran.model)
        ran = built(name, 0.05, COMPILED_LAYERS)
        ran.model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": light_contexts})  # type: ignore[operator]
        found["light"] = timed_step(ran)
        values[name] = found
    return hold(worst < 0.1, f"gradients of compiled layers differ by {worst:.1%}", values)


def timed_step(ran: Contender) -> dict[str, float | None]:
    """Milliseconds of a step, and peak memory."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    ms = rounded(milliseconds(step_of(ran), repeats=5, warmup=2))
    return {"ms": ms, "peak_gib": rounded(torch.cuda.max_memory_allocated() / 2**30) if ON_GPU else None}


def gradient_of(ran: Contender) -> torch.Tensor:
    """The gradients of a step, side by side, with the dropout masks of one seed."""
    torch.manual_seed(0)
    ran.step()
    found = [parameter.grad.flatten() for parameter in ran.parameters.values() if parameter.grad is not None]
    ran.settle()
    return torch.cat(found) if found else torch.zeros(1)


def seeded_speed() -> Values:
    """Time the three products with a seeded mask beside those of cuBLAS without dropout."""
    used = seeded.usable(DEVICE, torch.bfloat16, 8)
    hold(used, "the kernels are not used on this device; the log says why", {})
    return {f"{width} wide, r{ranks}": seeded_shape(width, ranks) for width, ranks in SHAPES}


def seeded_shape(width: int, ranks: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each product of one shape, and the terabytes a second that ours reads and writes."""
    operations, drawn = torch.ops.rasa_train, (3277, 3 << 40 | 7, 12)
    x, A, g, dx = random(TOKENS, width), random(ranks, width), random(TOKENS, ranks), random(TOKENS, width)
    out = torch.empty_like(A)

    def gradient() -> object:
        return operations.sum_parts(operations.gradient(g, x, *drawn), out)

    pairs: dict[str, tuple[Callable[[], object], Callable[[], object], int]] = {
        "project": (lambda: operations.project(x, A, *drawn), lambda: x @ A.t(), 1),
        "gradient": (gradient, lambda: torch.mm(g.t(), x, out=out), 1),
        "add_back": (lambda: operations.add_back(dx, g, A, *drawn), lambda: dx.addmm_(g, A), 2),
    }
    found = {}
    for name, (ours, theirs, passes) in pairs.items():
        ms = milliseconds(ours)
        tb_s = passes * 2 * TOKENS * width / 1e9 / ms
        found[name] = {
            "seeded_ms": rounded(ms),
            "cublas_ms": rounded(milliseconds(theirs)),
            "tb_s": rounded(tb_s),
        }
    return found


CHECKS = [
    Check("fused norms and SwiGLU", fused_base),
    Check("seeded kernels beside cuBLAS", seeded_speed, gpu=True),
    Check("compiled layers", compiled_layers, gpu=True),
]
