"""Public reports on training loops: gradients that do not arrive, averages, resuming, losses that are not finite."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from rasa_train.data.batching import plan_epoch
from rasa_train.distributed.config import DistributedConfig
from rasa_train.distributed.ddp import DataParallel
from tests.conftest import Cli

Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(cli: Cli, tmp_path: Path, tiny_llama: Path, token_rows: Path) -> Run:
    """Train the tiny Llama with LoRA for two steps. Returns the rows of the metrics."""

    def run(**training: object) -> list[dict[str, Any]]:
        schedule = {"schedule": {"name": "constant", "warmup_ratio": 0.0}}
        recipe = {
            "model": {"name": str(tiny_llama), "dtype": "float32"},
            "adapter": {"method": "lora", "r": 4, "alpha": 8},
            "data": {"dataset": str(token_rows)},
            "training": {"max_steps": 2, "batch_size": 8, "optimizer": {"lr": 2e-2}, **schedule, **training},
            "output_dir": "run",
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        cli("train", "recipe.yaml", "--fresh", check=True)
        return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]

    return run


def zeros_in_b(run: Path) -> list[str]:
    tensors = load_file(run / "adapter" / "adapter.safetensors")
    return [name for name, tensor in tensors.items() if name.endswith(".B") and not tensor.any()]


def test_checkpointing_leaves_adapters_without_a_gradient(run: Run, tmp_path: Path) -> None:
    """microsoft/LoRA#120: with gradient checkpointing all gradients of a LoRA were None, and nothing was trained.

    Here: layers are recomputed in the way that needs no gradient of its input, and every B has moved.
    """
    run(activation_checkpointing=True)
    assert zeros_in_b(tmp_path / "run") == []


def test_checkpointing_with_offload_trains_nothing(run: Run, tmp_path: Path) -> None:
    """ostris/ai-toolkit#1054: a LoRA trained for 2,000 steps with finite losses while its B stayed zero, through
    checkpointing and offloading together.

    Here: both together train every B; and a run in which no adapter moves ends at its first step.
    """
    run(activation_checkpointing=True, activation_offload=True)
    assert zeros_in_b(tmp_path / "run") == []


def test_checkpointing_changes_the_result(run: Run) -> None:
    """huggingface/transformers#26221: a run with gradient checkpointing had other losses than one without.

    Here: losses and gradient norms are equal to rounding.
    """
    plain, recomputed = run(), run(activation_checkpointing=True)
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in recomputed] == pytest.approx([row[key] for row in plain], rel=1e-6)


def test_accumulation_favours_short_rows(run: Run) -> None:
    """ml-explore/mlx-lm#1413: gradients of micro-batches were averaged as they were, so that tokens of short examples
    weighed more than those of long ones.

    Here: the loss is the mean over the tokens of the whole batch, however the batch is divided.
    """
    whole, divided = run(micro_batch_size=8), run(micro_batch_size=1)
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in divided] == pytest.approx([row[key] for row in whole], rel=1e-5)


def test_resuming_repeats_the_order_of_the_first_epoch() -> None:
    """modelscope/ms-swift#10050: a run that was resumed in its second epoch went through the order of the first epoch,
    and trained again on examples that the epoch had had.

    Here: the order is a function of the seed and the epoch alone, whatever was done before, and epochs differ.
    """
    lengths = np.arange(40) % 7 + 3
    batching: Any
    for batching in ("length-grouped", "shuffled", "packed"):
        plans = [plan_epoch(lengths, batching=batching, batch_size=8, seed=1, epoch=epoch) for epoch in (0, 1, 1)]
        first, second, again = (np.concatenate(plan) for plan in plans)
        assert np.array_equal(second, again) and not np.array_equal(first, second)
        assert sorted(second) == list(range(40))


def test_a_loss_that_is_not_a_number_ruins_the_weights() -> None:
    """karpathy/nanoGPT#167: after thousands of steps one loss was not a number, and from then on no weight was.

    Here: such a step changes neither the weights nor the optimizer's state, and is counted as skipped.
    """
    weight = torch.nn.Parameter(torch.ones(3))
    module = torch.nn.Module()
    module.register_parameter("weight", weight)
    engine = DataParallel(DistributedConfig(), Accelerator(cpu=True), 1.0)
    engine.prepare(module, lambda parameters: torch.optim.AdamW(parameters, lr=0.1))
    for bad in (math.nan, math.inf):
        engine.backward((weight * bad).sum(), last=True)
        assert not math.isfinite(engine.step(bad))
        engine.zero_grad()
        assert torch.equal(weight, torch.ones(3)) and engine.optimizer_state(weight) == {}
    engine.backward(weight.sum(), last=True)
    engine.step(3.0)
    assert not torch.equal(weight, torch.ones(3))
