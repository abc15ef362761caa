"""What checks are made of: the device, clocks, errors, and how a check says what it found."""

from __future__ import annotations

import os
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .results import EXIT_NEEDS_GPU, FAILED, NEEDS_GPU, NOT_INSTALLED, OK, Results

TINY = os.environ.get("GPU_CHECK_TINY") == "1"
"""Use shapes that a CPU computes in seconds."""
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
BF16 = torch.bfloat16

Values = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """A check or a measurement, independent of all others."""

    name: str
    run: Callable[[], Values]
    """Returns figures; raises ``Wrong``, or anything else where it fails."""
    gpu: bool = False
    """Cannot run without a GPU."""
    package: str | None = None
    """A package, by the name that is imported, without which it cannot run."""


class Wrong(Exception):
    """What was found is not what should have been found."""

    def __init__(self, why: str, values: Values) -> None:
        super().__init__(why)
        self.values = values


def hold(condition: bool, why: str, values: Values) -> Values:
    """The values, if the condition holds; raises ``Wrong`` otherwise."""
    if not condition:
        raise Wrong(why, values)
    return values


def run_checks(step: str, checks: Sequence[Check], results: Results) -> int:
    """Run every check of a step, whatever the others do, with a line in ``results`` for each. Returns the exit code."""
    outcomes = []
    for check in checks:
        began = time.perf_counter()
        row = {"step": step, "check": check.name, **outcome_of(check)}
        row["seconds"] = round(time.perf_counter() - began, 2)
        results.add(row)
        print(row, flush=True)
        outcomes.append(row["outcome"])
        if ON_GPU:
            torch.cuda.empty_cache()
    if FAILED in outcomes:
        return 1
    return 0 if OK in outcomes else EXIT_NEEDS_GPU


def outcome_of(check: Check) -> dict[str, Any]:
    """Run one check: its outcome, its values, and why it failed."""
    if check.gpu and not ON_GPU:
        return {"outcome": NEEDS_GPU}
    if check.package is not None and find_spec(check.package) is None:
        return {"outcome": NOT_INSTALLED, "why": f"{check.package} is not installed"}
    try:
        return {"outcome": OK, "values": check.run()}
    except Wrong as wrong:
        return {"outcome": FAILED, "values": wrong.values, "why": str(wrong)}
    except Exception as error:
        traceback.print_exc()
        return {"outcome": FAILED, "why": f"{type(error).__name__}: {str(error)[:400]}"}


def synchronize() -> None:
    """Wait for the device."""
    if ON_GPU:
        torch.cuda.synchronize()


def timing_event() -> torch.cuda.Event:
    """An event that can say how long after another one it happened on the device."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def milliseconds(work: Callable[[], object], repeats: int = 10, warmup: int = 3) -> float:
    """Median of the time of one call: on the device where there is a GPU, else on the clock."""
    for _ in range(warmup if ON_GPU else 1):
        work()
    synchronize()
    if not ON_GPU:
        began = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - began)
    pairs = []
    for _ in range(repeats):
        start, end = timing_event(), timing_event()
        start.record()
        work()
        end.record()
        pairs.append((start, end))
    synchronize()
    return float(statistics.median(start.elapsed_time(end) for start, end in pairs))


def error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|"""
    found, expected = found.detach().double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def rounded(value: float) -> float:
    """Four significant digits: enough for a figure that is read."""
    return float(f"{value:.4g}")


def random(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    """A tensor of normal numbers on the device."""
    return torch.randn(*shape, device=DEVICE, dtype=dtype) * scale
