"""Measure engines side by side: check each one's correctness, then measure memory and time."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..process import version_of, versions
from ..training.memory_search import MARGIN
from . import gate
from .counters import count
from .engines import BASE, Choice, Contender, Engine, Label, contender, engines, give, values_for
from .room import MOST_TOKENS, most_tokens
from .shapes import LINEARS, LinearStack, architecture, random_model
from .timing import by_operation, interleaved, peak_in_own_process
from .workloads import Problem, describe, language_model, lengths, linears


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


def compare(shape: str, workload: str, tokens: int | None, protocol: Protocol, device: torch.device) -> dict[str, Any]:
    """Time engines on the same tokens. Returns the object that ``rasa-bench --json`` prints.

    An engine that runs out of memory is listed in ``does_not_fit``, and the others continue.

    Args:
        shape: ``linears-1024``, a name in ``SHAPES``, or a path.
        tokens: tokens of a step for the workloads ``packed`` and ``long``. None: 1,024 on a CPU; on a GPU as many as
            fit in memory for every engine, up to ``MOST_TOKENS``.
    Raises:
        UserError: there is no such shape, or the frozen base alone does not fit in memory.
    """
    with _base_fits(shape, tokens):
        base = _base(shape, protocol.dtype, device)
    width = base.width if isinstance(base, LinearStack) else base.config.hidden_size
    chosen = protocol.choice.of(engines(width, protocol.dropout))
    skipped = [{**_names(e), "why": f"{e.needs} is not installed"} for e in chosen if e.missing]
    chosen = [e for e in chosen if not e.missing]

    print("checking that each engine computes its method", file=sys.stderr)
    verdicts = {e.label: gate.check(e, device) for e in chosen}
    failed = [{**_names(e), **vars(verdicts[e.label])} for e in chosen if not verdicts[e.label].passed]
    chosen = [e for e in chosen if verdicts[e.label].passed]

    if tokens is None:
        with _base_fits(shape, tokens):
            tokens = _tokens(base, chosen, protocol.own_stacks, device)
    sizes = lengths(workload, tokens)
    problem = _problem(base, sizes, padded=workload == "padded", dtype=protocol.dtype, device=device)
    contest = Contest(problem, protocol, device)
    with _base_fits(shape, tokens):
        for engine in chosen:
            contest.enter(engine)
        rows = [{**row, **_errors(verdicts[label])} for label, row in contest.rows().items()]
    return {
        "rows": rows,
        "failed": failed,
        "skipped": skipped,
        "does_not_fit": [{**_names_of(label), "why": why} for label, why in contest.misfits.items()],
        "shape": shape,
        "workload": {"name": workload, **describe(sizes)},
        "dtype": str(protocol.dtype).removeprefix("torch."),
        "dropout": protocol.dropout,
        "own_stacks": protocol.own_stacks,
        "rounds": protocol.rounds,
        **machine(device),
    }


class Contest:
    """Engines on one problem: each is built, its memory is measured, and then they are timed in turns."""

    def __init__(self, problem: Problem, protocol: Protocol, device: torch.device) -> None:
        self.problem, self.protocol, self.device = problem, protocol, device
        self.misfits: dict[Label, str] = {}
        """Reasons by label of the engines that ran out of memory."""
        self._held = _held(problem.base)
        self._ready: dict[Label, Contender] = {}
        self._peaks: dict[Label, int | None] = {}

    def enter(self, engine: Engine) -> None:
        """Build an engine and measure the memory of a step."""
        print(f"building {_title(engine)}", file=sys.stderr)
        try:
            self._build(engine)
            return
        except torch.OutOfMemoryError:
            pass  # its traceback holds tensors, so the engine is dropped when the exception is gone
        self._drop(engine.label, "building it")

    def _build(self, engine: Engine) -> None:
        build = partial(_ready, self.problem, engine, self.protocol.own_stacks)
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
        print(f"{' '.join(filter(None, label))} does not fit", file=sys.stderr)
        self.misfits[label] = f"out of memory {doing} with {self.problem.tokens:,} tokens"
        self._ready.pop(label, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def rows(self) -> dict[Label, dict[str, Any]]:
        """Time the engines. Returns a row of results for each engine that fits in memory."""
        protocol = self.protocol
        print(f"timing {protocol.warmup} + {protocol.rounds} rounds", file=sys.stderr)
        times = interleaved(
            self._ready,
            warmup=protocol.warmup,
            rounds=protocol.rounds,
            device=self.device,
            dropped=lambda label: self._drop(label, "in a step"),
        )
        return {
            label: {
                **_names_of(label),
                "seconds_per_step": statistics.median(took),
                "seconds_range": [min(took), max(took)],
                "over_base": statistics.median(a / b for a, b in zip(took, times[BASE], strict=True)),
                "tokens_per_second": self.problem.tokens / statistics.median(took),
                "peak_memory_bytes": self._peaks[label],
                **(self._profile(label) if protocol.profile else {}),
            }
            for label, took in times.items()
        }

    def _profile(self, label: Label) -> dict[str, dict[str, float]]:
        took = by_operation(self._ready[label].step, self.device)
        self._ready[label].settle()
        return {"seconds_by_operation": took}


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


def machine(device: torch.device) -> dict[str, Any]:
    """Return device, date and versions of packages."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, one thread"
    optional = {package: version_of(package) for package in ("peft", "triton", "liger-kernel")}
    date = datetime.now(UTC).date().isoformat()
    return {"device": name, "date": date, "versions": {**versions(), **optional}}


def _base(shape: str, dtype: torch.dtype, device: torch.device) -> LinearStack | PreTrainedModel:
    if shape == LINEARS:
        return LinearStack(1024, 32, dtype, device)
    return random_model(architecture(shape), dtype, device)


def _problem(
    base: LinearStack | PreTrainedModel, sizes: list[int], *, padded: bool, dtype: torch.dtype, device: torch.device
) -> Problem:
    if isinstance(base, LinearStack):
        return linears(base, sizes, padded=padded, dtype=dtype, device=device)
    return language_model(base, sizes, flat=not padded)


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


def _names(engine: Engine) -> dict[str, str | None]:
    return _names_of(engine.label)


def _names_of(label: Label) -> dict[str, str | None]:
    return {"engine": label[0], "method": label[1]}


def _errors(verdict: gate.Verdict) -> dict[str, float]:
    return {name: getattr(verdict, name) for name in ("loss_error", "gradient_error", "gradient_cosine")}


def _title(engine: Engine) -> str:
    return " ".join(filter(None, engine.label))


def count_all(shape: str, dropout: float, choice: Choice) -> dict[str, Any]:
    """Count bytes and operations of the chosen engines. Returns what ``rasa-bench --counters --json`` prints.

    Raises:
        UserError: counting does not support the shape.
    """
    if shape == LINEARS:
        raise UserError(f"--counters counts a whole model, not {LINEARS}; try --shape llama-3.1-8b", key="--shape")
    config = architecture(shape)
    labels = [engine.label for engine in choice.of(engines(config.hidden_size, dropout))]
    counted = count(config, dropout, labels)
    rows = [{**_names_of(label), **vars(c)} for label, c in counted.items()]
    return {"rows": rows, "shape": shape, "dropout": dropout, **machine(torch.device("cpu"))}
