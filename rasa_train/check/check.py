"""``rasa-train check``: what a recipe would do, printed for a person or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from .. import process
from ..adapters.sites import not_adapted
from ..data import served_counts
from ..data.hub_source import SourceMissing
from ..data.prepare import PreparedData, known_head, prepare
from ..errors import UserError, shown
from ..merging import merged
from ..models.load import check_base, has_weights, load_tokenizer
from ..models.suitable import check_length, check_vocabulary, end_notes, quantization_of
from ..recipe.schema import Recipe
from ..training.reporter import clock
from . import trial_run
from .estimate import USABLE, Estimate, plan
from .examples import Shown, shown_example
from .examples_text import text_of
from .labels import Labels

Topic = Literal["recipe", "data", "model", "memory", "disk", "time"]


class Problem(NamedTuple):
    """A reason why the run cannot be made here: the line of its topic is marked, and the command exits with 2."""

    topic: Topic
    message: str


class Room(NamedTuple):
    """The memory that a run needs, and the memory that there is."""

    needed: int
    most: int
    """Bytes that are used where there is room for them; ``needed`` is enough."""
    available: int
    where: str

    @property
    def suffices(self) -> bool:
        return self.needed <= USABLE * self.available

    @property
    def words(self) -> str:
        needed = _size(self.needed) + (f" to {_size(self.most)}" if self.most > self.needed else "")
        return f"{needed} of {_size(self.available)} ({self.where})"


@dataclass
class CheckResult:
    """Everything that is known without training."""

    estimate: Estimate
    disk_bytes_free: int
    devices: list[trial_run.Device]
    room: Room
    seconds_estimate: float | None
    problems: list[Problem]
    notes: list[str]
    """What the user should know about the base and the data."""
    data_words: str
    """A few words about the data."""
    samples: list[Shown]
    """The first examples."""
    labels: Labels | None = None
    """The labels of the texts, for a classification."""
    served: dict[str, int] = field(default_factory=dict)
    """Counts of conversations whose prompts were compared with a server's, by the names of ``served_counts.NAMES``."""

    @property
    def ready(self) -> bool:
        return not self.problems

    def as_json(self) -> dict[str, object]:
        return {
            **asdict(self.estimate),
            **(self.labels.as_json() if self.labels else {}),
            "disk_bytes_free": self.disk_bytes_free,
            "devices": [device._asdict() for device in self.devices],
            "versions": process.versions(),
            "seconds_estimate": self.seconds_estimate,
            "problems": [problem.message for problem in self.problems],
            "ready": self.ready,
            "topics": [{"topic": topic, "ok": fine, "facts": words} for topic, fine, words in _topics(self)],
            "notes": self.notes,
            "served": self.served,
        }

    def show(self) -> None:
        console = Console(highlight=False)
        whole = not console.is_terminal  # lines for other programs are neither cut nor padded
        rows = [*_lines(self.estimate), *(self.labels.lines() if self.labels else [])]
        if whole:
            width = max(len(name) for name, _ in rows)
            lines = (shown(f"{name:<{width}} {value}") for name, value in rows)
            console.print(*lines, sep="\n", markup=False, soft_wrap=True)
        else:
            table = Table(show_header=False, box=None, pad_edge=False)
            for row in rows:
                table.add_row(*(escape(shown(cell)) for cell in row))
            console.print(table)
        for i, example in enumerate(self.samples):
            marks = "" if self.labels else " (what is trained on is marked »like this«)"
            console.print(f"\nsample {i + 1}{marks}", style="bold")
            console.print(text_of(example, whole=True), soft_wrap=whole)
        console.print()
        for topic, fine, words in _topics(self):
            line = f"{'ok ' if fine else '-- '} {topic}: {words}"
            console.print(shown(line), style="green" if fine else "red", markup=False, soft_wrap=whole)
        if verified := served_counts.line(self.served):
            console.print(f"ok  served: {verified}", style="green", markup=False, soft_wrap=whole)
        for note in self.notes:
            console.print(shown(f"note: {note}"), markup=False, soft_wrap=whole)
        for problem in self.problems:
            console.print(shown(f"not ready: {problem.message}"), style="red", markup=False, soft_wrap=whole)
        if self.ready:
            console.print("ready to train", style="green")


def check(recipe: Recipe, workers: int = 1, nodes: int = 1) -> CheckResult:
    """Return everything that can be known without training, for this number of workers on all ``nodes`` together.

    Raises:
        UserError: something is wrong. A data set or weights that are only absent are reported, not raised.
    """
    problems: list[Problem] = []
    data: PreparedData | None = None
    tokenizer: Tokenizer | None = None
    words, notes = "not here", list[str]()
    devices = trial_run.devices()
    here = has_weights(recipe.model)
    on_cpu = here and devices[0].name == "cpu" and recipe.distributed.gpu_memory_gib is None
    base = _open_base(recipe, notes) if here else None
    if not here:
        missing = f"model.name: {recipe.model.name} has no weights (*.safetensors), only a config.json"
        problems.append(Problem("model", missing))
    estimate = plan(recipe, None, workers, on_cpu=on_cpu)  # a wrong adapter is reported before the data is read
    try:
        tokenizer = load_tokenizer(recipe.model)
        data = prepare(recipe.data, tokenizer, task=recipe.task)
    except SourceMissing as error:
        problems.append(Problem("data", str(error)))
    except UserError as error:
        if tokenizer is not None or here:
            raise
        problems.append(Problem("data", str(error)))
        words = "not tokenised, since there is no tokenizer"
    if data:
        if base is not None:
            check_vocabulary(base, recipe.model.name, data.largest_id)
            if data.head:
                check_length(base, recipe.model.name, data.longest)
        estimate = plan(recipe, data, workers, on_cpu=on_cpu)
        words = f"median {np.median(data.train.lengths):,.0f}, longest {data.train.lengths.max():,} tokens"
        notes += data.notes
        if base is not None and tokenizer is not None:
            notes += end_notes(base, tokenizer, data.stats.turn_ends)
    free, seconds = trial_run.disk_free(Path(recipe.output_dir)), None
    room = _room(recipe, estimate, devices, max(1, workers // nodes))
    problems += _shortages(estimate, free, room)
    if data and estimate.optimizer_steps and not problems and workers == 1:
        trial = trial_run.trial(recipe, data, estimate.total_parameters, estimate.optimizer_steps)
        seconds = trial.seconds if trial else None
        if trial and not trial.finite:
            problems.append(Problem("model", NOT_FINITE))
    samples = [shown_example(data, tokenizer, i) for i in range(min(2, len(data.train)))] if data and tokenizer else []
    labels = Labels.of(data) if data and data.head else None
    served = data.stats.served if data else {}
    return CheckResult(estimate, free, devices, room, seconds, problems, notes, words, samples, labels, served)


def _open_base(recipe: Recipe, notes: list[str]) -> PreTrainedModel:
    """Open the base as training will, and its files as a merge will, whose faults would show after the run. Returns the
    model on the meta device, and adds to ``notes`` what is to be known before the run although it can be made.

    Raises:
        UserError: the base cannot be trained, or cannot be merged into.
    """
    head = known_head(recipe.data, recipe.task)
    base = check_base(recipe.model, head)
    quantized = quantization_of(base.config)
    if (directory := Path(recipe.model.name)).is_dir() and not quantized:
        merged.check_base(directory, head)
    left_out = not_adapted(base) if recipe.adapter.targets == "all-linear" else None
    notes += [left_out] if left_out else []
    if why := recipe.adapter.unmerged:
        notes.append(f"the adapter cannot be merged ({why}); rasa-eval evaluates it inside the base")
    if quantized:
        notes.append("the base is quantised: to merge, give the original base with rasa-merge --base")
    return base


NOT_FINITE = (
    "model: no step of a short trial had a finite loss and gradient; look for weights that are not finite, a "
    "model.dtype that the model was not made for, and a training.optimizer.lr that is too high"
)


def _room(recipe: Recipe, estimate: Estimate, devices: list[trial_run.Device], local: int) -> Room:
    """Return the memory that is needed and that there is: on the GPU that the recipe names, or else on the smallest GPU
    here, or else on this machine, whose memory its ``local`` workers share."""
    least, total = estimate.memory_bytes_least, estimate.memory_bytes["total"]
    if (named := recipe.distributed.gpu_memory_gib) is not None:
        return Room(least, total, int(named * 2**30), "the GPU of distributed.gpu_memory_gib")
    device = min(devices, key=lambda device: device.memory_bytes)
    if device.name != "cpu":
        return Room(least, total, device.memory_bytes, f"{device.name} x {len(devices)}")
    return Room(local * least, local * total, device.memory_bytes, "cpu" + (f", {local} workers" if local > 1 else ""))


def _shortages(estimate: Estimate, free: int, room: Room) -> list[Problem]:
    """Return what there is too little of."""
    found, needed = [], estimate.disk_bytes_needed
    if needed is not None and needed > free:
        message = (
            f"output_dir: checkpoints need {_size(needed)}, but the disk has {_size(free)} free; make room, or set "
            "training.keep_last"
        )
        found.append(Problem("disk", message))
    if not room.suffices:
        message = (
            f"memory: the run needs {room.words}, of which {USABLE:.0%} can be used; try "
            "training.activation_checkpointing: true, training.micro_batch_size: 1, or another distributed.strategy; "
            "set distributed.gpu_memory_gib if a GPU elsewhere is to train it"
        )
        found.append(Problem("memory", message))
    return found


def _topics(result: CheckResult) -> list[tuple[Topic, bool, str]]:
    """Return (topic, whether it has no problem, a few words about it) for each topic."""
    facts, seconds = result.estimate, result.seconds_estimate
    steps, needed = facts.optimizer_steps, facts.disk_bytes_needed
    words: dict[Topic, str] = {
        "recipe": f"{facts.method}, {'?' if steps is None else f'{steps:,}'} steps",
        "data": result.data_words,
        "model": f"{sum(facts.sites.values())} linears adapted, {facts.trainable_parameters:,} parameters trained",
        "memory": result.room.words,
        "disk": f"{'?' if needed is None else _size(needed)} of {_size(result.disk_bytes_free)} free",
        "time": "not tried" if seconds is None else f"about {clock(seconds)} on this machine",
    }
    wrong = {problem.topic for problem in result.problems}
    return [(topic, topic not in wrong, said) for topic, said in words.items()]


def _size(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:,.1f} MiB"


def _datasets(facts: Estimate) -> Sequence[tuple[str, str]]:
    """Return a line on each set, if there are several."""
    examples, tokens = facts.examples_by_dataset or {}, facts.tokens_by_dataset or {}
    if len(examples) < 2:
        return []
    width, all_of_them = max(map(len, examples)), sum(examples.values())
    return [
        ("", f"{name:<{width}} {number:>12,} {number / all_of_them:>7.1%} {tokens[name]:>14,} tokens")
        for name, number in examples.items()
    ]


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
        *_datasets(facts),
        ("dropped", number(facts.dropped_examples)),
        ("truncated", number(facts.truncated_examples)),
        *([] if facts.contaminated_rows is None else [("contaminated", f"{facts.contaminated_rows:,} rows")]),
        *([] if facts.duplicates is None else [("duplicates", number(facts.duplicates))]),
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
