"""The engines of a comparison: which implementation computes which method, and how it is built on a shared base."""

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
from ..models.fused import fuse
from .peers import place_paper_rasa, place_per_linear
from .shapes import LinearStack, shared_copy
from .workloads import Loss, Problem

Parameters = dict[str, nn.Parameter]
Label = tuple[str, str | None]
"""Names of an engine and of its method."""
NAMES = {"base", "paper", "peft", "peft-tuned", "per-linear", "ours"}
"""Possible values of ``Engine.name``."""
BASE: Label = ("base", None)


def title(label: Label) -> str:
    return " ".join(filter(None, label))


@dataclass(frozen=True)
class Engine:
    """An implementation of a method, which can be compared with others."""

    name: str
    method: Method | None
    """The method; None for the frozen base alone."""
    place: Callable[[nn.Module, Any], Parameters]
    """Puts the method into a model. Returns the trained parameters by the names that our implementation gives them."""
    autocast: bool = False
    """Whether the engine's users run it under autocast when the model is bf16."""
    stock: bool = False
    """Whether the engine's own stack has full logits, padded batches and recomputed activations."""
    needs: str | None = None
    """Package that the engine needs."""

    @property
    def label(self) -> Label:
        """Names of the engine and of its method."""
        return self.name, None if self.method is None else self.method.method

    @property
    def missing(self) -> bool:
        """Whether the package that the engine needs is not installed."""
        return self.needs is not None and importlib.util.find_spec(self.needs) is None


@dataclass(frozen=True)
class Contender:
    """An engine on a model, ready to run."""

    model: nn.Module
    parameters: Parameters
    loss: Loss
    groups: list[Group]
    """Groups of linears that our implementation packs; empty for other engines."""

    def step(self) -> Tensor:
        """Run an optimizer step of one micro-batch, without the optimizer. Returns the loss.

        Our implementation packs once per optimizer step, so a step of one micro-batch is its most expensive case.
        """
        with packed(self.groups):
            return self.micro_batch()

    def micro_batch(self) -> Tensor:
        """Run the forward and backward pass, which adds to the gradients. Returns the loss."""
        loss = self.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def settle(self) -> None:
        """Drop the gradients and write the parameters, as an optimizer step does, so that an engine cannot reuse values
        derived from them."""
        with torch.no_grad():
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad = None
                    parameter.mul_(1.0)


def engines(width: int, dropout: float, rank: int = 8) -> list[Engine]:
    """Return all engines for a model of this width, the frozen base first.

    Hyper-parameters are the paper's for mathematics at LoRA r = 8, and at another ``rank`` the scale is 1 too; VeRA's
    rank is a quarter of the model's width, as the paper's 1024 is of 4096. The per-linear engine has no dropout, for
    which unsloth would leave its fast path.
    """
    lora = LoRA(r=rank, alpha=rank, dropout=dropout)
    rasa = RaSA(r=rank, k=1, alpha=rank, dropout=dropout)
    return [
        Engine("base", None, lambda model, method: {}),
        Engine("paper", rasa, place_paper_rasa, stock=True),
        Engine("peft", lora, _place_peft, autocast=True, stock=True, needs="peft"),
        Engine("peft-tuned", lora, _place_peft_tuned, needs="peft"),
        Engine("per-linear", LoRA(r=rank, alpha=rank), place_per_linear),
        Engine("ours", lora, place_ours),
        Engine("ours", rasa, place_ours),
        Engine("ours", VeRA(r=min(1024, width // 4), dropout=dropout), place_ours),
        Engine("ours", MoRA(r=rank, dropout=dropout), place_ours),
    ]


@dataclass(frozen=True)
class Choice:
    """The engines to run in addition to the frozen base, which always runs."""

    engines: frozenset[str] | None = None
    """Names of engines; None for all."""
    methods: frozenset[str] | None = None
    """Names of methods; None for all."""

    @classmethod
    def read(cls, names: str | None, methods: str | None) -> Choice:
        """Read the values of ``--engines`` and ``--methods``, names separated by commas.

        Raises:
            UserError: a name is unknown, or none of the engines has one of the methods.
        """
        every = engines(64, 0.0)
        known = {engine.method.method for engine in every if engine.method is not None}
        choice = cls(_known("--engines", names, NAMES), _known("--methods", methods, known))
        others = (choice.engines or NAMES) - {"base"}
        if others and len(choice.of(every)) == 1:
            raise UserError(
                f"--engines {names} --methods {methods}: none of these engines computes one of these methods"
            )
        return choice

    def of(self, every: Sequence[Engine]) -> list[Engine]:
        """Return the chosen engines out of ``every``, the frozen base first."""
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
        raise UserError(
            f"{option}: there is no {', '.join(unknown)}; the names are {', '.join(sorted(known))}", key=option
        )
    return frozenset(chosen)


def contender(engine: Engine, problem: Problem, *, own_stack: bool = False, fused: bool = False) -> Contender:
    """Return the engine on a copy of the problem's model that shares its weights, in training mode, with the initial
    values of its method. A ``fused`` model computes with Liger's kernels what is not a product.

    With its own stack, a ``stock`` engine has the loss of transformers and recomputes activations.
    """
    model = shared_copy(problem.base).train()
    if fused and isinstance(model, PreTrainedModel):
        fuse(model)
    parameters = engine.place(model, engine.method)
    stock = own_stack and engine.stock
    if stock and isinstance(model, PreTrainedModel):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = (problem.stock_loss if stock else problem.loss)(model)
    if engine.autocast and problem.dtype == torch.bfloat16:
        kind = next(model.parameters()).device.type
        loss = torch.autocast(kind, problem.dtype)(loss)
    # Only the first layer of a stack of linears is run, so only its linears are packed.
    run = model.layers[0] if isinstance(model, LinearStack) else model
    return Contender(model, parameters, loss, groups(run))


def give(values: Mapping[str, Tensor], parameters: Parameters) -> None:
    """Copy values into the trained parameters."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def values_for(method: Method | None, base: nn.Module) -> dict[str, Tensor]:
    """Return values of every trained tensor, fp32: the method's initial values, but random values for tensors that
    start at zero, because zeros run faster and hide errors."""
    if method is None:
        return {}
    torch.manual_seed(1)
    parameters = place_ours(shared_copy(base), method)
    values = {name: parameter.detach() for name, parameter in parameters.items()}
    return {name: value if value.any() else torch.randn_like(value) * 0.02 for name, value in values.items()}


def place_ours(model: nn.Module, method: Method) -> Parameters:
    """Put the adapters of ``method`` into a model, as ``rasa-train`` does. Returns the trained parameters by name."""
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
    """Place PEFT's adapters in the model's dtype and, on a GPU with Liger installed, Liger's norms and SwiGLU."""
    parameters = _place_peft(model, method, fp32=False)
    is_llama = isinstance(model, PreTrainedModel) and model.config.model_type == "llama"
    if is_llama and next(model.parameters()).is_cuda and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama  # type: ignore[import-not-found]

        # Not Liger's rotary embedding and losses: these are replaced for the whole process, for other engines as well.
        apply_liger_kernel_to_llama(model=model, rope=False, cross_entropy=False, fused_linear_cross_entropy=False)
    return parameters
