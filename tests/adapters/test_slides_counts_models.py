"""Exact numbers of trained parameters of the models that LoRA was published on, for full fine-tuning, BitFit and LoRA.

The head of a classifier is counted apart. The numbers are those of the architectures in transformers and PEFT.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DebertaV2Config,
    GPT2Config,
    PretrainedConfig,
    RobertaConfig,
)

from rasa_train.adapters.inject import attach
from rasa_train.adapters.registry import METHODS
from rasa_train.adapters.state import trainable
from rasa_train.models.classifier import head_parameters

ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
BASE = RobertaConfig(**ROBERTA)
LARGE = RobertaConfig(**ROBERTA, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
XXL = DebertaV2Config(
    vocab_size=128100, hidden_size=1536, num_hidden_layers=48, num_attention_heads=24, intermediate_size=6144,
    type_vocab_size=0, relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm", share_att_key=True,
    pos_att_type=["p2c", "c2p"], position_biased_input=False, conv_kernel_size=3, conv_act="gelu",
    attention_head_size=64, max_relative_positions=-1,
)  # fmt: skip
MEDIUM = GPT2Config(n_embd=1024, n_layer=24, n_head=16)
GPT2_LARGE = GPT2Config(n_embd=1280, n_layer=36, n_head=20)

FULL, BITFIT = {"method": "full"}, {"method": "bitfit"}
QV, DEBERTA_QV = ["query", "value"], ["query_proj", "value_proj"]


def lora(r: int, targets: list[str]) -> dict[str, Any]:
    return {"method": "lora", "r": r, "targets": targets}


def counts(config: PretrainedConfig, method: dict[str, Any], labels: int) -> tuple[int, int]:
    """Return the numbers of trained parameters in the layers and embeddings, and in the head."""
    config.num_labels = labels or 2
    with torch.device("meta"):
        model = (AutoModelForSequenceClassification if labels else AutoModelForCausalLM).from_config(config)
        attach(model, METHODS[method["method"]].model_validate(method))
    head = head_parameters(model)
    trained = {name: parameter.numel() for name, parameter in trainable(model).items()}
    return sum(n for name, n in trained.items() if name not in head), sum(trained[name] for name in head)


@pytest.mark.parametrize(
    ("config", "method", "labels", "expected"),
    [
        pytest.param(BASE, FULL, 2, (124_055_040, 592_130), id="RoBERTa base, FT, 2 labels"),
        pytest.param(BASE, FULL, 3, (124_055_040, 592_899), id="RoBERTa base, FT, 3 labels"),
        pytest.param(BASE, FULL, 1, (124_055_040, 591_361), id="RoBERTa base, FT, regression"),
        pytest.param(BASE, BITFIT, 2, (102_144, 592_130), id="RoBERTa base, BitFit"),
        pytest.param(BASE, lora(8, QV), 2, (294_912, 592_130), id="RoBERTa base, LoRA"),
        pytest.param(LARGE, FULL, 2, (354_310_144, 1_051_650), id="RoBERTa large, FT, 2 labels"),
        pytest.param(LARGE, FULL, 3, (354_310_144, 1_052_675), id="RoBERTa large, FT, 3 labels"),
        pytest.param(LARGE, lora(8, QV), 2, (786_432, 1_051_650), id="RoBERTa large, LoRA"),
        pytest.param(XXL, FULL, 2, (1_564_549_632, 2_360_832 + 3_074), id="DeBERTa XXL, FT"),
        pytest.param(XXL, lora(16, DEBERTA_QV), 2, (4_718_592, 2_360_832 + 3_074), id="DeBERTa XXL, LoRA"),
        pytest.param(MEDIUM, FULL, 0, (354_823_168, 0), id="GPT-2 medium, FT (printed: 354.92M)"),
        pytest.param(MEDIUM, {**FULL, "layers": [-2, -1]}, 0, (25_192_448, 0), id="GPT-2 medium, FT-Top2"),
        pytest.param(GPT2_LARGE, FULL, 0, (774_030_080, 0), id="GPT-2 large, FT"),
    ],
)
def test_exact_counts(config: PretrainedConfig, method: dict[str, Any], labels: int, expected: tuple[int, int]) -> None:
    assert counts(config, method, labels) == expected


def test_rasa_has_the_budget_of_lora_and_its_mixing_weights() -> None:
    """24 linears in 2 kinds: the pools take their ranks from the layers, and each layer has r - k + 12 k weights d."""
    budget, _ = counts(BASE, lora(8, QV), 2)
    ours, head = counts(BASE, {"method": "rasa", "r": 8, "k": 1, "targets": QV}, 2)
    assert ours == budget + 24 * (8 - 1 + 12 * 1) and head == 592_130


@pytest.mark.parametrize("layers", [[-2, -1], [10, 11]])
def test_two_last_layers_of_an_encoder(layers: list[int]) -> None:
    in_layers, head = counts(BASE, {**FULL, "layers": layers}, 2)
    one_layer = 4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
    assert (in_layers, head) == (2 * one_layer, 592_130)
