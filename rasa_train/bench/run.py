"""Measure engines side by side: check each one's correctness, then measure memory and time."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError, say
from ..process import version_of, versions
from ..training.memory_search import MARGIN
from . import gate
from .compiled_counters import CompiledCount, count_compiled
from .counters import Count, count
from .engines import BASE, Choice, Contender, Engine, Label, contender, engines, give, title, values_for
from .room import MOST_TOKENS, most_tokens
from .shapes import LINEARS, LinearStack, architecture, random_model
from .timing import by_operation, interleaved, peak_in_own_process
from .workloads import WORKLOADS, Problem, describe, language_model, lengths, linears

CPU = "cpu, one thread"
"""Name of the processor as a device."""


@dataclass(frozen=True)
class Protocol:
    """How engines are compared."""

    dtype: torch.dtype
    """Dtype of the base. The gate always runs in bf16."""
    dropout: float
    """Dropout on the adapters' input."""
    own_stacks: bool
    """Whether ``stock`` engines run with full logits, padded batches and recomputed activations, as their users run
    them. Otherwise all engines differ only in the adapter."""
    choice: Choice
    """Engines to compare."""
    warmup: int
    """Number of steps of each engine that are not timed."""
    rounds: int
    """Number of steps of each engine that are timed."""
    profile: bool = False
    """Whether a step of each engine is run under torch's profiler afterwards."""
    fused: bool = False
    """Whether all engines, the frozen base too, compute norms, rotary embedding and SwiGLU with Liger's kernels."""


@dataclass(frozen=True)
class Timing:
    """Cost of a step of one engine."""

    seconds_per_step: float
    seconds_range: tuple[float, float]
    over_base: float
    """Median, over the rounds, of the time over that of the frozen base."""
    tokens_per_second: float
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class Comparison:
    """The engines of a comparison, by label: what the gate found, the timings, and why some have none."""

    shape: str
    workload: str
    sizes: list[int]
    protocol: Protocol
    device: str
    verdicts: dict[Label, gate.Verdict]
    timings: dict[Label, Timing]
    profiles: dict[Label, dict[str, float]]
    """Seconds by operation, the longest first, if they were asked for."""
    skipped: dict[Label, str]
    misfits: dict[Label, str]
    """Reasons of the engines that ran out of memory."""

    @property
    def failed(self) -> dict[Label, gate.Verdict]:
        return {label: verdict for label, verdict in self.verdicts.items() if not verdict.passed}

    def as_json(self) -> dict[str, object]:
        return {
            "rows": [
                {**_names(label), **vars(timing), **profile, **vars(self.verdicts[label])}
                for label, timing in self.timings.items()
                for profile in [{"seconds_by_operation": self.profiles[label]} if self.profiles else {}]
            ],
            "failed": [{**_names(label), **vars(verdict)} for label, verdict in self.failed.items()],
            "skipped": [{**_names(label), "why": why} for label, why in self.skipped.items()],
            "does_not_fit": [{**_names(label), "why": why} for label, why in self.misfits.items()],
            "shape": self.shape,
            "workload": {"name": self.workload, **describe(self.sizes)},
            "dtype": str(self.protocol.dtype).removeprefix("torch."),
            "dropout": self.protocol.dropout,
            "own_stacks": self.protocol.own_stacks,
            "kernels": "liger" if self.protocol.fused else "none",
            "rounds": self.protocol.rounds,
            "device": self.device,
            **date_and_versions(),
        }


def compare(shape: str, workload: str, tokens: int | None, protocol: Protocol, device: torch.device) -> Comparison:
    """Time engines on the same tokens. When an engine runs out of memory, the others continue.

    Args:
        shape: ``linears-1024``, a name in ``SHAPES``, or a path.
        tokens: tokens of a step, except for the workload ``padded``. None: 1,024 on a CPU; on a GPU as many as fit in
            memory for every engine, up to the workload's ``most_tokens``.
    Raises:
        UserError: there is no such shape, or the frozen base alone does not fit in memory.
    """
    with _base_fits(shape, tokens):
        base = _base(shape, protocol.dtype, device)
    width = base.width if isinstance(base, LinearStack) else base.config.hidden_size
    chosen = protocol.choice.of(engines(width, protocol.dropout, WORKLOADS[workload].rank))
    skipped = {e.label: f"{e.needs} is not installed" for e in chosen if e.missing}
    chosen = [e for e in chosen if not e.missing]

    say("checking that each engine computes its method", file=sys.stderr)
    verdicts = {e.label: gate.check(e, device, fused=protocol.fused) for e in chosen}
    chosen = [e for e in chosen if verdicts[e.label].passed]

    if tokens is None:
        with _base_fits(shape, tokens):
            tokens = min(WORKLOADS[workload].most_tokens, _tokens(base, chosen, protocol.own_stacks, device))
    sizes = lengths(workload, tokens)
    problem = _problem(base, workload, sizes, protocol.dtype, device)
    contest = Contest(problem, protocol, device)
    with _base_fits(shape, tokens):
        for engine in chosen:
            contest.enter(engine)
        timings = contest.timings()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else CPU
    return Comparison(
        shape, workload, sizes, protocol, where, verdicts, timings, contest.profiles, skipped, contest.misfits
    )


class Contest:
    """Engines on one problem: each is built, its memory is measured, and then they are timed in turns."""

    def __init__(self, problem: Problem, protocol: Protocol, device: torch.device) -> None:
        self.problem, self.protocol, self.device = problem, protocol, device
        self.misfits: dict[Label, str] = {}
        """Reasons by label of the engines that ran out of memory."""
        self.profiles: dict[Label, dict[str, float]] = {}
        self._held = _held(problem.base)
        self._ready: dict[Label, Contender] = {}
        self._peaks: dict[Label, int | None] = {}

    def enter(self, engine: Engine) -> None:
        """Build an engine and measure the memory of a step."""
        say(f"building {title(engine.label)}", file=sys.stderr)
        try:
            self._build(engine)
            return
        except torch.OutOfMemoryError:
            pass  # its traceback holds tensors, so the engine is dropped when the exception is gone
        self._drop(engine.label, "building it")

    def _build(self, engine: Engine) -> None:
        build = partial(_ready, self.problem, engine, self.protocol)
        if self.device.type == "cuda":
            ran, grown = _gpu_peak(build, self.device)
            peak: int | None = self._held + grown
        else:
            own = peak_in_own_process(partial(_twice, build))
            ran, peak = build(), None if own is None else self._held + own
        self._ready[engine.label], self._peaks[engine.label] = ran, peak

    def _drop(self, label: Label, doing: str) -> None:
        """Drop an engine that ran out of memory, and free what it holds."""
        if label == BASE:
            raise torch.OutOfMemoryError("the frozen base alone does not fit")
        say(f"{title(label)} does not fit", file=sys.stderr)
        self.misfits[label] = f"out of memory {doing} with {self.problem.tokens:,} tokens"
        self._ready.pop(label, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def timings(self) -> dict[Label, Timing]:
        """Time the engines. Returns a timing for each engine that fits in memory."""
        protocol = self.protocol
        say(f"timing {protocol.warmup} + {protocol.rounds} rounds", file=sys.stderr)
        times = interleaved(
            self._ready,
            warmup=protocol.warmup,
            rounds=protocol.rounds,
            device=self.device,
            dropped=lambda label: self._drop(label, "in a step"),
        )
        for label in times if protocol.profile else ():
            self.profiles[label] = by_operation(self._ready[label].step, self.device)
            self._ready[label].settle()
        return {
            label: Timing(
                seconds_per_step=statistics.median(took),
                seconds_range=(min(took), max(took)),
                over_base=statistics.median(a / b for a, b in zip(took, times[BASE], strict=True)),
                tokens_per_second=self.problem.tokens / statistics.median(took),
                peak_memory_bytes=self._peaks[label],
            )
            for label, took in times.items()
        }


@contextmanager
def _base_fits(shape: str, tokens: int | None) -> Iterator[None]:
    """Raise ``UserError`` if the frozen base, without which there is no comparison, runs out of memory in the body."""
    try:
        yield
    except torch.OutOfMemoryError:
        less = "a smaller --shape" if tokens is None else f"--tokens {max(64, tokens // 2)}"
        with_tokens = "" if tokens is None else f" with {tokens:,} tokens"
        raise UserError(f"--shape: {shape} does not fit in memory{with_tokens}; try {less}", key="--shape") from None


def _tokens(base: nn.Module, chosen: list[Engine], own_stacks: bool, device: torch.device) -> int:
    if device.type != "cuda":
        return 1_024
    if not isinstance(base, PreTrainedModel):
        return MOST_TOKENS
    free, total = torch.cuda.mem_get_info(device)
    return most_tokens(base, chosen, own_stacks, room=free - int(MARGIN * total))


def date_and_versions(*more: str) -> dict[str, object]:
    """Return the date, and the versions of the packages that a measurement depends on, ``more`` among them."""
    optional = {package: version_of(package) for package in ("peft", "triton", "liger-kernel", *more)}
    return {"date": datetime.now(UTC).date().isoformat(), "versions": {**versions(), **optional}}


def _base(shape: str, dtype: torch.dtype, device: torch.device) -> LinearStack | PreTrainedModel:
    if shape == LINEARS:
        return LinearStack(1024, 32, dtype, device)
    return random_model(architecture(shape), dtype, device)


def _problem(
    base: LinearStack | PreTrainedModel, workload: str, sizes: list[int], dtype: torch.dtype, device: torch.device
) -> Problem:
    padded = workload == "padded"
    if isinstance(base, LinearStack):
        return linears(base, sizes, padded=padded, dtype=dtype, device=device)
    return language_model(base, sizes, flat=not padded, supervised=WORKLOADS[workload].supervised)


def _ready(problem: Problem, engine: Engine, protocol: Protocol) -> Contender:
    ran = contender(engine, problem, own_stack=protocol.own_stacks, fused=protocol.fused)
    give(values_for(engine.method, problem.base), ran.parameters)
    return ran


def _twice(build: Callable[[], Contender]) -> None:
    ran = build()
    for _ in range(2):
        ran.step()
        ran.settle()


def _gpu_peak(build: Callable[[], Contender], device: torch.device) -> tuple[Contender, int]:
    """Return a contender, and the peak of the bytes allocated for it during a step. Memory of other engines is not
    counted, because it is allocated before and during the step alike."""
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


def _names(label: Label) -> dict[str, object]:
    return {"engine": label[0], "method": label[1]}


@dataclass(frozen=True)
class Counters:
    """Counts of the engines on a model of a shape."""

    shape: str
    dropout: float
    counts: dict[Label, Count]
    compiled: dict[Label, CompiledCount]
    """Counts in compiled layers, for the frozen base and our implementation; empty if they were not asked for."""

    def as_json(self) -> dict[str, object]:
        rows = [
            {**_names(label), **vars(counted), **({"compiled": vars(found)} if found else {})}
            for label, counted in self.counts.items()
            for found in [self.compiled.get(label)]
        ]
        return {"rows": rows, "shape": self.shape, "dropout": self.dropout, "device": CPU, **date_and_versions()}


def count_all(shape: str, dropout: float, choice: Choice, *, compiled: bool = False) -> Counters:
    """Count bytes and operations of the chosen engines, and of the base and ours in ``compiled`` layers too.

    Raises:
        UserError: counting does not support the shape.
    """
    if shape == LINEARS:
        raise UserError(f"--counters counts a whole model, not {LINEARS}; try --shape llama-3.1-8b", key="--shape")
    config = architecture(shape)
    chosen = choice.of(engines(config.hidden_size, dropout))
    counts = count(config, dropout, [engine.label for engine in chosen])
    ours = [engine for engine in chosen if compiled and engine.name in ("base", "ours")]
    return Counters(shape, dropout, counts, {engine.label: count_compiled(engine, config) for engine in ours})
