"""Run directories as training and evaluation leave them: made in a moment, with curves that are known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rasa_train.adapters.registry import METHODS
from rasa_train.adapters.saved import write_adapter
from rasa_train.recipe.load import dump_recipe, load_recipe

STEPS, EPOCHS, LAYERS, R, K = 40, 4, 6, 4, 1
MakeRun = Callable[..., Path]


def loss_at(step: int, floor: float, seed: int) -> float:
    return floor + 3 * math.exp(-step / 8) + 0.02 * math.sin(7 * step + seed)


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """make_run(name, *overrides, steps=..., floor=..., complete=..., scores=...) -> its directory."""
    return lambda name, *overrides, **options: write_run(tmp_path / name, *overrides, **options)


def write_run(
    path: Path, *overrides: str, steps: int = STEPS, floor: float = 0.5, complete: bool = True, scores: bool = True
) -> Path:
    recipe = load_recipe("demo", [f"adapter.r={R}", "training.epochs=4", *overrides, f'output_dir="{path}"']).recipe
    (path / "checkpoints").mkdir(parents=True)
    (path / "recipe.yaml").write_text(dump_recipe(recipe))
    rows = [
        {
            "step": step,
            "epoch": step * EPOCHS / STEPS,
            "loss": loss_at(step, floor, recipe.seed),
            "lr": 1e-3,
            "grad_norm": 1 / step,
            "tokens": 1000 + step,
            "supervised_tokens": 500,
            "tokens_per_second": 2000.0,
            "peak_memory_bytes": 1 << 30,
            "seconds": 0.5,
        }
        for step in range(1, steps + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if complete:
        save_adapter(path / "adapter", recipe.adapter.model_dump())
        summary = {
            "method": recipe.adapter.method,
            "trainable_parameters": 1234,
            "steps": steps,
            "loss": rows[-1]["loss"],
        }
        (path / "summary.json").write_text(json.dumps({**summary, "effective_rank": {"self_attn.q_proj": 9}}))
    if scores:
        for epoch in range(1, steps * EPOCHS // STEPS + 1):
            step = epoch * STEPS // EPOCHS
            write_score(path, "math", f"step-{step:08d}", step, epoch, {"exact_match": 1 - floor - 0.3 / epoch})
            write_score(path, "forgetting", f"step-{step:08d}", step, epoch, {"loss": 2 + floor * epoch / 10})
    return path


def write_score(run: Path, suite: str, name: str, step: int, epoch: float, metrics: dict[str, float]) -> None:
    file = run / "evaluation" / suite / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    result = {"suite": suite, "checkpoint": name, "step": step, "epoch": epoch, "metrics": metrics}
    file.write_text(json.dumps(result))


def save_adapter(directory: Path, fields: dict[str, Any]) -> None:
    """An adapter of LAYERS layers, one kind. The d of RaSA's pool at (layer, rank) is layer + rank / 10."""
    directory.mkdir()
    tensors: dict[str, torch.Tensor] = {"pools.self_attn__q_proj.A_S": torch.zeros(LAYERS * K, 8)}
    for layer in range(LAYERS):
        shared = -(layer + torch.arange(LAYERS * K) / 10)
        tensors[f"model.layers.{layer}.self_attn.q_proj.d"] = torch.cat([torch.full((R - K,), 9.0), shared])
    method = METHODS[fields["method"]].model_validate(fields)
    write_adapter(
        directory, method, tensors if fields["method"] == "rasa" else {}, base_model="demo", base_revision=None
    )
