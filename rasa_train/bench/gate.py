"""Check, before an engine is timed, that it computes its method: compare loss and gradients with an fp32 model."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig

from ..adapters.contract import Method
from ..adapters.inject import adapt
from ..adapters.linear import AdaptedLinear
from ..adapters.state import trainable
from .engines import Contender, Engine, contender, give, values_for
from .shapes import random_model
from .workloads import language_model

MAX_LOSS_ERROR = 2e-3
MAX_GRADIENT_ERROR = 0.1
MIN_COSINE = 0.995
"""On this model bf16 itself uses up a tenth of each limit; a wrong scale, a lost term or a swapped factor gives far
larger errors."""


@dataclass(frozen=True)
class Verdict:
    """Difference between an engine in bf16 and its method in fp32. For gradients, that of the worst trained tensor."""

    loss_error: float
    """|loss / fp32 loss - 1|"""
    gradient_error: float
    """|gradient - fp32 gradient| / |fp32 gradient|, because a cosine alone does not show a wrong scale."""
    gradient_cosine: float
    """Cosine of the gradient and the fp32 gradient."""

    @property
    def passed(self) -> bool:
        """Whether all errors are within the limits."""
        return (
            self.loss_error <= MAX_LOSS_ERROR
            and self.gradient_error <= MAX_GRADIENT_ERROR
            and self.gradient_cosine >= MIN_COSINE
        )


def check(engine: Engine, device: torch.device, *, fused: bool = False) -> Verdict:
    """Run the engine on a tiny model, without dropout, and compare it with fp32."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.15,  # so that the loss is far from that of a uniform prediction
    )
    problem = language_model(random_model(config, torch.bfloat16, device), [40, 23], flat=True)
    values = values_for(engine.method, problem.base)
    ran = contender(engine, problem, fused=fused)
    give(values, ran.parameters)
    ran.model.eval()
    loss = float(ran.step())

    exact = written_out(problem.base, engine.method)
    parameters = trainable(exact)
    give(values, parameters)
    expected = float(Contender(exact, parameters, problem.loss(exact), []).step())
    pairs = [(gradient(ran.parameters[name]), gradient(parameter)) for name, parameter in parameters.items()]
    return Verdict(
        loss_error=abs(loss / expected - 1),
        gradient_error=max((float((mine - right).norm() / right.norm()) for mine, right in pairs), default=0.0),
        gradient_cosine=min((float(F.cosine_similarity(*pair, dim=0)) for pair in pairs), default=1.0),
    )


def written_out(base: nn.Module, method: Method | None) -> nn.Module:
    """Return ``base`` in fp32, with W + dW computed in every forward pass. All engines must equal this model."""
    model = copy.deepcopy(base).float()
    if method is not None:
        adapt(model, method)
    for path, module in list(model.named_modules()):
        if isinstance(module, AdaptedLinear):
            model.set_submodule(path, Merged(module))
    return model.eval()


class Merged(nn.Module):
    """Linear that computes y = (W + dW) x + b."""

    def __init__(self, adapted: AdaptedLinear) -> None:
        super().__init__()
        self.weight, self.bias, self.adapter = adapted.weight, adapted.bias, adapted.adapter

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.adapter.delta(self.weight), self.bias)


def gradient(parameter: nn.Parameter) -> Tensor:
    """Return the gradient of a parameter as a vector in fp32."""
    assert parameter.grad is not None
    return parameter.grad.float().flatten()
