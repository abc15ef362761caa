"""Adapters against full fine-tuning of the same model on the same tokens: the bytes that each needs, and the time of a
step with its optimizer (the LoRA paper's claims: two thirds less memory, a quarter less time).

Full fine-tuning is that of this package: trained weights are held in fp32, whatever the model's dtype, and so are
their gradients and AdamW's two states.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..adapters.contract import Method
from ..adapters.inject import adapt
from ..adapters.shared_input import packed
from ..adapters.state import groups, trainable
from ..errors import UserError, say
from ..methods.full import Full
from ..optim.optimizers import AdamW, make_optimizer
from .counters import Saved, saved_per_token_and_layer
from .engines import Choice, Engine, engines, place_ours
from .run import CPU, date_and_versions
from .shapes import LINEARS, architecture, random_model
from .timing import interleaved, peak_in_own_process
from .workloads import WORKLOADS, describe, language_model, lengths

STATES = 8
"""Bytes of AdamW's states for each trained value: two fp32 numbers."""
METHODS = ("lora", "rasa")
"""Methods that are compared with full fine-tuning, unless the command names others."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a step needs, by what they are for."""

    trained: int
    """Number of trained values."""
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """Bytes kept for the backward pass of all tokens at once."""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Time:
    """Cost of a step with clipping and the optimizer: CPU time on a CPU, time of the device on a GPU."""

    us_per_token: float
    us_range: tuple[float, float]
    over_full: float
    """Median, over the rounds, of the time over that of full fine-tuning."""
    over_full_range: tuple[float, float]
    peak_memory_bytes: int | None
    """Bytes by which the process grows, with all that is not counted in ``Memory``; None where it is not known."""


@dataclass(frozen=True)
class Settings:
    """How full fine-tuning and the adapters are compared."""

    shape: str
    tokens: int
    """Number of tokens of a step."""
    dtype: torch.dtype
    dropout: float
    choice: Choice
    warmup: int
    rounds: int
    device: torch.device

    @property
    def sizes(self) -> list[int]:
        return lengths("packed", self.tokens)

    def methods(self, width: int) -> dict[str, Method]:
        """Return full fine-tuning and the chosen methods, by name."""
        chosen = self.choice.methods or METHODS
        ours = {e.method.method: e.method for e in engines(width, self.dropout) if e.name == "ours" and e.method}
        return {"full": Full(), **{name: method for name, method in ours.items() if name in chosen}}


@dataclass(frozen=True)
class AgainstFull:
    """The outcome, by method; full fine-tuning comes first."""

    settings: Settings
    memory: dict[str, Memory]
    times: dict[str, Time]
    """Empty if memory alone was counted."""
    load: float
    """Mean number of processes that wanted to run, over the last minute, when the timing ended."""

    def as_json(self) -> dict[str, object]:
        settings, full = self.settings, self.memory["full"].total
        on_cpu = not self.times or settings.device.type == "cpu"
        return {
            "rows": [
                {"method": name, **asdict(memory), "total": memory.total, "total_over_full": memory.total / full}
                | (asdict(self.times[name]) if self.times else {})
                for name, memory in self.memory.items()
            ],
            "shape": settings.shape,
            "workload": {"name": "packed", **describe(settings.sizes)},
            "dtype": str(settings.dtype).removeprefix("torch."),
            "dropout": settings.dropout,
            "rounds": settings.rounds if self.times else 0,
            "device": CPU if on_cpu else torch.cuda.get_device_name(settings.device),
            "load": self.load,
            **date_and_versions(),
        }


class Training:
    """A model that is trained with one method, from random weights."""

    def __init__(self, settings: Settings, method: Method) -> None:
        model = random_model(architecture(settings.shape), settings.dtype, settings.device, to_embedding=False).train()
        problem = language_model(model, settings.sizes, flat=True, supervised=WORKLOADS["packed"].supervised)
        self.model, _ = adapt(model, method)
        self._loss, self._groups = problem.loss(self.model), groups(self.model)
        self._parameters = list(trainable(self.model).values())
        self._optimizer = make_optimizer(AdamW(lr=1e-5), self._parameters)
        mixed = isinstance(method, Full) and settings.dtype != torch.float32
        self._autocast = torch.autocast(settings.device.type, settings.dtype, enabled=mixed, cache_enabled=False)

    def step(self) -> None:
        """Run a step of one micro-batch: forward and backward pass, clipping, the optimizer."""
        with packed(self._groups):
            self._forward().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def settle(self) -> None:
        """Do nothing: the step has changed the parameters itself."""

    def memory(self) -> Memory:
        """Count the bytes of a step. The optimizer has made its states in an earlier one."""
        with packed(self._groups), Saved(self.model) as saved:
            loss = self._forward()
        del loss
        held = _held([*self.model.parameters(), *self.model.buffers()])
        states = _held(t for state in self._optimizer.state.values() for t in state.values())
        trained = sum(p.numel() for p in self._parameters)
        return Memory(trained, held, sum(p.nbytes for p in self._parameters), states, saved.bytes)

    def _forward(self) -> Tensor:
        with self._autocast:
            return self._loss()


def compare_with_full(settings: Settings) -> AgainstFull:
    """Count the bytes of each method and time its steps, in turns.

    Raises:
        UserError: there is no such shape, or it is no whole model.
    """
    methods = settings.methods(_config(settings).hidden_size)
    # On a GPU the models may not fit beside one another, so there the methods run one after the other.
    together = [[name] for name in methods] if settings.device.type == "cuda" else [[*methods]]
    memory: dict[str, Memory] = {}
    took: dict[str, list[float]] = {}
    peaks: dict[str, int | None] = {}
    for names in together:
        ready: dict[str, Training] = {}
        for name in names:
            say(f"building {name}", file=sys.stderr)
            peaks[name], ready[name] = _peak_and_training(settings, methods[name])
            memory[name] = ready[name].memory()
        say(f"timing {settings.warmup} + {settings.rounds} steps of {', '.join(names)}", file=sys.stderr)
        took |= interleaved(
            ready, warmup=settings.warmup, rounds=settings.rounds, device=settings.device, dropped=_does_not_fit
        )
        ready.clear()
    return AgainstFull(settings, memory, _times(settings, took, peaks), os.getloadavg()[0])


def count_against_full(settings: Settings) -> AgainstFull:
    """Compute the bytes of each method for a model of any size, which is never in memory as a whole: parameters,
    gradients and states from the shapes, and activations from one layer (``counters``), without embedding and loss.

    Raises:
        UserError: counting does not support the shape.
    """
    config = _config(settings)
    memory = {}
    for name, method in settings.methods(config.hidden_size).items():
        model, _ = adapt(random_model(config, torch.bfloat16, torch.device("meta")), method)
        trained = list(trainable(model).values())
        number = sum(p.numel() for p in trained)
        engine = Engine("ours", method, place_ours, autocast=name == "full")
        kept = saved_per_token_and_layer(engine, config) * config.num_hidden_layers * settings.tokens
        held = sum(p.nbytes for p in model.parameters())
        memory[name] = Memory(number, held, sum(p.nbytes for p in trained), STATES * number, round(kept))
    return AgainstFull(settings, memory, {}, os.getloadavg()[0])


def _config(settings: Settings) -> PretrainedConfig:
    if settings.shape == LINEARS:
        raise UserError(f"--against-full trains a whole model, not {LINEARS}; try --shape llama-42m", key="--shape")
    return architecture(settings.shape)


def _peak_and_training(settings: Settings, method: Method) -> tuple[int | None, Training]:
    """Return the peak of the bytes that training takes, and the training after its first step."""
    if settings.device.type != "cuda":
        peak = peak_in_own_process(partial(_two_steps, settings, method))
        return peak, _one_step(settings, method)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(settings.device)
    before = torch.cuda.memory_allocated(settings.device)
    training = _two_steps(settings, method)
    return torch.cuda.max_memory_allocated(settings.device) - before, training


def _one_step(settings: Settings, method: Method) -> Training:
    training = Training(settings, method)
    training.step()
    return training


def _two_steps(settings: Settings, method: Method) -> Training:
    training = _one_step(settings, method)
    training.step()
    return training


def _does_not_fit(name: str) -> None:
    raise UserError(f"{name} does not fit in memory: give a smaller --shape or fewer --tokens", key="--shape")


def _times(settings: Settings, took: Mapping[str, list[float]], peaks: Mapping[str, int | None]) -> dict[str, Time]:
    tokens = sum(settings.sizes)
    times = {}
    for name, seconds in took.items():
        each = [1e6 * second / tokens for second in seconds]
        ratios = [one / full for one, full in zip(seconds, took["full"], strict=True)]
        times[name] = Time(
            us_per_token=statistics.median(each),
            us_range=(min(each), max(each)),
            over_full=statistics.median(ratios),
            over_full_range=(min(ratios), max(ratios)),
            peak_memory_bytes=peaks[name],
        )
    return times


def _held(tensors: Iterator[Tensor] | list[Tensor]) -> int:
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())
