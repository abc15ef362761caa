"""Classifiers give the losses of one process with every strategy, and go on from a checkpoint as if never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import run_command
from tests.test_classification_runs import ADAPTERS, recipe, save_base

from .conftest import Group, adapter, difference, metrics

NAMED = {
    "lora": ADAPTERS["lora"],
    "rasa": {**ADAPTERS["rasa"], "dropout": 0.1},
    "bitfit": {"method": "bitfit"},
    "full": {"method": "full", "layers": [-1]},
}
FEW = {"roberta": {"rasa": ["fsdp"]}}
MANY = {
    "roberta": {
        "rasa": ["ddp", "zero3"],
        "lora": ["zero1", "zero3"],
        "bitfit": ["zero3", "fsdp"],
        "full": ["zero3", "fsdp"],
    },
    "deberta-v2": {"rasa": ["ddp", "zero3", "fsdp"]},
    "llama": {"rasa": ["ddp", "zero3", "fsdp"]},
}


def case(home: Path, run: str, method: str, strategy: str = "ddp", **training: object) -> dict[str, Any]:
    made = recipe(home, NAMED[method], max_grad_norm=0.5, checkpoint_every=4, **training)
    made["distributed"] = {"strategy": strategy, "resident_size": 0, "timeout_seconds": 300}
    made["data"]["validation"] = {"size": 4}
    return {**made, "output_dir": str(home / run)}


@pytest.mark.parametrize("cases", [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)])
def test_strategies_equal_one_process(cases: dict[str, dict[str, list[str]]], tmp_path: Path, group: Group) -> None:
    many, pairs = [], []
    for kind, methods in cases.items():
        home = tmp_path / kind
        home.mkdir()
        save_base(home, kind)
        for method, strategies in methods.items():
            one = case(home, f"{method}-one", method)
            (home / "one.yaml").write_text(yaml.safe_dump(one))
            run_command("train", home / "one.yaml", check=True)
            assert any(name.startswith(("classifier.", "score.")) for name in adapter(one["output_dir"]))
            for strategy in strategies:
                many.append(case(home, f"{method}-{strategy}", method, strategy))
                half = case(home, f"{method}-{strategy}-half", method, strategy, max_steps=5)
                rest = case(home, f"{method}-{strategy}-rest", method, strategy)
                many += [half, {**rest, "continues": half["output_dir"]}]
                pairs += [(one, many[-3]), (one, rest)]
                assert len(metrics(one["output_dir"])) > 5
    group(many, 2)
    for one, other in pairs:
        found = difference(one["output_dir"], other["output_dir"])
        assert found["loss"] < 1e-5, other["output_dir"]
        assert found["grad_norm"] < 1e-4 and found["parameter"] < 1e-4, (other["output_dir"], found)
