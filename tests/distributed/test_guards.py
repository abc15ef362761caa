"""A number that is not finite on one worker: all of them skip the step, and stay equal."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from .conftest import Case, Group, adapter, command, metrics

STRATEGIES: list[dict[str, Any]] = [
    {"strategy": "ddp"},
    {"strategy": "zero1"},
    {"strategy": "zero2"},
    {"strategy": "zero2", "offload": "optimizer"},
    {"strategy": "zero3"},
    {"strategy": "zero3", "resident_size": 0},
    {"strategy": "zero3", "resident_size": 0, "offload": "all"},
    {"strategy": "fsdp"},
]
POISON = 63
"""A token that the rows do not use; its embedding is not a number."""


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, token_rows: Path) -> Case:
    """One of the 40 rows has the poison in it: one worker meets it, in one step of each epoch."""
    here = tmp_path_factory.mktemp("poisoned")
    shutil.copytree(tiny_llama, here / "model")
    weights = load_file(here / "model" / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = torch.nan
    save_file(weights, here / "model" / "model.safetensors", metadata={"format": "pt"})
    rows = [json.loads(line) for line in token_rows.read_text().splitlines()]
    assert not any(POISON in row["input_ids"] for row in rows)
    rows[17]["input_ids"][0] = POISON
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"name": str(here / "model"), "dtype": "float32"},
        "adapter": {"method": "rasa", "r": 4, "k": 1},
        "data": {"dataset": str(here / "rows.jsonl")},
        "training": {
            "epochs": 2,
            "batch_size": 8,
            "micro_batch_size": 2,
            "optimizer": {"name": "adamw", "lr": 1e-2},
            "batching": "shuffled",
        },
    }


@pytest.mark.parametrize(
    "strategies",
    [STRATEGIES[:1] + STRATEGIES[4:5], pytest.param(STRATEGIES, marks=pytest.mark.slow)],
    ids=["two", "all"],
)
def test_one_worker_meets_it_and_all_skip(
    strategies: list[dict[str, Any]], poisoned: Case, group: Group, tmp_path: Path
) -> None:
    """The steps before and after are those of one process: no worker has updated, or kept a gradient, on its own."""
    group([{**poisoned, "output_dir": str(tmp_path / "one")}], 1)
    cases = [
        {**poisoned, "distributed": {"timeout_seconds": 300, **how}, "output_dir": str(tmp_path / str(i))}
        for i, how in enumerate(strategies)
    ]
    group(cases, 2)
    one = metrics(tmp_path / "one")
    assert [row["skipped"] for row in one].count(1) == 2 and len(one) == 10 and not one[0]["skipped"]
    for i, how in enumerate(strategies):
        many = metrics(tmp_path / str(i))
        assert [row["skipped"] for row in many] == [row["skipped"] for row in one], how
        for key in ("loss", "grad_norm"):
            a, b = ([row[key] for row in rows if not row["skipped"]] for rows in (one, many))
            assert a == pytest.approx(b, rel=1e-3), (how, key)
        left, right = adapter(tmp_path / "one"), adapter(tmp_path / str(i))
        assert left.keys() == right.keys()
        assert max(float((left[name] - right[name]).abs().max()) for name in left) < 1e-4, how
    # The run does depend on it: with the poison taken for a step like any other, everything after it would be NaN.
    assert len({row["loss"] for row in one if not row["skipped"]}) == 8


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_steps_that_go_on_failing_end_the_run_on_all(strategy: str, poisoned: Case, tmp_path: Path) -> None:
    """Through the command, each row poisoned: one message, exit code 2, and the batch for a look."""
    (tmp_path / "recipe.yaml").write_text(json.dumps({**poisoned, "output_dir": "run"}))
    rows = tmp_path / "rows.jsonl"
    one = json.dumps({"input_ids": [1, POISON, 5, 2], "labels": [-100, POISON, 5, 2]})
    rows.write_text(f"{one}\n" * 40)
    options = [f"data.dataset={rows}", "training.max_skipped=3", f"distributed.strategy={strategy}", "--nproc", "2"]
    done = subprocess.run(command(*options), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("error: ") == 1 and "steps in a row was not finite" in done.stderr
    assert [row["skipped"] for row in metrics(tmp_path / "run")] == [1, 1]
    kept = json.loads((tmp_path / "run" / "skipped" / "step-00000003.json").read_text())
    assert [row["input_ids"] for row in kept["examples"]] == [[1, POISON, 5, 2]] * 8
