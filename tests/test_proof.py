"""What a run proves at its first step: of a healthy run, and of runs that would train for nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rasa_train.adapters.linear import AdaptedLinear
from rasa_train.training.trainer import Trainer
from tests.conftest import Cli


@pytest.fixture
def run(cli: Cli, tmp_path: Path, tiny_llama: Path, token_rows: Path) -> Callable[..., str]:
    """Train the tiny Llama for three steps. Returns what was printed, the exit code first."""

    def run(*overrides: str, rows: Path = token_rows) -> str:
        recipe = {
            "model": {"name": str(tiny_llama), "dtype": "float32"},
            "adapter": {"method": "rasa", "r": 4, "k": 1, "alpha": 8},
            "data": {"dataset": str(rows)},
            "training": {"max_steps": 3, "batch_size": 8, "optimizer": {"lr": 2e-2}, "schedule": {"warmup_ratio": 0.0}},
            "output_dir": "run",
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        done = cli("train", "recipe.yaml", "--fresh", *overrides)
        return f"{done.returncode} {done.stderr}"

    return run


def test_a_healthy_run(run: Callable[..., str]) -> None:
    said = run()
    assert said.startswith("0 ")
    assert re.search(r"proof: 21 of 21 adapted linears have a gradient and have moved; ", said)
    # The base of these tests has not been trained.
    assert re.search(r"the first loss is \d\.\d\d, no better than guessing \(4\.16\): does the tokenizer belong", said)
    assert "the end of a text is trained in 40 of 40 rows" in said
    assert said.count("proof:") == 1


@pytest.mark.parametrize("overrides", [["adapter.k=4"], ["adapter.method=full"], ["training.batching=packed"]], ids=str)
def test_tensors_without_a_gradient_in_the_first_step_are_waited_for(
    run: Callable[..., str], overrides: list[str]
) -> None:
    """With k = r, d of each linear is all that it has of its own, and the pool's B is zero at first."""
    said = run(*(["adapter={method: full}"] if "adapter.method=full" in overrides else overrides))
    assert said.startswith("0 ") and re.search(r"proof: (\d+) of \1 (adapted linears|trained modules) have", said)
    assert "no gradient reaches" not in said


def test_the_proof_is_made_again_when_a_run_is_resumed(run: Callable[..., str], cli: Cli, tmp_path: Path) -> None:
    run("training.checkpoint_every=1")
    (tmp_path / "run" / "summary.json").unlink()
    for done in ("adapter", "checkpoints/step-00000002", "checkpoints/step-00000003"):
        shutil.rmtree(tmp_path / "run" / done)
    said = cli("train", "recipe.yaml", "training.checkpoint_every=1", check=True).stderr
    assert "(step 1 of 3)" in said and "proof: 21 of 21 adapted linears" in said


def detached(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Let the linears whose path contains ``part`` compute without their adapters."""
    setup = Trainer.setup

    def without(self: Trainer) -> None:
        setup(self)
        for path, module in self.model.module.named_modules():
            if isinstance(module, AdaptedLinear) and part in path:
                module.forward = lambda x, own=module: F.linear(x, own.weight, own.bias)  # type: ignore[method-assign]

    monkeypatch.setattr(Trainer, "setup", without)


def test_linears_whose_adapters_are_not_used_are_named_once(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    detached(monkeypatch, "layers.1.mlp")
    said = run()
    assert said.startswith("0 ")
    assert said.count("no gradient reaches 3 of 21 adapted linears: model.layers.1.mlp.gate_proj, ") == 1
    assert "adapter.exclude: [model.layers.1.mlp.down_proj, model.layers.1.mlp.gate_proj, model.layers.1.mlp" in said
    assert "proof: 18 of 21 adapted linears have a gradient" in said


def test_a_run_whose_adapters_are_all_detached_ends_at_its_first_step(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    detached(monkeypatch, "")
    said = run()
    assert said.startswith("2 ") and "adapter.targets: the first step has changed nothing: no gradient" in said
    assert not (tmp_path / "run" / "adapter").exists()


def test_rows_without_an_end_are_named(run: Callable[..., str], tmp_path: Path) -> None:
    row = {"input_ids": [1, 3, 4, 5, 6], "labels": [-100, 3, 4, 5, 6]}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f"{json.dumps(row)}\n" * 20)
    said = run(rows=rows)
    assert said.startswith("0 ")
    assert "the end of a text (token 2) is trained in none of 20 rows, so the model may not learn to stop" in said


def test_a_share_of_rows_that_were_cut_is_said(run: Callable[..., str]) -> None:
    said = run("data.max_length=12", "data.over_length=truncate")
    assert re.search(r"; [1-9]\d\.\d% of the rows were cut at data.max_length", said)


@pytest.mark.parametrize("batching", ["length-grouped", "packed"])
def test_attention_that_sees_what_follows_is_refused(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch, batching: str
) -> None:
    """Whatever a model calls itself: here it is a Llama whose attention ignores the order of tokens."""

    def everything(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).contiguous(), None

    for name in ("sdpa", "rasa_varlen"):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, everything)
    said = run(f"training.batching={batching}")
    assert said.startswith("2 ") and "is not a causal language model: its tokens see the tokens that follow" in said


def test_sequences_of_a_row_that_see_each_other_are_refused(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attention is causal over the whole row, as if the row were one sequence."""

    def leaking(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "rasa_varlen", leaking)
    said = run("training.batching=packed")
    assert said.startswith("2 ") and "a token sees the tokens of other sequences in its row. Set training" in said


def test_packed_sequences_whose_window_is_ignored_are_refused(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each sequence is computed by itself, but over more of its tokens than without packing."""
    real = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def windowed(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        near = q.new_ones(q.shape[2], q.shape[2]).bool().tril().triu(-3)
        y = F.scaled_dot_product_attention(q, k, v, near, enable_gqa=True)
        return y.transpose(1, 2).contiguous(), None

    assert real is not windowed
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", windowed)
    said = run("training.batching=packed")
    assert said.startswith("2 ")
    assert re.search(r"the loss of 2 sequences is \d\.\d+ in one row and \d\.\d+ one by one", said)
