"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from lion_pytorch import Lion
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
)
from torch import nn

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class LionW(_Config):
    """Lion with decoupled weight decay (Chen et al. 2023, arXiv 2302.06675): every step moves each entry by lr."""

    name: Literal["lionw"] = "lionw"
    lr: PositiveFloat = 5.0e-4
    """Peak learning rate (paper: 5e-4 for LoRA and RaSA, 3e-4 for MoRA, 5e-3 for VeRA)."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """(of the update, of the momentum). The paper's scripts."""
    weight_decay: NonNegativeFloat = 0.0
    """Decay per step at peak lr, relative: p *= 1 - (lr / peak lr) * weight_decay, whatever the peak lr is."""


class AdamW(_Config):
    """AdamW (Loshchilov & Hutter 2019)."""

    name: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 2.0e-4
    """Peak learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    """Decay per step is lr * weight_decay, as in torch."""


def _default_name(value: Any) -> Any:
    return {"name": "lionw", **value} if isinstance(value, dict) else value


OptimizerConfig = Annotated[LionW | AdamW, Field(discriminator="name"), BeforeValidator(_default_name)]


class ScheduleConfig(_Config):
    """Learning rate over the optimizer steps: linear warm-up, then the named decay to ``final_ratio``."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(0.1, ge=0.0, le=1.0)
    """Share of all steps that warms up, rounded up (paper: 10%)."""
    warmup_steps: NonNegativeInt | None = None
    """Warm-up in steps; replaces ``warmup_ratio``."""
    final_ratio: float = Field(0.0, ge=0.0, le=1.0)
    """Learning rate at the end, as a share of the peak."""


def make_optimizer(config: LionW | AdamW, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    parameters = list(parameters)
    if isinstance(config, LionW):
        lion: torch.optim.Optimizer = Lion(
            parameters,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            decoupled_weight_decay=True,
        )
        return lion
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )


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
    for group in optimizer.param_groups:
        group["lr"] = lr
