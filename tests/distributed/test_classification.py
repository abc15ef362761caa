"""Classifiers give the losses of one process with every strategy, and go on after a kill as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.test_classification_runs import ADAPTERS, recipe, save_base

from .conftest import Group, adapter, difference

NAMED = {
    "lora": ADAPTERS["lora"],
    "rasa": {**ADAPTERS["rasa"], "dropout": 0.1},
    "bitfit": {"method": "bitfit"},
    "full": {"method": "full", "layers": [-1]},
}


def case(home: Path, run: str, method: str, strategy: str = "ddp", **training: object) -> dict[str, Any]:
    made = recipe(home, NAMED[method], max_grad_norm=0.5, checkpoint_every=4, epochs=1, **training)
    made["distributed"] = {"strategy": strategy, "resident_size": 0, "timeout_seconds": 300}
    made["data"]["validation"] = {"size": 4}
    return {**made, "output_dir": str(home / run)}


@pytest.mark.parametrize(
    ("kind", "methods", "strategies"),
    [
        ("roberta", ["rasa"], ["ddp", "fsdp"]),
        pytest.param("roberta", ["lora", "bitfit", "full"], ["ddp", "zero1", "zero3", "fsdp"], marks=pytest.mark.slow),
        pytest.param("deberta-v2", ["rasa"], ["ddp", "zero3", "fsdp"], marks=pytest.mark.slow),
        pytest.param("llama", ["rasa"], ["ddp", "zero3", "fsdp"], marks=pytest.mark.slow),
    ],
)
def test_strategies_equal_one_process(
    kind: str, methods: list[str], strategies: list[str], tmp_path: Path, group: Group
) -> None:
    save_base(tmp_path, kind)
    group([case(tmp_path, f"{method}-one", method) for method in methods], 1)
    group([case(tmp_path, f"{method}-{s}", method, s) for method in methods for s in strategies], 2)
    for method in methods:
        head = [name for name in adapter(tmp_path / f"{method}-one") if name.startswith(("classifier.", "score."))]
        assert head
        for strategy in strategies:
            found = difference(tmp_path / f"{method}-one", tmp_path / f"{method}-{strategy}")
            assert found["loss"] < 1e-5 and found["grad_norm"] < 1e-4 and found["parameter"] < 1e-4, (method, strategy)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero3", "fsdp"])
def test_run_goes_on_from_its_checkpoint(strategy: str, tmp_path: Path, group: Group) -> None:
    save_base(tmp_path, "roberta")
    whole = case(tmp_path, "whole", "rasa", strategy)
    half = case(tmp_path, "half", "rasa", strategy)
    group([whole], 2)
    stopped = Path(half["output_dir"])
    import shutil

    shutil.copytree(tmp_path / "whole", stopped)  # as a kill after step 6 leaves it: with the checkpoint of step 4
    for later in (stopped / "checkpoints").iterdir():
        if later.name > "step-00000004":
            shutil.rmtree(later)
    shutil.rmtree(stopped / "adapter")
    (stopped / "summary.json").unlink(missing_ok=True)
    rest = case(tmp_path, "rest", "rasa", strategy)
    group([{**rest, "continues": str(stopped)}], 2)
    found = difference(tmp_path / "whole", tmp_path / "rest")
    assert found["loss"] == 0 and found["parameter"] == 0
