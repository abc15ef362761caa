"""Whole steps of small models on this device: methods against W + dW in fp32, dropout, experts."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, MixtralConfig

from rasa_train.adapters.experts import AdaptedExperts
from rasa_train.adapters.inject import adapt
from rasa_train.adapters.registry import METHODS
from rasa_train.adapters.shared_input import packed
from rasa_train.adapters.state import groups, trainable
from rasa_train.bench import gate
from rasa_train.bench.engines import Contender, give, values_for
from rasa_train.bench.shapes import random_model, shared_copy
from rasa_train.bench.workloads import Problem, language_model
from rasa_train.methods.rasa import RaSA
from rasa_train.training.offload import offloaded

from .measure import BF16, DEVICE, ON_GPU, Check, Values, error, hold, rounded

METHOD_FIELDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 8},
    "rasa": {"r": 8, "k": 1},
    "vera": {"r": 64},
    "mora": {"r": 8},
    "sharelora": {"r": 8},
    "dora": {"r": 8},
    "tied-lora": {"r": 8},
    "adalora": {},
}
LOSS_ERROR, GRADIENT_ERROR = 5e-3, 0.15
"""Largest errors of a whole model. bf16 alone costs up to half of the second; a wrong scale, a lost term or a swapped
factor costs far more."""
SAME, OTHER = 1e-2, 0.1
"""Two gradients of the same step differ by less: sums may be in another order, rounded to bf16. With other masks they
differ by more: by about 0.6."""
EXPERT_ERROR = 3e-2
"""Error of one layer of experts: three products in bf16, one after the other."""
LENGTHS = [70, 33, 129]


@cache
def small_llama() -> Problem:
    """A Llama with two layers, and its loss on three sequences."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    return language_model(random_model(config, BF16, DEVICE), LENGTHS, flat=True)


def method(name: str) -> Values:
    """Compare loss and gradients of a method, computed fast (with packed factors) and plainly, with fp32."""
    problem = small_llama()
    adapter = METHODS[name](**METHOD_FIELDS[name])
    given = values_for(adapter, problem.base)
    exact = gate.written_out(problem.base, adapter)
    expected = trainable(exact)
    give(given, expected)
    exact_loss = float(Contender(exact, expected, problem.loss(exact), []).step())
    values: Values = {}
    for kind in ("fast", "plain"):
        model = shared_copy(problem.base).train()
        adapt(model, adapter)
        parameters = trainable(model)
        give(given, parameters)
        together = groups(model) if kind == "fast" else []
        loss = float(Contender(model, parameters, problem.loss(model), together).step())
        pairs = [(gate.gradient(p), gate.gradient(expected[n])) for n, p in parameters.items()]
        values[kind] = {
            "loss_error": rounded(abs(loss / exact_loss - 1)),
            "gradient_error": rounded(max(error(a, b) for a, b in pairs)),
            "gradient_cosine": min(round(float(F.cosine_similarity(a, b, dim=0)), 6) for a, b in pairs),
        }
    fine = all(v["loss_error"] < LOSS_ERROR and v["gradient_error"] < GRADIENT_ERROR for v in values.values())
    return hold(fine, "loss or gradients are not those of the method in fp32", values)


def dropout() -> Values:
    """Compare gradients with dropout: repeated, with recomputed layers, with offloading, and with another seed."""
    first = dropped_gradients(1)
    values = {
        "repeated": rounded(error(dropped_gradients(1), first)),
        "recomputed": rounded(error(dropped_gradients(1, recompute=True), first)),
        "offloaded": rounded(error(dropped_gradients(1, offload=True), first)),
        "another_seed": rounded(error(dropped_gradients(2), first)),
    }
    same = max(values["repeated"], values["recomputed"], values["offloaded"])
    hold(same < SAME, "the masks of a step are not the same again", values)
    return hold(values["another_seed"] > OTHER, "another seed gives the same masks", values)


def dropped_gradients(seed: int, *, recompute: bool = False, offload: bool = False) -> Tensor:
    """All gradients of one step of RaSA with dropout, as a vector."""
    problem, adapter = small_llama(), RaSA(r=8, k=1, dropout=0.1)
    model = shared_copy(problem.base).train()
    adapt(model, adapter)
    parameters = trainable(model)
    give(values_for(adapter, problem.base), parameters)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    loss = problem.loss(model)
    torch.manual_seed(seed)
    with packed(groups(model)):
        with offloaded(model, DEVICE.type) if offload else nullcontext():
            value = loss()
        value.backward()  # type: ignore[no-untyped-call]
    return torch.cat([gate.gradient(p) for p in parameters.values()])


def experts() -> Values:
    """Compare RaSA on fused experts with fp32: the loss of a model, and one layer of experts on given routes.

    In a model a few tokens go to other experts in bf16 than in fp32, so its gradients cannot be compared.
    """
    config = MixtralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        initializer_range=0.1,
    )
    base, adapter = random_model(config, BF16, DEVICE), RaSA(r=8, k=1)
    given = values_for(adapter, base)
    losses, layers = [], []
    for model in (shared_copy(base).train(), copy.deepcopy(base).float().train()):
        adapt(model, adapter)
        parameters = trainable(model)
        give(given, parameters)
        loss = language_model(model, LENGTHS[:2], flat=True).loss(model)  # type: ignore[arg-type]
        with packed(groups(model)):
            losses.append(float(loss().detach()))
            layers.append(layer_of_experts(model, config))
    values = {name: rounded(error(found, layers[1][name])) for name, found in layers[0].items()}
    worst = max(value for name, value in values.items() if name not in ("y", "dx"))
    values = {"loss_error": rounded(abs(losses[0] / losses[1] - 1)), "y": values["y"], "dx": values["dx"]}
    values["gradient_error"] = worst
    fine = values["loss_error"] < LOSS_ERROR and max(values["y"], values["dx"], worst) < EXPERT_ERROR
    return hold(fine, "the loss, an output or a gradient is not that in fp32", values)


def layer_of_experts(model: nn.Module, config: MixtralConfig) -> dict[str, Tensor]:
    """Output and gradients of the experts of the first layer, for tokens and routes that are always the same."""
    module = next(m for m in model.modules() if isinstance(m, AdaptedExperts))
    numbers = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(200, config.hidden_size, generator=numbers).to(BF16).to(DEVICE) for _ in range(2))
    chances = torch.rand(200, config.num_local_experts, generator=numbers)
    weights, routes = (t.to(DEVICE) for t in chances.topk(2))
    dtype = module.down_proj.dtype
    x = x.to(dtype).requires_grad_()
    weights, dy = weights.to(BF16).to(dtype), dy.to(dtype)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    # Torch's own grouped product waits for any other dtype or GPU.
    strict = ON_GPU and dtype == BF16 and torch.cuda.get_device_capability()[0] in (9, 10)
    try:
        if strict:  # from here on, an operation fails that makes the host wait for the GPU
            torch.cuda.set_sync_debug_mode("error")
        y = module(x, routes, weights)
        gradients = torch.autograd.grad(y, [x, *trained.values()], dy)
    finally:
        if strict:
            torch.cuda.set_sync_debug_mode("default")
    return {"y": y.detach(), **dict(zip(("dx", *trained), gradients, strict=True))}


CHECKS = [
    *(Check(f"method {name}", partial(method, name)) for name in METHOD_FIELDS),
    Check("dropout", dropout),
    Check("experts", experts),
]
