"""Trained parameters of the baselines and of LoRA on GPT-2 and GPT-3, as integers, against the LoRA paper's figures
(arXiv 2106.09685, tables 2 to 5) where those can be reproduced. Heads of classifiers are left out, as there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from rasa_train.adapters.contract import Method
from rasa_train.adapters.inject import adapt
from rasa_train.adapters.state import trainable
from rasa_train.methods.bitfit import BitFit
from rasa_train.methods.bottleneck import Bottleneck
from rasa_train.methods.from_peft import Peft
from rasa_train.methods.full import Full
from rasa_train.methods.lora import LoRA

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "RoB-base": ("roberta", {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}),
    "RoB-large": (
        "roberta",
        {
            **{"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "hidden_size": 1024},
            **{"num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        },
    ),
    "GPT-2 M": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "GPT-2 L": ("gpt2", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "GPT-3": ("gpt2", {"n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048}),
}


def H(size: int) -> Method:
    return Bottleneck(kind="houlsby", size=size)


def L(size: int) -> Method:
    return Bottleneck(kind="lin", size=size)


def P(size: int) -> Method:
    return Bottleneck(kind="pfeiffer", size=size)


def qv(r: int, targets: tuple[str, ...] = ("wq", "wv")) -> Method:
    return LoRA(r=r, targets=list(targets))


def peft(kind: str, tokens: int) -> Method:
    return Peft(config={"peft_type": kind, "num_virtual_tokens": tokens})


def prefix(tokens: int) -> Method:
    """Prefix tuning has keys and values: two vectors for each token in each layer, where the paper counts one."""
    return peft("PREFIX_TUNING", tokens)


# (model, method, exact number, millions as printed)
REPRODUCED: dict[str, tuple[str, Method, int, str]] = {
    "RoB-base AdptD, 16 wide": ("RoB-base", P(16), 304_320, "0.3"),
    "RoB-base AdptD, last 4 layers": (
        *("RoB-base", Bottleneck(kind="dropped", size=48, layers=[-4, -3, -2, -1]), 298_176, "0.3"),
    ),
    "RoB-base AdptD, 48 wide": ("RoB-base", P(48), 894_528, "0.9"),
    "RoB-large AdptP, 16 wide": ("RoB-large", P(16), 811_392, "0.8"),
    "RoB-large AdptH, 8 wide": ("RoB-large", H(8), 835_968, "0.8"),
    "GPT-2 M AdapterL, 6 wide": ("GPT-2 M", L(6), 368_784, "0.37"),
    "GPT-2 M AdapterL, 224 wide": ("GPT-2 M", L(224), 11_089_152, "11.09"),
    "GPT-2 M FT-Top2": ("GPT-2 M", Full(layers=[-2, -1]), 25_192_448, "25.19"),
    "GPT-2 L FT": ("GPT-2 L", Full(), 774_030_080, "774.03"),
    "GPT-2 L AdapterL, 8 wide": ("GPT-2 L", L(8), 875_808, "0.88"),
    "GPT-2 L AdapterL, 248 wide": ("GPT-2 L", L(248), 23_002_848, "23.00"),
    "GPT-3 LoRA, r 1": ("GPT-3", qv(1), 4_718_592, "4.7"),
    "GPT-3 LoRA, r 8": ("GPT-3", qv(8), 37_748_736, "37.7"),
    "GPT-3 AdapterH, 1 wide": ("GPT-3", H(1), 7_078_080, "7.1"),
    "GPT-3 AdapterH, 8 wide": ("GPT-3", H(8), 40_109_568, "40.1"),
    "GPT-3 PreEmbed, 264 tokens": ("GPT-3", peft("PROMPT_TUNING", 264), 3_244_032, "3.2"),
}
NOT_REPRODUCED: dict[str, tuple[str, Method, int, str]] = {
    "RoB-large AdptP, 64 wide (3.0 is 3 x 2^20, the weights without the biases)": (
        *("RoB-large", P(64), 3_171_840, "3.0"),
    ),
    "RoB-large AdptH, 64 wide (6.0 is 6 x 2^20)": ("RoB-large", H(64), 6_343_680, "6.0"),
    "GPT-2 M FT": ("GPT-2 M", Full(), 354_823_168, "354.92"),
    "GPT-2 M AdapterH, 112 wide": ("GPT-2 M", H(112), 11_064_576, "11.09"),
    "GPT-2 M PreLayer, 14 tokens of the paper": ("GPT-2 M", prefix(7), 344_064, "0.35"),
    "GPT-2 M LoRA, r 4": ("GPT-2 M", qv(4), 393_216, "0.35"),
    "GPT-2 L PreLayer, 16 tokens of the paper": ("GPT-2 L", prefix(8), 737_280, "0.77"),
    "GPT-2 L LoRA, r 4": ("GPT-2 L", qv(4), 737_280, "0.77"),
    "GPT-3 FT": ("GPT-3", Full(), 174_604_259_328, "175255.8"),
    "GPT-3 BitFit (11 d in each block, d in the last norm)": ("GPT-3", BitFit(), 12_976_128 + 12_288, "14.2"),
    "GPT-3 PreLayer, 16 tokens of the paper": ("GPT-3", prefix(8), 18_874_368, "20.2"),
}
BUDGET: dict[str, tuple[str, Method, int, str]] = {
    f"GPT-3 LoRA on {' '.join(targets)}, r {r}": ("GPT-3", qv(r, targets), 18_874_368, "18")
    for r, *targets in [
        *((8, "wq"), (8, "wk"), (8, "wv"), (8, "wo"), (4, "wq", "wk"), (4, "wq", "wv"), (2, "wq", "wk", "wv", "wo")),
    ]
}
"""The paper's table 5: 18M in every column."""


def meta(name: str) -> PreTrainedModel:
    kind, fields = SHAPES[name]
    make = AutoModel if kind == "roberta" else AutoModelForCausalLM
    with torch.device("meta"):
        model: PreTrainedModel = make.from_config(AutoConfig.for_model(kind, **fields))
    return model


def count(name: str, method: Method) -> int:
    with torch.device("meta"):
        model, _ = adapt(meta(name), method)
    return sum(parameter.numel() for parameter in trainable(model).values())


def printed(number: int, figure: str) -> str:
    """The number in millions, rounded to the figure's digits; the table of 18M cuts them off."""
    digits = len(figure.partition(".")[2])
    return f"{number / 1e6:.{digits}f}" if digits else str(number // 10**6)


@pytest.mark.parametrize("row", [*REPRODUCED, *BUDGET])
def test_counted_as_printed(row: str) -> None:
    model, method, exact, figure = (REPRODUCED | BUDGET)[row]
    assert count(model, method) == exact and printed(exact, figure) == figure


@pytest.mark.parametrize("row", NOT_REPRODUCED)
def test_counted_but_printed_otherwise(row: str) -> None:
    model, method, exact, figure = NOT_REPRODUCED[row]
    assert count(model, method) == exact and printed(exact, figure) != figure
