"""No worker ever holds the model: measured on real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

MIB = 2**20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 41M parameters: 156 MiB in fp32, 37 in each of 4 layers, 7 in the largest tensor. It is in bf16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=1024,
        intermediate_size=1792,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    path = tmp_path_factory.mktemp("base")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_parts_are_all_a_worker_holds(strategy: str, base: Path, tmp_path: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peaks are read from Linux's /proc")
    recipe = {
        "model": {"name": str(base), "dtype": "float32"},
        "adapter": {"method": "full"},
        "data": {"dataset": "none.jsonl"},
        "training": {"optimizer": {"name": "adamw", "lr": 1e-4}},
        "distributed": {"strategy": strategy, "timeout_seconds": 120},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    program = ["-m", "tests.distributed.memory", str(tmp_path / "recipe.json")]
    # Freed memory goes back to the system at once, so that what is counted is what is used.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([*torchrun, *program], env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / "run" / f"memory-{rank}.json").read_text()) for rank in (0, 1))
    files = sorted((tmp_path / "run" / "checkpoints" / "step-00000001").glob("*.safetensors"))
    whole = sum(path.stat().st_size for path in files)
    assert len(files) == 4 and whole > 3 * 156 * MIB, "weights and two moments"
    tensors = [tensor for path in files for tensor in shapes(path)]
    largest = max(tensors)
    # One tensor is gathered, and copied once under ZeRO; the rest is what exchanges take for themselves.
    assert max(first["save"], second["save"]) < 4 * largest + 16 * MIB < whole / 8, (first, second)
    if strategy == "fsdp":  # half of the model, and one layer
        assert second["load"] < (156 / 2 + 37 + 16) * MIB < 156 * MIB, second


def shapes(path: Path) -> list[int]:
    with safe_open(path, "pt") as file:
        return [4 * file.get_tensor(name).numel() for name in file.keys()]  # noqa: SIM118 - no mapping
