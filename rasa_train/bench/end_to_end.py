"""Our training loop and a peer's, end to end: the same base, rows, batches and optimizer, each in its own process.

The sides take turns, a step each. A step is everything between two optimizer steps: batches, forward and backward
pass, clipping, the optimizer, metrics. The start of a process and the first steps are not counted.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..adapters.sites import find_sites
from ..errors import UserError, say
from .engines import Label, engines
from .run import CPU, date_and_versions
from .shapes import LINEARS, architecture, random_model
from .side import Job
from .workloads import MEAN_LENGTH, drawn_lengths, examples

BATCH = 8
"""Number of sequences of a step, TRL's default."""
LONGEST = 1024
"""Longest sequence; TRL would cut a longer one."""
LOSS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}
"""Largest difference between the losses of a first step, whose values differ by about 2 from token to token."""


@dataclass(frozen=True)
class Side:
    """A training loop with its settings."""

    label: Label
    """Names of the loop and of the method."""
    settings: str
    """Settings in words."""
    trl: dict[str, Any] | None = None
    """Settings of TRL's ``SFTConfig``; None for our own loop."""


@dataclass(frozen=True)
class Settings:
    """How the sides are compared."""

    shape: str
    batch: int
    """Number of sequences of a step."""
    dtype: torch.dtype
    dropout: float
    warmup: int
    rounds: int
    device: torch.device


@dataclass(frozen=True)
class Cost:
    """Cost of a side: medians over the timed steps, and their ranges."""

    settings: str
    cpu_us_per_token: float
    cpu_us_range: tuple[float, float]
    wall_us_per_token: float
    wall_us_range: tuple[float, float]
    over_ours: float | None
    """Median, over the rounds, of the time over that of our LoRA: CPU time on a CPU, wall time on a GPU. None if the
    first losses differ."""
    over_ours_range: tuple[float, float] | None
    first_loss: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class EndToEnd:
    """The outcome of a comparison end to end."""

    settings: Settings
    tokens: list[int]
    """Tokens of each timed step."""
    costs: dict[Label, Cost]
    load: float
    """Mean number of processes that wanted to run, over the last minute, when the timing ended."""

    def as_json(self) -> dict[str, object]:
        settings = self.settings
        return {
            "rows": [{"side": side, "method": method, **asdict(cost)} for (side, method), cost in self.costs.items()],
            "shape": settings.shape,
            "sequences": settings.batch,
            "mean_tokens": statistics.mean(self.tokens),
            "dtype": str(settings.dtype).removeprefix("torch."),
            "dropout": settings.dropout,
            "rounds": settings.rounds,
            "device": CPU if settings.device.type == "cpu" else torch.cuda.get_device_name(settings.device),
            "load": self.load,
            **date_and_versions("trl"),
        }


def sides(device: torch.device) -> list[Side]:
    """Return our loop with LoRA and RaSA, and TRL with its defaults and with faster settings."""
    faster: dict[str, Any] = {"gradient_checkpointing": False}
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        faster["use_liger_kernel"] = True
    free: dict[str, Any] = {"padding_free": True, "max_length": None}
    if device.type == "cuda" and importlib.util.find_spec("flash_attn"):
        free["attn_implementation"] = "flash_attention_2"
    liger = ", Liger" if "use_liger_kernel" in faster else ""
    return [
        Side(("ours", "lora"), "padding-free"),
        Side(("ours", "rasa"), "padding-free"),
        Side(("trl", "lora"), "its defaults: padded, activations recomputed", {}),
        Side(("trl-kept", "lora"), f"padded, activations kept{liger}", faster),
        Side(("trl-flat", "lora"), f"padding-free, activations kept{liger}", faster | free),
    ]


def compare_ends(settings: Settings) -> EndToEnd:
    """Time the sides on the same rows.

    Raises:
        UserError: a package is missing, or there is no such shape.
    """
    if missing := [name for name in ("trl", "peft") if importlib.util.find_spec(name) is None]:
        names = " ".join(missing)
        raise UserError(f"--peers trl needs {names}, which is not installed: pip install {names}", key="--peers")
    if settings.shape == LINEARS:
        raise UserError(f"--peers trains a whole model, not {LINEARS}; try --shape llama-42m", key="--shape")
    every = sides(settings.device)
    with tempfile.TemporaryDirectory(prefix="rasa-bench-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        say("making the base and the rows", file=sys.stderr)
        jobs, tokens = _jobs(settings, every, directory)
        if settings.device.type == "cuda":  # the sides need the memory that the base has taken here
            gc.collect()
            torch.cuda.empty_cache()
        say(f"timing {settings.warmup} + {settings.rounds} steps of each side", file=sys.stderr)
        rows: dict[Label, list[dict[str, Any]]] = {side.label: [] for side in every}
        # Two models and their activations may not fit on one GPU, so there the sides run one after another, twice.
        turns = [[side] for side in [*every, *every]] if settings.device.type == "cuda" else [every]
        for together in turns:
            _train(settings, {side.label: jobs[side.label] for side in together}, rows)
    costs = _costs(settings, every, rows, tokens)
    return EndToEnd(settings, tokens[settings.warmup :], costs, os.getloadavg()[0])


def _jobs(settings: Settings, every: list[Side], directory: Path) -> tuple[dict[Label, Job], list[int]]:
    """Write the base and the rows. Returns the jobs, and the number of tokens of each step."""
    config = architecture(settings.shape)
    base = random_model(config, settings.dtype, settings.device)
    _spread(base)
    base.save_pretrained(directory / "base")
    steps = settings.warmup + settings.rounds
    lengths = [min(length, LONGEST) for length in drawn_lengths(steps * settings.batch)]
    with (directory / "rows.jsonl").open("w") as file:
        for row in examples(lengths, config.vocab_size):
            file.write(json.dumps({"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()}) + "\n")
    methods = {e.label: e.method for e in engines(config.hidden_size, settings.dropout) if e.method is not None}
    linears = sorted({site.kind.rpartition(".")[2] for site in find_sites(base)})
    jobs = {
        side.label: Job(
            base=str(directory / "base"),
            rows=str(directory / "rows.jsonl"),
            directory=str(directory / "-".join(map(str, side.label))),
            device=settings.device.type,
            dtype=str(settings.dtype).removeprefix("torch."),
            batch_size=settings.batch,
            steps=steps + 1,  # the last step of a run writes the adapter
            adapter=methods["ours", side.label[1]].model_dump(mode="json"),
            linears=linears,
            trl=side.trl,
        )
        for side in every
    }
    return jobs, [sum(lengths[at : at + settings.batch]) for at in range(0, len(lengths), settings.batch)]


def _spread(base: PreTrainedModel) -> None:
    """Scale the LM head so that the loss differs from token to token, as in a trained model. With weights as they are
    drawn every token has nearly the same loss, so the mean would hardly show which tokens are supervised."""
    head = base.get_output_embeddings().weight
    with torch.no_grad():
        head.mul_(2 / (head.float().std() * base.config.hidden_size**0.5))


def _train(settings: Settings, jobs: Mapping[Label, Job], rows: dict[Label, list[dict[str, Any]]]) -> None:
    """Let the sides take turns, and append what they report about each step that is timed."""
    with ExitStack() as stack:
        processes = {label: stack.enter_context(_process(label, job)) for label, job in jobs.items()}
        for number in range(settings.warmup + settings.rounds):
            for label, process in processes.items():
                row = _turn(label, process, Path(jobs[label].directory))
                if number >= settings.warmup:
                    rows[label].append(row)


@contextmanager
def _process(label: Label, job: Job) -> Iterator[subprocess.Popen[str]]:
    directory = Path(job.directory)
    directory.mkdir(exist_ok=True)
    (directory / "job.json").write_text(json.dumps(asdict(job)))
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if job.device == "cpu" else {}
    environment = os.environ | hidden | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "rasa_train.bench.side", str(directory / "job.json")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


def _turn(label: Label, process: subprocess.Popen[str], directory: Path) -> dict[str, Any]:
    assert process.stdin and process.stdout
    try:
        process.stdin.write("\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended, and its log says why
    if not (line := process.stdout.readline()):
        raise RuntimeError(f"{label[0]} has failed:\n{(directory / 'log').read_text()[-4000:]}")
    row: dict[str, Any] = json.loads(line)
    return row


def _costs(
    settings: Settings, every: list[Side], rows: Mapping[Label, list[dict[str, Any]]], tokens: list[int]
) -> dict[Label, Cost]:
    timed = tokens[settings.warmup :] * (len(rows["ours", "lora"]) // settings.rounds)
    own = "cpu_seconds" if settings.device.type == "cpu" else "wall_seconds"
    ours = rows["ours", "lora"]
    costs: dict[Label, Cost] = {}
    for side in every:
        of_side = rows[side.label]
        cpu, wall = (
            [1e6 * row[key] / count for row, count in zip(of_side, timed, strict=True)]
            for key in ("cpu_seconds", "wall_seconds")
        )
        ratios = [row[own] / base[own] for row, base in zip(of_side, ours, strict=True)]
        loss = float(of_side[-1]["loss"])
        same = abs(loss - ours[-1]["loss"]) <= LOSS_TOLERANCE[settings.dtype]
        costs[side.label] = Cost(
            settings=side.settings,
            cpu_us_per_token=statistics.median(cpu),
            cpu_us_range=(min(cpu), max(cpu)),
            wall_us_per_token=statistics.median(wall),
            wall_us_range=(min(wall), max(wall)),
            over_ours=statistics.median(ratios) if same else None,
            over_ours_range=(min(ratios), max(ratios)) if same else None,
            first_loss=loss,
            peak_memory_bytes=max(row["peak_memory_bytes"] for row in of_side),
        )
    return costs


def sequences(tokens: int | None) -> int:
    """Return the number of sequences of a step that has about this many tokens."""
    return BATCH if tokens is None else max(1, round(tokens / MEAN_LENGTH))
