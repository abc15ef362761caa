"""Lion and AdamW, as a recipe configures them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class LionW(_Config):
    """Lion with decoupled weight decay (Chen et al. 2023, arXiv 2302.06675): every step moves every entry by lr."""

    moments: ClassVar[int] = 1
    """Number of running averages per trained value, which the optimizer holds in fp32."""
    name: Literal["lionw"] = "lionw"
    lr: PositiveFloat = 5.0e-4
    """Peak learning rate (paper: 5e-4 for LoRA and RaSA, 3e-4 for MoRA, 5e-3 for VeRA)."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Coefficients of the update and of the momentum (the paper's scripts)."""
    weight_decay: NonNegativeFloat = 0.0
    """Relative decay per step at the peak lr: p *= 1 - (lr / peak lr) * weight_decay, whatever the peak lr is."""


class AdamW(_Config):
    """AdamW (Loshchilov & Hutter 2019)."""

    moments: ClassVar[int] = 2
    """Number of running averages per trained value, which the optimizer holds in fp32."""
    name: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 2.0e-4
    """Peak learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Coefficients of the running means of the gradient and of its square (torch's defaults)."""
    eps: PositiveFloat = 1e-8
    """Term added to the root of the mean square gradient."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay: the relative decay per step is lr * weight_decay, as in torch."""


def _default_name(value: Any) -> Any:
    return {"name": "lionw", **value} if isinstance(value, dict) else value


OptimizerConfig = Annotated[LionW | AdamW, Field(discriminator="name"), BeforeValidator(_default_name)]


class Lion(torch.optim.Optimizer):
    """The optimizer that ``LionW`` configures. Its state and, bit for bit, its arithmetic are those of lion-pytorch,
    but it launches a few kernels for many tensors instead of several for each tensor."""

    AT_ONCE = 64
    """Number of tensors updated together; it bounds the memory of the updates where tensors are large."""

    def __init__(self, parameters: ParamsT, config: LionW) -> None:
        super().__init__(parameters, {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay})
        self.peak_lr = config.lr

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            trained: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            for p in trained:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            for at in range(0, len(trained), self.AT_ONCE):
                self._update(trained[at : at + self.AT_ONCE], group["lr"], group["betas"], group["weight_decay"])

    def _update(self, parameters: list[Tensor], lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        beta1, beta2 = betas
        grads = [p.grad for p in parameters if p.grad is not None]
        averages = [self.state[p]["exp_avg"] for p in parameters]
        updates = torch._foreach_mul(averages, beta1)
        torch._foreach_add_(updates, grads, alpha=1.0 - beta1)
        torch._foreach_sign_(updates)
        torch._foreach_mul_(parameters, 1.0 - lr * (weight_decay / self.peak_lr))
        torch._foreach_add_(parameters, updates, alpha=-lr)
        torch._foreach_mul_(averages, beta2)
        torch._foreach_add_(averages, grads, alpha=1.0 - beta2)


def make_optimizer(
    config: LionW | AdamW, parameters: Iterable[nn.Parameter] | Mapping[float, Iterable[nn.Parameter]]
) -> torch.optim.Optimizer:
    """Make the optimizer that ``config`` describes.

    Args:
        parameters: the trained parameters; or groups of them, by the factor of their learning rate (see ``set_lr``).
    """
    given = parameters if isinstance(parameters, Mapping) else {1.0: parameters}
    by_factor = {factor: list(ps) for factor, ps in given.items()}
    groups = [{"params": ps, "lr_factor": factor} for factor, ps in by_factor.items()]
    if isinstance(config, LionW):
        return Lion(groups, config)
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=all(p.is_cuda for ps in by_factor.values() for p in ps) or None,  # None leaves the choice to torch
    )
