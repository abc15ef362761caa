"""The model that is measured: the 8B shape with random weights on a GPU, the demo's model in a tiny run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from rasa_train.bench.engines import Contender, contender, engines, give, values_for
from rasa_train.bench.shapes import architecture, random_model
from rasa_train.bench.workloads import Problem, language_model, lengths

from .measure import BF16, DEVICE, ON_GPU, TINY

TOKENS = 128 if TINY else 8192
"""Tokens of a step. With 16,384 the 8B base alone keeps 79 GiB for its backward pass."""
ENGINES = {"base": ("base", None), "LoRA": ("ours", "lora"), "RaSA": ("ours", "rasa")}
"""Names for people, and the labels that rasa-bench has for them."""


@cache
def problem(layers: int | None = None) -> Problem:
    """The model, with so many of its layers (default: all), and its loss on packed sequences."""
    config = architecture("rasa_train/demo/model" if TINY else "llama-3.1-8b")
    if layers is not None:
        config.num_hidden_layers = min(layers, config.num_hidden_layers)
    base = random_model(config, BF16 if ON_GPU else torch.float32, DEVICE)
    return language_model(base, lengths("packed", TOKENS), flat=True)


def built(name: str, dropout: float, layers: int | None = None) -> Contender:
    """The base, LoRA or RaSA on it, ready to run."""
    on = problem(layers)
    engine = next(e for e in engines(on.width, dropout) if e.label == ENGINES[name])
    ran = contender(engine, on)
    give(values_for(engine.method, on.base), ran.parameters)
    return ran


def step_of(ran: Contender) -> Callable[[], None]:
    """A step, and what an optimizer would leave behind."""

    def step() -> None:
        ran.step()
        ran.settle()

    return step
