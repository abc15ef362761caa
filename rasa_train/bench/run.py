"""Measure engines side by side: gate, memory, time."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..group import versions
from . import gate
from .counters import count
from .engines import Contender, Engine, Label, contender, engines, give, values_for
from .shapes import LINEARS, architecture, random_model
from .timing import by_operation, interleaved, peak_in_own_process
from .workloads import Problem, describe, language_model, lengths, linears


def compare(
    shape: str,
    workload: str,
    *,
    tokens: int,
    dtype: torch.dtype,
    dropout: float,
    own_stacks: bool,
    only: set[str] | None,
    warmup: int,
    rounds: int,
    device: torch.device,
    profile: bool = False,
) -> dict[str, Any]:
    """Time engines on the same tokens. Returns what ``rasa-bench --json`` prints.

    Args:
        shape: ``linears-1024``, a name in ``SHAPES``, or a path.
        tokens: of one step, for the workloads ``packed`` and ``long``.
        dtype: of the base; the gate is run in bf16 whatever it is.
        own_stacks: give ``stock`` engines full logits, padded batches and recomputed activations, as their users
            have; else all but the adapter is the same for all.
        only: names of the engines to run, besides the frozen base; None for all.
        warmup, rounds: steps of each engine that are not timed, and that are.
        profile: also run a step of each under torch's profiler, afterwards.
    Raises:
        UserError: the shape is none.
    """
    sizes = lengths(workload, tokens)
    problem = _problem(shape, sizes, workload == "padded", dtype, device)
    chosen = [e for e in engines(problem.width, dropout) if only is None or e.name in (*only, "base")]
    skipped = [{**_names(e), "why": f"{e.needs} is not installed"} for e in chosen if e.missing]
    chosen = [e for e in chosen if not e.missing]

    print("checking that each engine computes its method", file=sys.stderr)
    verdicts = {e.label: gate.check(e, device) for e in chosen}
    failed = [{**_names(e), **vars(verdicts[e.label])} for e in chosen if not verdicts[e.label].passed]
    chosen = [e for e in chosen if verdicts[e.label].passed]

    held = _held(problem.base)
    ready: dict[Label, Contender] = {}
    peaks: dict[Label, int | None] = {}
    for engine in chosen:
        print(f"building {_title(engine)}", file=sys.stderr)
        build = partial(_ready, problem, engine, own_stacks)
        if device.type == "cuda":
            ready[engine.label], grown = _gpu_peak(build, device)
            peaks[engine.label] = held + grown
        else:
            own = peak_in_own_process(partial(_twice, build))
            peaks[engine.label] = None if own is None else held + own
            ready[engine.label] = build()
    works = {label: ran.step for label, ran in ready.items()}
    settle = {label: ran.settle for label, ran in ready.items()}
    print(f"timing {warmup} + {rounds} rounds", file=sys.stderr)
    times = interleaved(works, settle, warmup=warmup, rounds=rounds, device=device)
    base = times["base", None]
    profiles: dict[Label, dict[str, float]] = {}
    for label, work in works.items() if profile else ():
        profiles[label] = by_operation(work, device)
        settle[label]()
    rows = [
        {
            **_names(engine),
            "seconds_per_step": statistics.median(took := times[engine.label]),
            "seconds_range": [min(took), max(took)],
            "over_base": statistics.median(a / b for a, b in zip(took, base, strict=True)),
            "tokens_per_second": problem.tokens / statistics.median(took),
            "peak_memory_bytes": peaks[engine.label],
            "loss_error": verdicts[engine.label].loss_error,
            "gradient_error": verdicts[engine.label].gradient_error,
            "gradient_cosine": verdicts[engine.label].gradient_cosine,
            **({"seconds_by_operation": profiles[engine.label]} if profile else {}),
        }
        for engine in chosen
    ]
    return {
        "rows": rows,
        "failed": failed,
        "skipped": skipped,
        "shape": shape,
        "workload": {"name": workload, **describe(sizes)},
        "dtype": str(dtype).removeprefix("torch."),
        "dropout": dropout,
        "own_stacks": own_stacks,
        "rounds": rounds,
        **machine(device),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, one thread"
    optional: dict[str, str | None] = {}
    for package in ("peft", "liger-kernel"):
        try:
            optional[package] = version(package)
        except PackageNotFoundError:
            optional[package] = None
    date = datetime.now(UTC).date().isoformat()
    return {"device": name, "date": date, "versions": {**versions(), **optional}}


def _problem(shape: str, sizes: list[int], padded: bool, dtype: torch.dtype, device: torch.device) -> Problem:
    if shape == LINEARS:
        return linears(sizes, padded=padded, dtype=dtype, device=device)
    return language_model(random_model(architecture(shape), dtype, device), sizes, flat=not padded)


def _ready(problem: Problem, engine: Engine, own_stack: bool) -> Contender:
    ran = contender(engine, problem, own_stack=own_stack)
    give(values_for(engine.method, problem.base), ran.parameters)
    return ran


def _twice(build: Callable[[], Contender]) -> None:
    ran = build()
    for _ in range(2):
        ran.step()
        ran.settle()


def _gpu_peak(build: Callable[[], Contender], device: torch.device) -> tuple[Contender, int]:
    """A contender, and the bytes allocated at most during its step. What other engines hold is not counted: it is
    there before and during the step alike."""
    before = torch.cuda.memory_allocated(device)
    ran = build()
    ran.step()
    ran.settle()
    own = torch.cuda.memory_allocated(device) - before
    torch.cuda.reset_peak_memory_stats(device)
    idle = torch.cuda.memory_allocated(device)
    ran.step()
    ran.settle()
    return ran, own + torch.cuda.max_memory_allocated(device) - idle


def _held(model: nn.Module) -> int:
    return sum({t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())


def _names(engine: Engine) -> dict[str, str | None]:
    name, method = engine.label
    return {"engine": name, "method": method}


def _title(engine: Engine) -> str:
    return " ".join(filter(None, engine.label))


def count_all(shape: str, dropout: float, only: set[str] | None) -> dict[str, Any]:
    """The counters of all engines, or ``only`` of those named. Returns what ``rasa-bench --counters --json`` prints.

    Raises:
        UserError: the shape is none that can be counted.
    """
    if shape == LINEARS:
        raise UserError(f"--counters counts a whole model, not {LINEARS}; try --shape llama-3.1-8b", key="--shape")
    config = architecture(shape)
    labels = [engine.label for engine in engines(config.hidden_size, dropout) if only is None or engine.name in only]
    counted = count(config, dropout, labels)
    rows = [{"engine": engine, "method": method, **vars(c)} for (engine, method), c in counted.items()]
    return {"rows": rows, "shape": shape, "dropout": dropout, **machine(torch.device("cpu"))}
