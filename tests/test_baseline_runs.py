"""Runs of bottleneck adapters and of adapters on parts of a fused linear: they learn, and go on as if not stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from rasa_train.io.run_dir import RunDirectory
from rasa_train.recipe.schema import Recipe
from rasa_train.stop import StopSignal
from rasa_train.training.run import run

ADAPTERS: dict[str, dict[str, Any]] = {
    "lin": {"method": "bottleneck", "kind": "lin", "size": 4, "dropout": 0.1},
    "houlsby": {"method": "bottleneck", "kind": "houlsby", "size": 4},
    "parts": {"method": "rasa", "r": 4, "targets": ["c_attn.q", "c_attn.v"], "dropout": 0.1},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_learns_and_resumes(name: str, token_rows: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    recipe = Recipe.model_validate(
        {
            "model": {"name": str(tmp_path / "base"), "dtype": "float32"},
            "adapter": ADAPTERS[name],
            "data": {"dataset": str(token_rows), "cache_dir": str(tmp_path / "cache")},
            "training": {
                **{"max_steps": 12, "batch_size": 8, "micro_batch_size": 4, "checkpoint_every": 6},
                "optimizer": {"name": "adamw", "lr": 1e-2},
            },
            "output_dir": str(tmp_path / "run"),
        }
    )

    def train() -> dict[str, torch.Tensor]:
        RunDirectory(recipe.output_dir).create()
        with StopSignal() as stop:
            run(recipe, stop)
        return load_file(tmp_path / "run/adapter/adapter.safetensors")

    whole = train()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 12 and sum(losses[-3:]) < sum(losses[:3]) - 0.02
    assert whole and all(tensor.dtype == torch.float32 and tensor.any() for tensor in whole.values())
    for path in ("adapter", "checkpoints/step-00000012"):
        shutil.rmtree(tmp_path / "run" / path)
    (tmp_path / "run/summary.json").unlink()
    again = train()
    assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)
