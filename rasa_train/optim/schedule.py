"""The learning rate over the optimizer steps."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, NonNegativeInt

from .optimizers import _Config


class ScheduleConfig(_Config):
    """Learning rate over the optimizer steps: linear warm-up, then the named decay to ``final_ratio``."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up (the paper: cosine)."""
    warmup_ratio: float = Field(0.1, ge=0.0, le=1.0)
    """Share of all steps that warms up, rounded up (paper: 10%)."""
    warmup_steps: NonNegativeInt | None = None
    """Warm-up in steps; replaces ``warmup_ratio``."""
    final_ratio: float = Field(0.0, ge=0.0, le=1.0)
    """Learning rate at the end, as a share of the peak."""


def warmup_steps(config: ScheduleConfig, total_steps: int) -> int:
    return math.ceil(config.warmup_ratio * total_steps) if config.warmup_steps is None else config.warmup_steps


def lr_factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step ``step`` (0-based) as a share of the peak.

    The first step of a warm-up has learning rate 0 and the peak comes after it, as in transformers (which the
    reference used): step / warm-up, then 0.5 (1 + cos(pi * progress)).
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(total_steps - warmup, 1)
    decay = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return config.final_ratio + (1.0 - config.final_ratio) * decay[config.name]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of a step: of each group ``lr`` times the group's ``lr_factor``, if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
