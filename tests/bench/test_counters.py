"""The counters, by hand on one product and as gates on the whole model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rasa_train.bench import counters
from rasa_train.bench.counters import Count, Counter, FusedDropout, Saved, count
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


def test_the_base_is_counted_as_by_hand(plain: dict[Label, Count]) -> None:
    """Bytes that a layer of the base keeps for a token, in the dtypes of transformers' Llama. Frozen products keep
    nothing. Two norms keep x in fp32 and the inverse root; attention keeps q, k, v, its result and a sum for each of 32
    heads; SwiGLU keeps the gate, its SiLU and up. The products read and write 81,920 of the elements that the layer
    moves, forward and again backward."""
    width, kv, hidden, heads = 4096, 1024, 14_336, 32
    kept = 2 * (4 * width + 4) + 2 * (2 * width + 2 * kv) + 4 * heads + 2 * 3 * hidden
    base = plain["base", None]
    assert base.saved_bytes_per_token_and_layer == kept
    assert base.base_bytes_per_token_and_layer > 2 * 2 * 81_920
    assert {c.base_bytes_per_token_and_layer for c in plain.values()} == {base.base_bytes_per_token_and_layer}


def test_an_adapter_keeps_its_groups_inputs(plain: dict[Label, Count], dropped: dict[Label, Count]) -> None:
    """Without dropout LoRA keeps the inputs of q, k, v and of o, of gate and up, and of down, which are not kept by the
    base (o's is: it is the result of attention), in bf16, and z, with ranks padded to 8 a linear. A mask made from a
    seed is not kept, so dropout changes nothing; PEFT keeps x A^T in the place of z."""
    base = plain["base", None].saved_bytes_per_token_and_layer
    own = plain["ours", "lora"].saved_bytes_per_token_and_layer - base
    assert own == 2 * (2 * 4096 + 14_336) + 2 * 7 * 8
    assert dropped["ours", "lora"].saved_bytes_per_token_and_layer - base == own
    assert plain["peft-tuned", "lora"].saved_bytes_per_token_and_layer - base == own


def test_a_storage_is_kept_once_and_weights_are_not() -> None:
    model = nn.Linear(4, 3)
    x = torch.ones(5, 4, requires_grad=True)
    with Saved(model) as saved:
        (model(x).exp() * x[:, :3]).sum()
    assert saved.bytes == 4 * (5 * 4 + 5 * 3)  # x twice, as an input and by a view; the exponential twice


def test_an_operator_is_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an operator of torch's registry does inside is counted, and its dropout is one operation there too."""
    library = torch.library.Library("rasa_train", "FRAGMENT")
    library.define("tested(Tensor x) -> Tensor")

    def tested(x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.5) + x

    library.impl("tested", tested, "CPU")
    x = torch.ones(10)
    with Counter() as whole:
        torch.ops.rasa_train.tested(x)
    monkeypatch.setitem(counters.INSIDE, "tested", tested)
    with Counter() as counter:
        torch.ops.rasa_train.tested(x)
    assert whole.ops == 1 and whole.bytes == 2 * 40
    assert counter.ops == 2 and counter.bytes == (40 + 40 + 10) + 3 * 40


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
