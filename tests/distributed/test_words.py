"""New words give the losses of one process with every strategy, and go on from a checkpoint as if never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from rasa_train import load_adapter
from tests.conftest import run_command
from tests.test_words import ADAPTERS, VOCABULARY, probe, recipe, save_base

from .conftest import Group, adapter, difference

ALL = ["ddp", "zero1", "zero2", "zero3", "fsdp"]
MANY: dict[tuple[bool, str, str], list[str]] = {
    (True, "rasa", "new"): ALL,
    (False, "lora", "new"): ALL,
    (True, "lora", "all"): ["ddp", "zero3", "fsdp"],
    (False, "rasa", "none"): ["zero3", "fsdp"],
    (False, "lora", "all"): ["zero3", "fsdp"],
}


def case(home: Path, run: str, method: str, train: str, strategy: str = "ddp", **training: object) -> dict[str, Any]:
    made = recipe(home, {**ADAPTERS[method], "dropout": 0.1}, run=run, train_embeddings=train)
    made["distributed"] = {"strategy": strategy, "resident_size": 0, "timeout_seconds": 300}
    made["training"] |= {"max_grad_norm": 0.5, **training}
    return made


@pytest.mark.slow
def test_strategies_equal_one_process(tmp_path: Path, group: Group) -> None:
    many, pairs = [], []
    for (tied, method, train), strategies in MANY.items():
        home = tmp_path / f"{tied}-{method}-{train}"
        home.mkdir()
        base = save_base(home, tied=tied)
        one = case(home, "one", method, train)
        (home / "one.yaml").write_text(yaml.safe_dump(one))
        run_command("train", home / "one.yaml", check=True)
        for strategy in strategies:
            many.append(case(home, strategy, method, train, strategy))
            half = case(home, f"{strategy}-half", method, train, strategy, max_steps=5)
            rest = case(home, f"{strategy}-rest", method, train, strategy)
            many += [half, {**rest, "continues": half["output_dir"]}]
            pairs += [(one, many[-3], base), (one, rest, base)]
    group(many, 2)
    for one, other, base in pairs:
        run = Path(other["output_dir"])
        found = difference(one["output_dir"], run)
        assert found["loss"] < 1e-5 and found["grad_norm"] < 1e-4 and found["parameter"] < 1e-4, (run, found)
        assert any(name.startswith("model.embed_tokens.") for name in adapter(run))
        run_command("merge", run, "--output", run / "merged", check=True)
        merged = AutoModelForCausalLM.from_pretrained(run / "merged")
        loaded = load_adapter(AutoModelForCausalLM.from_pretrained(one["model"]["name"]), run / "adapter").eval()
        with torch.no_grad():
            expected = loaded(input_ids=probe()).logits
            torch.testing.assert_close(merged(input_ids=probe()).logits, expected, rtol=1e-4, atol=1e-4)
        if other["model"]["train_embeddings"] != "all":
            for name in ("get_input_embeddings", "get_output_embeddings"):
                assert torch.equal(getattr(merged, name)().weight[:VOCABULARY], getattr(base, name)().weight)
