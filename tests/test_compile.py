"""Compiled layers compute what they compute uncompiled, and are not compiled again for every batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from rasa_train.adapters.inject import adapt
from rasa_train.adapters.registry import METHODS
from rasa_train.data.batching import collate, flatten, with_targets
from rasa_train.models.layers import compile_layers
from rasa_train.models.padding_free import use_varlen
from rasa_train.objectives.next_token import NextToken

from .test_loss import assert_same_gradients, examples
from .tiny_models import tiny_model

FIELDS: dict[str, dict[str, Any]] = {"rasa": {"r": 4, "k": 1}, "vb-lora": {"vector_length": 16}}
LENGTHS = [(5, 9), (7, 3, 12), (20,), (4, 4, 4, 4), (33, 2), (8,), (11, 9), (13,), (5, 6, 7), (6, 6)]


def graphs(method: str, backend: str, *, flat: bool, checkpointing: bool = False) -> list[int]:
    """Train ``method`` compiled and not on batches of many shapes; graphs compiled up to each of them."""
    torch._dynamo.reset()
    counters.clear()
    base = tiny_model("llama")
    if flat:
        use_varlen(base)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    model, _ = adapt(base, METHODS[method](**FIELDS.get(method, {})))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    eager = copy.deepcopy(model)
    losses = [NextToken().install(m) for m in (model, eager)]
    compile_layers(model, backend)
    found = []
    for lengths in LENGTHS:
        some = examples(*lengths)
        batch = with_targets((flatten(some) if flat else collate(some, pad_token_id=0)) or {})
        results = []
        for m, loss_of in zip((model, eager), losses, strict=True):
            m.train()
            m.zero_grad()
            loss = loss_of(m, batch)
            loss.backward()
            results.append(float(loss.detach()))
        assert results[0] == pytest.approx(results[1], rel=1e-5)
        assert_same_gradients(model, eager)
        found.append(counters["stats"]["unique_graphs"])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_shapes_share_what_is_compiled(flat: bool, checkpointing: bool) -> None:
    found = graphs("rasa", "aot_eager", flat=flat, checkpointing=checkpointing)
    # Padded batches are of three forms: one sequence, several of one length (which need no mask), several others.
    # Attention that goes sequence by sequence (a CPU's, without padding) stays between two graphs.
    assert found[0] > 0 and found[-1] <= (2 if flat else 3) * found[0], found
    assert found[-1] == found[-4], "no more of them after some batches"


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"peft"}))
def test_every_method(method: str) -> None:
    assert graphs(method, "aot_eager", flat=True)[0] > 0


@pytest.mark.slow
def test_inductor() -> None:
    assert graphs("rasa", "inductor", flat=True)[0] > 0
