"""A run goes on from its checkpoint whichever way the workers share the model, then and now, and whatever its sizes.

Hidden and feed-forward size, vocabulary and ranks divide neither by 2 nor by 3, so that the parts of the workers are of
several sizes, and some are empty.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rasa_train.merging.merged import merge

from .conftest import Case, Group, command, difference, metrics, reach, start
from .test_launch import PATIENCE, workers_of
from .test_parity import OTHERS, STRATEGIES, assert_equal

METHODS: dict[str, dict[str, Any]] = {
    **{method: options for method, options in OTHERS.items() if method != "vb-lora"},  # wants a common divisor
    "rasa": {"r": 5, "k": 1, "alpha": 5, "dropout": 0.1},
    "lora": {"r": 5, "alpha": 5, "dropout": 0.1},
    "vera": {"r": 7},
    "mora": {"r": 5},
    "olora": {"r": 5, "alpha": 5},
    "pissa": {"r": 5},
    "dora": {"r": 5},
}
START, END = 2, 5
"""Steps of the run that is interrupted, and of the whole run."""


def odd_llama(directory: Path, *, tied: bool, deep: bool) -> Path:
    """A random Llama of 3 layers or, if ``deep``, the 32 of an 8B model: RaSA of rank 8 has a ``d`` of 39 entries."""
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
        # The size of a gradient does not limit a step of AdamW or Lion: at a rate of 1e-2, rounding alone moved entries
        # by up to 1e-4.
        rate = 5e-4 if method == "full" else 1e-3
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

    def without_dropout(self) -> Runs:
        """A mask belongs to a micro-batch: three or eight workers make other ones of a batch of 8 than one or two."""
        self.recipe["adapter"]["dropout"] = 0.0
        return self

    def run(self, directory: str, steps: int, strategy: str = "ddp", **more: Any) -> Case:
        distributed = {"strategy": strategy, "resident_size": 0, "timeout_seconds": 300, **more}
        training = {**self.recipe["training"], "max_steps": steps}
        return {
            **self.recipe,
            "training": training,
            "distributed": distributed,
            "output_dir": str(self.path / directory),
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
        for run in resumed:
            rows = metrics(run["output_dir"])
            assert rows[:START] == metrics(run["continues"]), "the run did not begin again"
        return {
            f"{self.name} {Path(run['output_dir']).name}": difference(self.path / "whole", run["output_dir"])
            for run in resumed
        }


def test_runs_of_odd_sizes_with_tied_embeddings_go_on(token_rows: Path, group: Group, tmp_path: Path) -> None:
    """The few cases of the matrix below that need all that is special about these sizes, in one group of workers. Two
    workers without division stand for one: test_parity compares the two."""
    runs = Runs(tmp_path, token_rows, odd_llama(tmp_path, tied=True, deep=False), "rasa")
    zero1, zero3, fsdp = (runs.begun(strategy) for strategy in ("zero1", "zero3", "fsdp"))
    resumed = [runs.resumed(zero3, "zero3"), runs.resumed(zero1, "fsdp"), runs.resumed(fsdp, "zero3")]
    group([runs.whole(), zero1, zero3, fsdp, *resumed], 2)
    assert_equal(runs.differences(resumed))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("deep", "optimizer", "workers"),
    # Lion takes the sign of a gradient: the order in which three workers add would be seen.
    [(False, "adamw", 2), (False, "lionw", 2), (True, "adamw", 2), (False, "adamw", 3), (True, "adamw", 3)],
)
def test_every_strategy_goes_on_from_every_strategy(
    deep: bool, optimizer: str, tied: bool, workers: int, token_rows: Path, group: Group, tmp_path: Path
) -> None:
    runs = Runs(tmp_path, token_rows, odd_llama(tmp_path, tied=tied, deep=deep), "rasa", optimizer)
    if workers > 2:
        runs.without_dropout()
    begun = {strategy: runs.begun(strategy, workers) for strategy in STRATEGIES}
    resumed = [runs.resumed(begun[a], b, workers) for a, b in itertools.product(STRATEGIES, STRATEGIES)]
    group([runs.whole()], 1)
    group([*begun.values(), *resumed], workers)
    assert_equal(runs.differences(resumed))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero3", "fsdp"])
def test_other_numbers_of_workers_go_on(strategy: str, token_rows: Path, group: Group, tmp_path: Path) -> None:
    """On eight workers some have no part of a ``d`` of 7 entries."""
    runs = Runs(tmp_path, token_rows, odd_llama(tmp_path, tied=True, deep=False), "rasa").without_dropout()
    two, three, eight = (runs.begun(strategy, workers) for workers in (2, 3, 8))
    to_one = [runs.resumed(begun, "ddp", 1) for begun in (three, eight)]
    to_two = [runs.resumed(begun, strategy, 2) for begun in (three, eight)]
    to_eight = [runs.resumed(begun, to, 8) for begun in (two, eight) for to in ("zero2", "zero3", "fsdp")]
    group([two], 2)
    group([three], 3)
    group([eight, *to_eight], 8)
    group(to_two, 2)
    group([runs.whole(), *to_one], 1)
    assert_equal(runs.differences([*to_one, *to_two, *to_eight]))


@pytest.mark.slow
def test_a_run_in_host_memory_goes_on(token_rows: Path, group: Group, tmp_path: Path) -> None:
    runs = Runs(tmp_path, token_rows, odd_llama(tmp_path, tied=True, deep=False), "rasa")
    ways = {"zero1": "optimizer", "zero2": "optimizer", "zero3": "all", "fsdp": "all"}
    begun = [runs.begun(strategy, offload=offload) for strategy, offload in ways.items()]
    resumed = [runs.resumed(one, to, offload=ways[to]) for one in begun for to in ways]
    group([runs.whole()], 1)
    group([*begun, *resumed], 2)
    assert_equal(runs.differences(resumed))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_and_merges(
    method: str, tied: bool, token_rows: Path, group: Group, tmp_path: Path
) -> None:
    """Those that train base weights (full, bitfit) or start from them (pissa, olora, dora) included: the adapter and
    the merged model are those of one process."""
    runs = Runs(tmp_path, token_rows, odd_llama(tmp_path, tied=tied, deep=False), method)
    begun = {strategy: runs.begun(strategy) for strategy in STRATEGIES[1:]}
    steps = [("zero1", "zero3"), ("zero2", "fsdp"), ("zero3", "zero3"), ("zero3", "fsdp"), ("fsdp", "fsdp")]
    resumed = [runs.resumed(begun[a], b) for a, b in [*steps, ("fsdp", "zero2")]]
    group([runs.whole()], 1)
    group([*begun.values(), *resumed], 2)
    assert_equal(runs.differences(resumed))
    merged = []
    for directory in (runs.path / "whole", *(Path(run["output_dir"]) for run in resumed)):
        merge(directory / "adapter", directory / "merged")
        merged.append(load_file(directory / "merged" / "model.safetensors"))
    for other in merged[1:]:
        assert other.keys() == merged[0].keys()
        assert all(float((other[name] - merged[0][name]).abs().max()) < 1e-4 for name in other)


@pytest.mark.slow
def test_files_that_hold_two_values_for_tied_embeddings(token_rows: Path, group: Group, tmp_path: Path) -> None:
    """config.json ties the head to the embeddings, the files hold another head: it is not tied, on any worker."""
    model = odd_llama(tmp_path, tied=True, deep=False)
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * 1.5
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    runs = Runs(tmp_path, token_rows, model, "rasa")
    begun = [runs.begun(strategy) for strategy in ("zero3", "fsdp")]
    resumed = [runs.resumed(one, to) for one in begun for to in ("zero3", "fsdp")]
    group([runs.whole()], 1)
    group([*begun, *resumed], 2)
    assert_equal(runs.differences(resumed))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero3", "fsdp"])
def test_the_shape_of_an_8b_model_survives_kills(strategy: str, token_rows: Path, tmp_path: Path) -> None:
    """A worker is killed, the same command goes on and is killed itself, the same command finishes the run."""
    runs = Runs(tmp_path, token_rows, odd_llama(tmp_path, tied=True, deep=True), "rasa")
    recipe = runs.run("killed", 12, strategy)
    recipe["training"]["checkpoint_every"] = 2
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    subprocess.run(command("--nproc", "2", "output_dir=whole"), cwd=tmp_path, check=True)
    killed = Path(recipe["output_dir"])
    for step, which in ((3, "worker"), (7, "command")):
        process = start(tmp_path, "--nproc", "2")
        reach(process, killed, step)
        os.kill(workers_of(process)[1] if which == "worker" else process.pid, signal.SIGKILL)
        _, said = process.communicate(timeout=PATIENCE)
        assert process.returncode == (1 if which == "worker" else -signal.SIGKILL), said
        assert len(metrics(killed)) < 12, "killed too late"
    done = subprocess.run(command("--nproc", "2"), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "resuming from" in done.stderr, done.stderr
    adapter_file = load_file(killed / "adapter" / "adapter.safetensors")
    assert [39] in [list(tensor.shape) for tensor in adapter_file.values()]
    assert_equal({strategy: difference(tmp_path / "whole", killed)})
