"""rasa-bench --against-full: the bytes against sums written out by hand, and what the command prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rasa_train.bench.against_full import Settings, compare_with_full, count_against_full
from rasa_train.bench.engines import Choice
from rasa_train.bench.report import against_full_table
from tests.conftest import Cli

BYTES = {"parameters", "gradients", "optimizer", "activations", "total", "total_over_full", "trained"}


def settings(shape: str, tokens: int = 64, **other: object) -> Settings:
    fields = {"dtype": torch.float32, "dropout": 0.0, "choice": Choice(), "warmup": 1, "rounds": 2}
    return Settings(shape, tokens, **{**fields, "device": torch.device("cpu"), **other})  # type: ignore[arg-type]


def test_bytes_of_a_trained_model(tiny_llama: Path) -> None:
    """fp32: 4 bytes a weight, and 12 more a trained one; adapters train in x out ranks of the seven linears."""
    found = compare_with_full(settings(str(tiny_llama)))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    weights = sum(p.numel() for p in model.parameters())
    ranks = sum(8 * sum(p.shape) for name, p in model.named_parameters() if "proj" in name)
    full, lora, rasa = (found.memory[name] for name in ("full", "lora", "rasa"))
    assert full.trained == weights and lora.trained == ranks and rasa.trained != ranks
    buffers = full.parameters - 4 * weights
    assert 0 <= buffers < 1000, "of the rotary embedding"
    for memory in (full, lora):
        added = memory.trained if memory is lora else 0
        assert memory.parameters == 4 * (weights + added) + buffers and memory.gradients == 4 * memory.trained
        tensors = memory.optimizer - 8 * memory.trained
        assert 0 < tensors < 4 * 100, "AdamW's two states, and the step of each tensor"
        assert memory.activations > 0 and memory.total == sum(
            (memory.parameters, memory.gradients, memory.optimizer, memory.activations)
        )
    assert found.times["full"].over_full == 1 and found.times.keys() == {"full", "lora", "rasa"}
    text = against_full_table(found)
    assert max(map(len, text.splitlines())) <= 80 and f"{weights:,}" in text and "CPU us/token" in text


@pytest.mark.slow
def test_counted_for_a_model_that_is_not_there() -> None:
    """The 8B shape: published counts of parameters and of LoRA's r = 8 on all linears."""
    found = count_against_full(settings("llama-3.1-8b", 512, choice=Choice(methods=frozenset({"lora"}))))
    full, lora = found.memory["full"], found.memory["lora"]
    assert full.trained == 8_030_261_248 and lora.trained == 20_971_520
    assert (full.parameters, full.gradients, full.optimizer) == tuple(n * 8_030_261_248 for n in (4, 4, 8))
    assert lora.parameters == 2 * 8_030_261_248 + 4 * lora.trained and lora.optimizer == 8 * lora.trained
    assert full.activations > 0.5 * lora.activations > 0
    assert "bfloat16" in against_full_table(found)


@pytest.mark.slow
def test_activations_are_linear_in_tokens_and_layers(tmp_path: Path, tiny_llama: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_llama)
    config.num_hidden_layers = 6
    config.save_pretrained(tmp_path)
    kept = [
        count_against_full(settings(shape, tokens)).memory["lora"].activations
        for shape, tokens in ((str(tiny_llama), 64), (str(tiny_llama), 192), (str(tmp_path), 64))
    ]
    assert kept[1] == pytest.approx(3 * kept[0], abs=2) and kept[2] == pytest.approx(2 * kept[0], abs=2)


def test_command(tiny_llama: Path, cli: Cli) -> None:
    args = ("--against-full", "--counters", "--shape", tiny_llama, "--tokens", 64, "--methods", "rasa", "--json")
    found = json.loads(cli("bench", *args, check=True).stdout)
    assert [row["method"] for row in found["rows"]] == ["full", "rasa"] and found["rounds"] == 0
    assert all(row.keys() == {"method", *BYTES} for row in found["rows"])
    wrong = cli("bench", "--against-full", "--shape", "linears-1024")
    assert wrong.returncode == 2 and "trains a whole model" in wrong.stderr
