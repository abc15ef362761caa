"""The gate lets through what computes its method, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from rasa_train.bench import gate, peers
from rasa_train.bench.engines import NAMES, Engine, contender, engines, give, values_for
from rasa_train.bench.shapes import LinearStack, random_model
from rasa_train.bench.workloads import linears
from rasa_train.methods.lora import LoRA

CPU = torch.device("cpu")
ALL = engines(64, 0.05)


@pytest.mark.parametrize("engine", ALL, ids=lambda e: "-".join(filter(None, e.label)))
def test_every_engine_passes(engine: Engine) -> None:
    verdict = gate.check(engine, CPU)
    assert verdict.passed, verdict


def test_every_engine_is_there() -> None:
    assert {engine.name for engine in ALL} == NAMES
    assert {e.method.method for e in ALL if e.name == "ours" and e.method} == {"lora", "rasa", "vera", "mora"}


def wrong_scale(model: nn.Module, method: LoRA) -> dict[str, nn.Parameter]:
    parameters = peers.place_per_linear(model, method)
    for module in model.modules():
        if isinstance(module, peers.PerLinear):
            module.scale *= 1.5
    return parameters


def no_update(model: nn.Module, method: LoRA) -> dict[str, nn.Parameter]:
    parameters = wrong_scale(model, method)
    for module in model.modules():
        if isinstance(module, peers.PerLinear):
            module.scale = 0.0
    return parameters


@pytest.mark.parametrize("place", [wrong_scale, no_update])
def test_a_wrong_engine_does_not_pass(place: object) -> None:
    right = next(engine for engine in ALL if engine.name == "per-linear")
    assert not gate.check(replace(right, place=place), CPU).passed  # type: ignore[arg-type]


def test_peers_compute_their_method_exactly() -> None:
    """In fp32, against W + dW written out: the tolerance of the gate is bf16's, not the peers'."""
    problem = linears(LinearStack(1024, 32, torch.float32, CPU), [6], padded=False, dtype=torch.float32, device=CPU)
    for name in ("paper", "per-linear", "peft", "ours"):
        engine = next(e for e in engines(64, 0.0) if e.name == name)
        values = values_for(engine.method, problem.base)
        ran = contender(engine, problem)
        give(values, ran.parameters)
        with torch.no_grad():
            x = torch.randn(4, problem.base.width)
            exact = gate.written_out(problem.base, engine.method)
            give(values, gate.trainable(exact))
            torch.testing.assert_close(ran.model.eval()(x), exact(x), rtol=1e-4, atol=1e-4)


def test_no_value_is_zero_and_engines_share_the_base() -> None:
    problem = linears(LinearStack(1024, 32, torch.float32, CPU), [6], padded=False, dtype=torch.float32, device=CPU)
    for engine in engines(64, 0.0):
        assert all(value.any() for value in values_for(engine.method, problem.base).values())
        weights = {p.data_ptr() for p in problem.base.parameters()}
        assert weights <= {p.data_ptr() for p in contender(engine, problem).model.parameters()}
    assert len(weights) == 7 and isinstance(problem.base, LinearStack)


def test_the_frozen_base_runs_its_whole_backward() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = random_model(config, torch.float32, CPU)
    seen = []
    model.model.layers[0].register_full_backward_hook(lambda *gradients: seen.append(gradients[1][0]))
    model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    assert len(seen) == 1 and seen[0] is not None
