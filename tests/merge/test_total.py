"""Sums of adapters, merged and exported: the oracle is the sum of the dense updates of each alone."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from rasa_train.adapters.saved import read_adapter, write_adapter
from rasa_train.errors import UserError
from rasa_train.merging import verify
from rasa_train.merging.lora import export_lora
from rasa_train.merging.merged import merge

from .conftest import load, logits, save_adapter, save_base
from .test_lora import peft_logits


def update(base, directory):
    old, new = (load_file(d / "model.safetensors") for d in (base, directory))
    return {name: new[name] - old[name] for name in old}


@pytest.mark.parametrize("methods", [("rasa", "lora"), ("lora", "dora"), ("rasa", "bitfit")], ids="+".join)
def test_the_sum_of_the_updates(tmp_path, methods):
    base = save_base(tmp_path / "base", "qwen2")
    for method in methods:
        fields = {"add_bias": False} if method == "bitfit" else {}
        save_adapter(tmp_path / method, base, method, **fields)
    weights = dict(zip(methods, (0.7, -0.3), strict=True))
    if "bitfit" in methods:  # it trains the biases of the base in place
        with pytest.raises(UserError, match="trained base parameters"):
            merge([(tmp_path / m, w) for m, w in weights.items()], tmp_path / "out")
        return
    report = merge([(tmp_path / m, w) for m, w in weights.items()], tmp_path / "out")
    assert report.method == f"0.7 {methods[0]} + -0.3 {methods[1]}"
    for method in methods:
        merge(tmp_path / method, tmp_path / f"{method}-merged")
    parts = {m: update(base, tmp_path / f"{m}-merged") for m in methods}
    for name, got in update(base, tmp_path / "out").items():
        assert_close(got, sum(w * parts[m][name] for m, w in weights.items()), rtol=1e-4, atol=1e-5)


def test_ranks_add_up_in_an_export(tmp_path):
    base = save_base(tmp_path / "base")
    save_adapter(tmp_path / "a", base, "rasa", k=1)
    save_adapter(tmp_path / "b", base, "lora", targets=["q_proj", "up_proj"])
    given = [(tmp_path / "a", 0.7), (tmp_path / "b", 0.3)]
    merge(given, tmp_path / "out")
    report = export_lora(given, tmp_path / "lora")
    assert report.rank == (4 - 1 + 3) + 4
    assert_close(peft_logits(base, tmp_path / "lora"), logits(load(tmp_path / "out")), rtol=1e-5, atol=1e-5)
    proof = verify(given, tmp_path / "out", exact=True)
    assert proof.logits < 1e-5 < 1e-2 < proof.adapter_logits


@pytest.mark.parametrize("method", ["dora", "full"])
def test_a_sum_of_one_is_verified(tmp_path, method):
    save_adapter(tmp_path / "one", save_base(tmp_path / "base"), method)
    given = [(tmp_path / "one", 1.0)]
    merge(given, tmp_path / "out")
    proof = verify(given, tmp_path / "out", exact=True)
    assert proof.logits < 1e-5 < 1e-2 < proof.adapter_logits


@pytest.mark.parametrize("methods", [("rasa", "lora"), ("lora", "dora")], ids="+".join)
def test_a_sum_in_fused_experts_is_verified(tmp_path, methods):
    base = save_base(tmp_path / "base", "mixtral")
    for method in methods:
        save_adapter(tmp_path / method, base, method)
    given = [(tmp_path / methods[0], 0.7), (tmp_path / methods[1], -0.3)]
    merge(given, tmp_path / "out")
    proof = verify(given, tmp_path / "out", exact=True)
    assert proof.experts and proof.logits < 1e-4 < 1e-2 < proof.adapter_logits


def test_adapters_of_two_bases(tmp_path):
    base = save_base(tmp_path / "base")
    for name in ("a", "b"):
        save_adapter(tmp_path / name, base, "lora")
    saved = read_adapter(tmp_path / "b")
    write_adapter(tmp_path / "b", saved.method, saved.tensors, base_model="another", base_revision=None)
    given = [(tmp_path / "a", 1.0), (tmp_path / "b", 1.0)]
    with pytest.raises(UserError, match="several bases"):
        merge(given, tmp_path / "out")
    merge(given, tmp_path / "out", base=str(base))
    merge([(tmp_path / "a", 2.0)], tmp_path / "twice")
    merge(tmp_path / "a", tmp_path / "once")
    name = "model.layers.0.mlp.up_proj.weight"
    once, twice = (update(base, tmp_path / d)[name] for d in ("once", "twice"))
    assert_close(twice, 2 * once, rtol=1e-4, atol=1e-5)
    assert torch.count_nonzero(once) > 0
