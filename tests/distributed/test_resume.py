"""A run goes on from its checkpoint whichever way the workers share the model, then and now, and whatever its sizes.

No size here divides by 2 or by 3, so that the parts of the workers are of several sizes, and some are empty.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from .conftest import Case, Group, difference
from .test_parity import OTHERS, STRATEGIES, TOLERANCE, assert_equal

METHODS: dict[str, dict[str, Any]] = {
    **OTHERS,
    "rasa": {"r": 5, "k": 1, "alpha": 5, "dropout": 0.1},
    "lora": {"r": 5, "alpha": 5, "dropout": 0.1},
    "vera": {"r": 7},
    "mora": {"r": 5},
    "vb-lora": {"vector_length": 5},
    "olora": {"r": 5, "alpha": 5},
    "pissa": {"r": 5},
    "dora": {"r": 5},
}
START, END = 2, 5
"""Steps of the run that is interrupted, and of the whole run."""


def odd_llama(directory: Path, *, tied: bool, deep: bool) -> Path:
    """A random Llama, 3 layers or, if ``deep``, the 32 of an 8B model: RaSA of rank 8 then has a ``d`` of 39 entries."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=67,
        hidden_size=35,
        intermediate_size=25,
        num_hidden_layers=32 if deep else 3,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=2 if deep else 6,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=tied,
    )
    path = directory / f"{'deep' if deep else 'odd'}-{'tied' if tied else 'untied'}"
    LlamaForCausalLM(config).save_pretrained(path)
    return path


class Runs:
    """Runs of one recipe: undisturbed on one worker, and interrupted, on any number of workers."""

    def __init__(self, path: Path, rows: Path, model: Path, method: str, optimizer: str = "adamw") -> None:
        self.path = path / f"{model.name}-{method}-{optimizer}"
        self.name = self.path.name
        rate = {"lionw": 1e-3, "adamw": 1e-2}[optimizer] / (20 if method == "full" else 1)
        ranks = {"r": 8} if model.name.startswith("deep") and "r" in METHODS[method] else {}
        self.recipe: Case = {
            "model": {"name": str(model), "dtype": "float32"},
            "data": {"dataset": str(rows), "validation": {"size": 2}},
            "adapter": {"method": method, **METHODS[method], **ranks},
            "training": {
                "batch_size": 8,
                "micro_batch_size": 4,
                "optimizer": {"name": optimizer, "lr": rate},
                "schedule": {"name": "constant", "warmup_steps": 0},
                "checkpoint_every": 100,
            },
        }

    def run(self, directory: str, steps: int, strategy: str = "ddp", **more: Any) -> Case:
        distributed = {"strategy": strategy, "resident_size": 0, "timeout_seconds": 60, **more}
        training = {**self.recipe["training"], "max_steps": steps}
        return {
            **self.recipe, "training": training, "distributed": distributed, "output_dir": str(self.path / directory)
        }

    def whole(self) -> Case:
        return self.run("whole", END)

    def begun(self, strategy: str, workers: int = 2, **more: Any) -> Case:
        return self.run(f"{strategy}-{workers}", START, strategy, **more)

    def resumed(self, begun: Case, strategy: str, workers: int = 2, **more: Any) -> Case:
        directory = f"{Path(begun['output_dir']).name}-then-{strategy}-{workers}"
        return {**self.run(directory, END, strategy, **more), "continues": begun["output_dir"]}

    def differences(self, resumed: list[Case]) -> dict[str, dict[str, float]]:
        """The differences of each run from the undisturbed one."""
        return {
            f"{self.name} {Path(run['output_dir']).name}": difference(self.path / "whole", run["output_dir"])
            for run in resumed
        }


def pairs(runs: Runs, workers: int) -> tuple[list[Case], list[Case]]:
    """A run begun with each strategy, and each of them resumed with each strategy."""
    begun = {strategy: runs.begun(strategy, workers) for strategy in STRATEGIES}
    resumed = [runs.resumed(begun[a], b, workers) for a, b in itertools.product(STRATEGIES, STRATEGIES)]
    return list(begun.values()), resumed


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("deep", "optimizer"), [(False, "adamw"), (False, "lionw"), (True, "adamw")])
def test_every_strategy_goes_on_from_every_strategy(
    deep: bool, optimizer: str, tied: bool, workers: int, token_rows: Path, group: Group, tmp_path: Path
) -> None:
    runs = Runs(tmp_path, token_rows, odd_llama(tmp_path, tied=tied, deep=deep), "rasa", optimizer)
    begun, resumed = pairs(runs, workers)
    group([runs.whole()], 1)
    group([*begun, *resumed], workers)
    assert_equal(runs.differences(resumed))
