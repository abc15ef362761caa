"""``rasa-train check``: what a recipe would do, printed for a person or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase as Tokenizer

from .. import process
from ..data.prepare import PreparedData, prepare
from ..data.sources import SourceMissing
from ..errors import UserError
from ..merging.merged import check_base, is_quantised
from ..methods.from_peft import Peft
from ..models.load import has_weights, load_tokenizer
from ..recipe.schema import Recipe
from ..training.reporter import clock
from . import trial_run
from .estimate import USABLE, Estimate, plan

UNMERGED = (
    "this method adds to the prompt, not to weights: it cannot be merged, and rasa-eval cannot evaluate it; "
    "rasa-merge --format peft writes it for PEFT"
)


@dataclass
class CheckResult:
    """Everything that is known without training."""

    estimate: Estimate
    disk_bytes_free: int
    devices: list[trial_run.Device]
    seconds_estimate: float | None
    problems: list[str]
    shortages: list[str]
    """The ``problems`` other than missing data or weights, which another machine may have."""
    samples: list[list[tuple[str, bool]]]
    """Decoded examples as (text, supervised) pieces."""
    notes: list[str] = field(default_factory=list)
    """What is to be known before the run although it can be made."""

    def as_json(self) -> dict[str, object]:
        return {
            **asdict(self.estimate),
            "disk_bytes_free": self.disk_bytes_free,
            "devices": [device._asdict() for device in self.devices],
            "versions": process.versions(),
            "seconds_estimate": self.seconds_estimate,
            "problems": self.problems,
            "notes": self.notes,
        }

    def show(self) -> None:
        console = Console(highlight=False)
        whole = not console.is_terminal  # lines for other programs are neither cut nor padded
        rows = _lines(self.estimate)
        if whole:
            width = max(len(name) for name, _ in rows)
            console.print(*(f"{name:<{width}} {value}" for name, value in rows), sep="\n", markup=False, soft_wrap=True)
        else:
            table = Table(show_header=False, box=None, pad_edge=False)
            for row in rows:
                table.add_row(*row)
            console.print(table)
        for i, pieces in enumerate(self.samples):
            console.print(f"\nsample {i + 1} (what is trained on is marked »like this«)", style="bold")
            marked = "".join(f"»{text}«" if supervised else text for text, supervised in pieces)
            console.print(marked, markup=False, soft_wrap=whole)
        console.print()
        for topic, fine, words in _topics(self):
            line = f"{'ok ' if fine else '-- '} {topic}: {words}"
            console.print(line, style="green" if fine else "red", markup=False, soft_wrap=whole)
        for problem in self.problems:
            console.print(f"not ready: {problem}", style="red", markup=False, soft_wrap=whole)
        for note in self.notes:
            console.print(f"note: {note}", style="yellow", markup=False, soft_wrap=whole)
        if not self.problems:
            console.print("ready to train", style="green")


def check(recipe: Recipe, workers: int = 1) -> CheckResult:
    """Return everything that can be known without training, for this number of workers.

    Raises:
        UserError: something is wrong. A data set or weights that are only absent are reported, not raised.
    """
    problems: list[str] = []
    data: PreparedData | None = None
    tokenizer: Tokenizer | None = None
    if not has_weights(recipe.model):
        problems.append(f"model.name: {recipe.model.name} has no weights (*.safetensors), only a config.json")
    elif (directory := Path(recipe.model.name)).is_dir() and not is_quantised(directory):
        check_base(directory)  # a merge would find the same fault after the run
    estimate = plan(recipe, None, workers)  # a wrong adapter is reported before the data is read
    try:
        tokenizer = load_tokenizer(recipe.model)
        data = prepare(recipe.data, tokenizer)
    except SourceMissing as error:
        problems.append(str(error))
    except UserError as error:
        if tokenizer is not None or has_weights(recipe.model):
            raise
        problems.append(str(error))
    if data:
        estimate = plan(recipe, data, workers)
    free, devices, seconds = trial_run.disk_free(Path(recipe.output_dir)), trial_run.devices(), None
    problems += (shortages := _shortages(estimate, free, devices))
    if data and estimate.optimizer_steps and not problems and workers == 1:
        seconds = trial_run.seconds(recipe, data, estimate.total_parameters, estimate.optimizer_steps)
    samples = [_pieces(data, tokenizer, i) for i in range(min(2, len(data.train)))] if data and tokenizer else []
    notes = [UNMERGED] if isinstance(recipe.adapter, Peft) and recipe.adapter.is_prompt else []
    return CheckResult(estimate, free, devices, seconds, problems, shortages, samples, notes)


def _shortages(estimate: Estimate, free: int, devices: list[trial_run.Device]) -> list[str]:
    """Return what this machine has too little of. Memory counts only on a GPU: without one, another machine trains."""
    found, needed, total = [], estimate.disk_bytes_needed, estimate.memory_bytes["total"]
    if needed is not None and needed > free:
        found.append(
            f"output_dir: checkpoints need {_size(needed)}, but the disk has {_size(free)} free; make room, or set "
            "training.keep_last"
        )
    least = min(devices, key=lambda device: device.memory_bytes)
    if least.name != "cpu" and total > USABLE * least.memory_bytes:
        found.append(
            f"memory: each worker needs {_size(total)}, but {least.name} has {_size(least.memory_bytes)}; try "
            "training.activation_checkpointing: auto, or another distributed.strategy"
        )
    return found


def _topics(result: CheckResult) -> list[tuple[str, bool, str]]:
    """Return (topic, whether it is fine, a few words about it) for each topic."""
    facts, problems, seconds, device = result.estimate, result.problems, result.seconds_estimate, result.devices[0]
    steps, median, needed = facts.optimizer_steps, facts.median_example, facts.disk_bytes_needed
    data = "not here" if median is None else f"median {median:,.0f}, longest {facts.longest_example:,} tokens"
    total = _size(facts.memory_bytes["total"])
    model = f"{sum(facts.sites.values())} linears adapted, {facts.trainable_parameters:,} parameters trained"
    return [
        ("recipe", True, f"{facts.method}, {'?' if steps is None else f'{steps:,}'} steps"),
        ("data", median is not None, data),
        ("model", not any(p.startswith("model.") for p in problems), model),
        (
            "memory",
            not any(p.startswith("memory:") for p in problems),
            f"{total} of {_size(device.memory_bytes)} ({device.name} x {len(result.devices)})",
        ),
        (
            "disk",
            not any(p.startswith("output_dir:") for p in problems),
            f"{'?' if needed is None else _size(needed)} of {_size(result.disk_bytes_free)} free",
        ),
        ("time", True, "not tried" if seconds is None else f"about {clock(seconds)} on this machine"),
    ]


def _size(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:,.1f} MiB"


def _pieces(data: PreparedData, tokenizer: Tokenizer, index: int) -> list[tuple[str, bool]]:
    example = data.train[index]
    supervised = example.labels != -100
    pieces: list[tuple[str, bool]] = []
    start = 0
    for end in range(1, len(supervised) + 1):
        if end == len(supervised) or supervised[end] != supervised[start]:
            pieces.append((tokenizer.decode(example.input_ids[start:end].tolist()), bool(supervised[start])))
            start = end
    return pieces


def _lines(facts: Estimate) -> Sequence[tuple[str, str]]:
    kinds = [f"{kind} x {n} (rank {facts.effective_rank[kind]})" for kind, n in facts.sites.items()]
    share = f"{facts.trainable_share:.3%} of {facts.total_parameters:,}"
    unknown = "unknown without the data"

    def number(value: int | None) -> str:
        return unknown if value is None else f"{value:,}"

    size, tokens = facts.micro_batch_size, facts.micro_batch_tokens
    at_once = f"at most {size} sequences of {facts.longest:,} tokens" if size else f"{tokens:,} tokens at a time"
    return [
        ("method", facts.method),
        ("trained", f"{facts.trainable_parameters:,} parameters ({share})"),
        *[("adapted" if i == 0 else "", kind) for i, kind in enumerate(kinds)],
        ("examples", number(facts.examples)),
        ("dropped", number(facts.dropped_examples)),
        ("truncated", number(facts.truncated_examples)),
        ("tokens", number(facts.tokens)),
        ("supervised", number(facts.supervised_tokens)),
        ("steps", number(facts.optimizer_steps)),
        ("workers", f"{facts.workers} ({facts.strategy})"),
        *[
            ("memory" if i == 0 else "", f"{part.replace('_', ' '):<20}{_size(size):>12}")
            for i, (part, size) in enumerate(facts.memory_bytes.items())
        ],
        ("", f"each worker, {at_once}"),
        *[
            ("strategies" if i == 0 else "", f"{strategy:<20}{_size(size):>12}")
            for i, (strategy, size) in enumerate(facts.memory_bytes_by_strategy.items())
        ],
        *[("advice" if i == 0 else "", line) for i, line in enumerate(facts.advice)],
        ("versions", ", ".join(f"{name} {version}" for name, version in process.versions().items())),
    ]
