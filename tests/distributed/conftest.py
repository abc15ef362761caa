"""Groups of real processes over gloo on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

Case = dict[str, Any]
Group = Callable[[list[Case], int], None]


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Group:
    """``group(cases, workers)`` trains each recipe, in one group of processes (see ``cases.py``)."""
    cache = {"RASA_TRAIN_CACHE": str(tmp_path_factory.getbasetemp() / "cache")}

    def run(cases: list[Case], workers: int) -> None:
        path = tmp_path_factory.mktemp("group") / "cases.json"
        path.write_text(json.dumps(cases))
        program = ["-m", "tests.distributed.cases", str(path)]
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={workers}"]
        command = [sys.executable, *(torchrun if workers > 1 else []), *program]
        done = subprocess.run(command, env={**os.environ, **cache}, capture_output=True, text=True, timeout=7200)
        errors = [p.read_text() for case in cases for p in sorted(Path(case["output_dir"]).glob("error-*.txt"))]
        assert done.returncode == 0 and not errors, "\n".join([*errors[:2], done.stderr[-3000:]])

    return run


def metrics(run: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def adapter(run: str | Path) -> dict[str, Tensor]:
    return load_file(Path(run) / "adapter" / "adapter.safetensors")


def difference(one: str | Path, many: str | Path) -> dict[str, float]:
    """Largest differences of two runs: losses, gradient norms (relative), adapter entries."""
    a, b = metrics(one), metrics(many)
    assert [row["step"] for row in a] == [row["step"] for row in b]
    left, right = adapter(one), adapter(many)
    assert left.keys() == right.keys()
    return {
        "loss": max(abs(x["loss"] - y["loss"]) for x, y in zip(a, b, strict=True)),
        "grad_norm": max(abs(x["grad_norm"] / y["grad_norm"] - 1) for x, y in zip(a, b, strict=True)),
        "parameter": max(float((left[name] - right[name]).abs().max()) for name in left),
    }


RECIPE = """\
model: {{name: {model}, dtype: float32}}
adapter: {{method: rasa, r: 4, k: 1, alpha: 8, dropout: 0.1}}
data: {{dataset: {data}, validation: {{size: 4}}}}
training:
  epochs: 4
  batch_size: 8
  micro_batch_size: 2
  optimizer: {{name: adamw, lr: 1e-2}}
  checkpoint_every: 6
distributed: {{resident_size: 0, timeout_seconds: 300}}
output_dir: run
"""
STEPS = 20


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, token_rows: Path) -> Path:
    """A directory with the recipe, and a run of it on one process."""
    home = tmp_path_factory.mktemp("launch")
    (home / "recipe.yaml").write_text(RECIPE.format(model=tiny_llama, data=token_rows))
    subprocess.run(command("output_dir=one"), cwd=home, check=True, capture_output=True)
    return home


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "rasa_train.cli.train", "recipe.yaml", *options]


def start(home: Path, *options: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command(*options), cwd=home, stdout=pipe, stderr=pipe, text=True)


def reach(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Wait until the run has done ``step`` steps."""
    file = run / "metrics.jsonl"
    while not (file.exists() and file.read_text().count("\n") >= step):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
