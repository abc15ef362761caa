"""The counters, by hand on one product and as gates on the whole model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rasa_train.bench.counters import Count, Counter, FusedDropout, count
from rasa_train.bench.engines import Label
from rasa_train.bench.shapes import architecture
from rasa_train.errors import UserError

KB_PER_TOKEN_AND_LAYER, OPS = 520e3, 4500
"""The goals. PEFT in bf16 with dropout 0.05: 1717 KB and 5842 operations."""
PACKING_OPS = 200
"""The goal for a step of 32 layers."""


@pytest.fixture(scope="module")
def plain() -> dict[Label, Count]:
    chosen = [("ours", "lora"), ("ours", "rasa"), ("ours", "mora"), ("peft-tuned", "lora")]
    return count(architecture("llama-3.1-8b"), 0.0, chosen)


@pytest.fixture(scope="module")
def dropped() -> dict[Label, Count]:
    return count(architecture("llama-3.1-8b"), 0.05, [("ours", "lora"), ("ours", "rasa")])


@pytest.mark.parametrize("counted", ["plain", "dropped"])
@pytest.mark.parametrize("method", ["lora", "rasa"])
def test_the_adapter_stays_cheap(method: str, counted: str, request: pytest.FixtureRequest) -> None:
    counts: dict[Label, Count] = request.getfixturevalue(counted)
    own = counts["ours", method]
    assert 0 < own.bytes_per_token_and_layer <= KB_PER_TOKEN_AND_LAYER
    assert counts["base", None].dispatched_ops < own.dispatched_ops <= OPS


@pytest.mark.parametrize("method", ["lora", "rasa", "mora"])
def test_packing_takes_few_operations_whatever_the_number_of_layers(method: str, plain: dict[Label, Count]) -> None:
    assert 0 < plain["ours", method].packing_ops <= PACKING_OPS


def test_rasa_costs_what_lora_costs(plain: dict[Label, Count]) -> None:
    """39 ranks instead of 8 are about 1% more bytes, and not one operation."""
    lora, rasa = plain["ours", "lora"], plain["ours", "rasa"]
    assert rasa.dispatched_ops == lora.dispatched_ops
    assert rasa.bytes_per_token_and_layer < 1.02 * lora.bytes_per_token_and_layer


@pytest.mark.parametrize("method", ["lora", "rasa"])
def test_dropout_moves_nothing_more(method: str, plain: dict[Label, Count], dropped: dict[Label, Count]) -> None:
    """Its mask is made where it is used. One operation for each of 4 groups of 32 layers: the sum of parts of dA."""
    without, with_it = plain["ours", method], dropped["ours", method]
    assert with_it.bytes_per_token_and_layer == pytest.approx(without.bytes_per_token_and_layer, rel=1e-3)
    assert with_it.dispatched_ops == without.dispatched_ops + 4 * 32


def test_mora_has_a_fast_path_too(plain: dict[Label, Count]) -> None:
    """Its own forward: 1,553 KB and 9,859 operations."""
    own = plain["ours", "mora"]
    assert own.bytes_per_token_and_layer <= 980e3 and own.dispatched_ops <= 4950


def test_peft_is_counted_as_by_hand(plain: dict[Label, Count]) -> None:
    """Elements a token moves through one LoRA linear (in, out) in PEFT's order, ranks left out: forward A reads in, B
    writes out, the scale reads and writes out, the sum reads 2 out and writes out: in + 6 out. Backward the scale reads
    and writes out, dY B and dB read out twice, dA reads in, dx writes in and is added to the base's: 5 in + 4 out
    (adding reads twice and writes once)."""
    inputs, outputs = 38_912, 43_008
    expected = 2 * (6 * inputs + 10 * outputs)
    assert plain["peft-tuned", "lora"].bytes_per_token_and_layer == pytest.approx(expected, rel=0.01)


def test_a_product_by_hand() -> None:
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    with Counter() as counter:
        a.t().t() @ b  # views move nothing
    assert (counter.ops, counter.bytes) == (1, 4 * (15 + 35 + 21))
    with Counter() as counter:
        torch.ones(1).expand(10) + 1.0  # ten times the same element is read once
    assert counter.bytes == 4 + 4 + 40  # made, read, written


def test_dropout_is_one_operation() -> None:
    x = torch.ones(100)
    with Counter() as counter, FusedDropout():
        dropped = F.dropout(x, 0.5)
        assert F.dropout(x, 0.5, training=False) is x
    assert counter.ops == 1 and set(dropped.tolist()) == {0.0, 2.0}


def test_other_shapes_are_refused() -> None:
    from transformers import GPT2Config

    with pytest.raises(UserError, match="Llama or Mistral"):
        count(GPT2Config(), 0.0)
