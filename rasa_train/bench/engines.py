"""The engines of a comparison: who computes which method, and how each is built on a shared frozen base."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..adapters.contract import Method
from ..adapters.inject import adapt
from ..adapters.shared_input import Group, packed
from ..adapters.sites import find_sites
from ..adapters.state import groups, trainable
from ..errors import UserError
from ..methods.lora import LoRA
from ..methods.mora import MoRA
from ..methods.rasa import RaSA
from ..methods.vera import VeRA
from .peers import place_paper_rasa, place_per_linear
from .shapes import LinearStack, shared_copy
from .workloads import Loss, Problem

Parameters = dict[str, nn.Parameter]
Label = tuple[str, str | None]
"""Names of an engine and its method."""
NAMES = {"base", "paper", "peft", "peft-tuned", "per-linear", "ours"}
"""What ``Engine.name`` can be."""
BASE: Label = ("base", None)
METHODS = {"lora", "rasa", "vera", "mora"}
"""What the method of an engine can be."""


@dataclass(frozen=True)
class Engine:
    """One contender."""

    name: str
    method: Method | None
    """None for the frozen base alone."""
    place: Callable[[nn.Module, Any], Parameters]
    """Put the method into a model; returns the trained parameters by the names that ours has for them."""
    autocast: bool = False
    """Its users run it under autocast when the model is bf16."""
    stock: bool = False
    """With its own stack around it, it has full logits, padded batches and recomputed activations."""
    needs: str | None = None
    """Package it needs."""

    @property
    def label(self) -> Label:
        return self.name, None if self.method is None else self.method.method

    @property
    def missing(self) -> bool:
        return self.needs is not None and importlib.util.find_spec(self.needs) is None


@dataclass(frozen=True)
class Contender:
    """An engine on a model, ready to run."""

    model: nn.Module
    parameters: Parameters
    loss: Loss
    groups: list[Group]
    """What ours packs; nothing in the models of others."""

    def step(self) -> Tensor:
        """An optimizer step of one micro-batch, without the optimizer. Returns the loss.

        Packing is done once an optimizer step, so for ours no micro-batch can be dearer than this.
        """
        with packed(self.groups):
            return self.micro_batch()

    def micro_batch(self) -> Tensor:
        """Forward and backward; gradients are added to what is there. Returns the loss."""
        loss = self.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def settle(self) -> None:
        """What an optimizer step does to what an engine may have kept: gradients go, parameters are written."""
        with torch.no_grad():
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad = None
                    parameter.mul_(1.0)


def engines(width: int, dropout: float) -> list[Engine]:
    """All engines for a model of this width, the frozen base first.

    Hyper-parameters are the paper's for mathematics at LoRA r = 8; VeRA's rank is a quarter of the model's width, as
    the paper's 1024 is of 4096. The per-linear function has no dropout: unsloth leaves its fast path when there is.
    """
    lora = LoRA(r=8, alpha=8, dropout=dropout)
    rasa = RaSA(r=8, k=1, alpha=8, dropout=dropout)
    return [
        Engine("base", None, lambda model, method: {}),
        Engine("paper", rasa, place_paper_rasa, stock=True),
        Engine("peft", lora, _place_peft, autocast=True, stock=True, needs="peft"),
        Engine("peft-tuned", lora, _place_peft_tuned, needs="peft"),
        Engine("per-linear", LoRA(r=8, alpha=8), place_per_linear),
        Engine("ours", lora, _place_ours),
        Engine("ours", rasa, _place_ours),
        Engine("ours", VeRA(r=min(1024, width // 4), dropout=dropout), _place_ours),
        Engine("ours", MoRA(r=8, dropout=dropout), _place_ours),
    ]


@dataclass(frozen=True)
class Choice:
    """The engines to run, beside the frozen base, which always is; None for all."""

    engines: frozenset[str] | None = None
    methods: frozenset[str] | None = None

    @classmethod
    def read(cls, names: str | None, methods: str | None) -> Choice:
        """Read the values of ``--engines`` and ``--methods``, names separated by commas.

        Raises:
            UserError: a name is unknown, or none of the engines has one of the methods.
        """
        choice = cls(_known("--engines", names, NAMES), _known("--methods", methods, METHODS))
        others = (choice.engines or NAMES) - {"base"}
        if others and len(choice.of(engines(64, 0.0))) == 1:
            raise UserError(f"--engines {names} --methods {methods}: none of these engines has one of these methods")
        return choice

    def of(self, every: Sequence[Engine]) -> list[Engine]:
        """The chosen ones of ``every``, the frozen base first."""
        return [
            engine
            for engine in every
            if engine.method is None
            or (
                (self.engines is None or engine.name in self.engines)
                and (self.methods is None or engine.method.method in self.methods)
            )
        ]


def _known(option: str, given: str | None, known: set[str]) -> frozenset[str] | None:
    if given is None:
        return None
    chosen = {name.strip() for name in given.split(",")}
    if unknown := sorted(chosen - known):
        raise UserError(f"{option}: there is no {', '.join(unknown)}; there are {', '.join(sorted(known))}", key=option)
    return frozenset(chosen)


def contender(engine: Engine, problem: Problem, *, own_stack: bool = False) -> Contender:
    """The engine on a copy of the problem's model that shares its weights, in training mode, as its method starts.

    With its own stack a ``stock`` engine has the loss of transformers and recomputes activations.
    """
    model = shared_copy(problem.base).train()
    parameters = engine.place(model, engine.method)
    stock = own_stack and engine.stock
    if stock and isinstance(model, PreTrainedModel):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = (problem.stock_loss if stock else problem.loss)(model)
    if engine.autocast and problem.dtype == torch.bfloat16:
        kind = next(model.parameters()).device.type
        loss = torch.autocast(kind, problem.dtype)(loss)
    # Of a stack of linears only the first layer is run, so only its price is asked.
    run = model.layers[0] if isinstance(model, LinearStack) else model
    return Contender(model, parameters, loss, groups(run))


def give(values: Mapping[str, Tensor], parameters: Parameters) -> None:
    """Set the trained tensors."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def values_for(method: Method | None, base: nn.Module) -> dict[str, Tensor]:
    """Values of every trained tensor, fp32, as the method starts, but none zero: zeros run faster and hide errors."""
    if method is None:
        return {}
    torch.manual_seed(1)
    parameters = _place_ours(shared_copy(base), method)
    values = {name: parameter.detach() for name, parameter in parameters.items()}
    return {name: value if value.any() else torch.randn_like(value) * 0.02 for name, value in values.items()}


def _place_ours(model: nn.Module, method: Method) -> Parameters:
    adapt(model, method)
    return trainable(model)


def _place_peft(model: nn.Module, method: LoRA, *, fp32: bool = True) -> Parameters:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import cast_adapter_dtype

    names = sorted({site.kind.rpartition(".")[2] for site in find_sites(model)})
    config = LoraConfig(r=method.r, lora_alpha=method.alpha, lora_dropout=method.dropout, target_modules=names)
    inject_adapter_in_model(config, model)
    cast_adapter_dtype(model, "default", autocast_adapter_dtype=fp32)
    parameters: Parameters = {}
    for name, parameter in model.named_parameters():
        if ours := LoRA.rename_peft(name.replace(".default", "")):
            parameters[ours] = parameter
    return parameters


def _place_peft_tuned(model: nn.Module, method: LoRA) -> Parameters:
    """Adapters in the model's dtype, and on a GPU Liger's norms and SwiGLU if that is installed."""
    parameters = _place_peft(model, method, fp32=False)
    is_llama = isinstance(model, PreTrainedModel) and model.config.model_type == "llama"
    if is_llama and next(model.parameters()).is_cuda and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama  # type: ignore[import-not-found]

        # Not its rotary embedding and losses: those are replaced for the whole process, for other engines as well.
        apply_liger_kernel_to_llama(model=model, rope=False, cross_entropy=False, fused_linear_cross_entropy=False)
    return parameters
