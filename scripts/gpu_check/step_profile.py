"""Where the time of an optimizer step goes: its parts on the device and on the host, the kernels, the gaps."""

from __future__ import annotations

import os
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from rasa_train.adapters.shared_input import packed
from rasa_train.bench.engines import Contender
from rasa_train.optim.optimizers import Lion, LionW

from .large_model import ENGINES, TOKENS, built
from .measure import ON_GPU, Check, Values, rounded, synchronize, timing_event

PARTS = ("pack", "forward", "backward", "unpack", "clip_and_optimizer")
DROPOUT = 0.05
LISTED = 45
"""Kernels in profile.txt, those with the most time first."""
GAP = 20.0
"""Microseconds without a kernel that are a gap worth naming: the device waited for the host."""


class Marks:
    """Points in time, on the host and on the device."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, torch.cuda.Event | None]] = []

    def set(self) -> None:
        """Set a mark here."""
        event = timing_event() if ON_GPU else None
        if event is not None:
            event.record()
        self.marks.append((time.perf_counter(), event))

    def between(self) -> dict[str, dict[str, float | None]]:
        """Milliseconds of each part."""
        synchronize()
        found = {}
        for part, ((began, start), (ended, end)) in zip(PARTS, pairwise(self.marks), strict=True):
            device = rounded(start.elapsed_time(end)) if start is not None and end is not None else None
            found[part] = {"device_ms": device, "host_ms": rounded(1e3 * (ended - began))}
        return found


def optimizer_step(ran: Contender, optimizer: torch.optim.Optimizer | None, marks: Marks) -> None:
    """Run a whole optimizer step of one micro-batch, with a mark between its parts."""
    marks.set()
    with packed(ran.groups):
        marks.set()
        loss = ran.loss()
        marks.set()
        loss.backward()  # type: ignore[no-untyped-call]
        marks.set()
    marks.set()
    if optimizer is not None:
        torch.nn.utils.clip_grad_norm_(list(ran.parameters.values()), 1.0)
        optimizer.step()
    marks.set()


def profile(name: str) -> Values:
    """Time the parts of a step and measure its peak memory. Its kernels go to profile.txt."""
    ran = built(name, DROPOUT)
    optimizer = Lion(list(ran.parameters.values()), LionW(lr=1e-9)) if ran.parameters else None
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(4):  # the last one counts
        marks = Marks()
        synchronize()
        optimizer_step(ran, optimizer, marks)
        parts = marks.between()
        ran.settle()
    peak = rounded(torch.cuda.max_memory_allocated() / 2**30) if ON_GPU else None
    values: Values = {"tokens": TOKENS, "dropout": DROPOUT, "parts": parts, "peak_gib": peak}
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if ON_GPU else [ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiled:
        optimizer_step(ran, optimizer, Marks())
        synchronize()
    ran.settle()
    spans = kernels(profiled) if ON_GPU else operations(profiled)
    if ON_GPU and spans:
        values |= gaps(spans)
    longest = by_name(spans)
    values["longest"] = [{"name": n[:60], "ms": rounded(ms), "times": times} for n, ms, times in longest[:10]]
    lines = [f"{ms:9.2f} ms {times:6d} x {n}\n" for n, ms, times in longest[:LISTED]]
    with Path(os.environ["GPU_CHECK_OUT"], "profile.txt").open("a") as file:
        file.writelines([f"== a step of {name}, {TOKENS:,} tokens\n", *lines])
    return values


Span = tuple[float, float, str]
"""Begin and end in microseconds, and a name."""


def kernels(profiled: torch.profiler.profile) -> list[Span]:
    """Everything that the device did, in the order of time."""
    events: Any = profiled.events()  # type: ignore[no-untyped-call]
    own = [e for e in events if str(e.device_type).endswith("CUDA") and not e.name.startswith("ProfilerStep")]
    return sorted((e.time_range.start, e.time_range.end, e.name) for e in own if not e.name.startswith("Optimizer."))


def operations(profiled: torch.profiler.profile) -> list[Span]:
    """Operations of the host with the time that each took itself."""
    events: Any = profiled.events()  # type: ignore[no-untyped-call]
    return [(0.0, float(e.self_cpu_time_total), e.name) for e in events]


def by_name(spans: list[Span]) -> list[tuple[str, float, int]]:
    """Names with their milliseconds and how often they occur, the longest first."""
    found: dict[str, list[float]] = {}
    for start, end, name in spans:
        found.setdefault(name[:110], []).append((end - start) / 1e3)
    return sorted(((name, sum(ms), len(ms)) for name, ms in found.items()), key=lambda row: -row[1])


def gaps(spans: list[Span]) -> Values:
    """How long the device was busy, and how long it waited."""
    idle = [after[0] - before[1] for before, after in pairwise(spans) if after[0] > before[1]]
    return {
        "kernels": len(spans),
        "span_ms": rounded((spans[-1][1] - spans[0][0]) / 1e3),
        "busy_ms": rounded(sum(end - start for start, end, _ in spans) / 1e3),
        "gaps_ms": rounded(sum(idle) / 1e3),
        "long_gaps": sum(gap > GAP for gap in idle),
        "long_gaps_ms": rounded(sum(gap for gap in idle if gap > GAP) / 1e3),
    }


CHECKS = [Check(f"step of {name}", partial(profile, name)) for name in ENGINES]
