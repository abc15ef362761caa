"""LoRA export: PEFT is the oracle. It loads the files and must compute what the adapted model does."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close

from rasa_train.adapters.saved import read_adapter, write_adapter
from rasa_train.adapters.site import Site
from rasa_train.merging.lora import export_lora, lora_factors
from rasa_train.merging.merged import merge
from rasa_train.methods.lora import LoRA, LoRAAdapter

from .conftest import load, logits, save_base


def peft_logits(base, directory):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of keys it misses
        return logits(PeftModel.from_pretrained(load(base), directory))


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2"])
@pytest.mark.parametrize("fields", [{"method": "lora"}, {"k": 0}, {"k": 1}, {"k": 4}], ids=str)
def test_peft_computes_what_the_adapted_model_does(case, tmp_path, kind, fields):
    base, adapter, expected = case(kind, **fields)
    report = export_lora(adapter, tmp_path / "out")
    layers = {"llama": 3, "tied": 2, "gpt2": 2}[kind]
    k = fields.get("k", 0)
    assert report.rank == 4 - k + layers * k
    assert_close(peft_logits(base, tmp_path / "out"), expected, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == report.rank
    assert config["fan_in_fan_out"] == (kind == "gpt2")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == report.tensors == 2 * report.adapted
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_the_export_merges_to_the_same_weights(case, tmp_path):
    base, adapter, _ = case(k=1)
    merge(adapter, tmp_path / "direct")
    export_lora(adapter, tmp_path / "lora")
    merge(tmp_path / "lora", tmp_path / "via-lora", base=str(base))
    direct, via = (load_file(tmp_path / d / "model.safetensors") for d in ("direct", "via-lora"))
    for name, tensor in direct.items():
        assert_close(via[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "fields", "rank"),
    [
        ("mixtral", {"k": 1}, 2 * (4 - 1 + 2)),  # gate and up beside each other
        ("qwen3_moe", {"method": "lora", "targets": ["q_proj", "gate_proj", "down_proj"]}, 4),
        ("qwen3_moe", {"method": "adalora", "targets": ["up_proj"]}, 6),
    ],
    ids=str,
)
def test_fused_experts_there_and_back(case, tmp_path, kind, fields, rank):
    base, adapter, expected = case(kind, **fields)
    report = export_lora(adapter, tmp_path / "lora")
    assert report.fused_experts and report.rank == rank
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert set(config["target_parameters"]) <= {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert_close(peft_logits(base, tmp_path / "lora"), expected, rtol=1e-5, atol=1e-5)
    merge(adapter, tmp_path / "direct")
    merge(tmp_path / "lora", tmp_path / "via-lora")
    direct, via = (load_file(tmp_path / d / "model.safetensors") for d in ("direct", "via-lora"))
    for name, tensor in direct.items():
        assert_close(via[name], tensor, rtol=1e-5, atol=1e-5)
    cut = export_lora(adapter, tmp_path / "cut", max_rank=2)
    assert cut.rank == 2 and 0 < cut.error < 1
    merge(tmp_path / "cut", tmp_path / "of-cut")
    before, of_cut = (load_file(d / "model.safetensors") for d in (base, tmp_path / "of-cut"))
    lost = sum(float((of_cut[n] - direct[n]).square().sum()) for n in direct)
    assert_close(
        cut.error,
        (lost / sum(float((direct[n] - before[n]).square().sum()) for n in direct)) ** 0.5,
        rtol=1e-3,
        atol=0.0,
    )


def test_an_expert_adapter_that_peft_has_trained(tmp_path):
    base = save_base(tmp_path / "base", "mixtral")
    config = LoraConfig(
        r=3, lora_alpha=7, target_modules=["v_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        rank_pattern={"down_proj": 2}, task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(3)
    model = get_peft_model(load(base), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p) * 0.3)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "out", base=str(base))
    assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-4, atol=1e-5)
    assert (logits(load(base)) - expected).abs().max() > 0.01


def test_only_the_configuration_of_the_base_is_needed(case, tmp_path):
    base, adapter, _ = case()
    (base / "model.safetensors").unlink()
    assert export_lora(adapter, tmp_path / "out").adapted == 21


def test_pruned_ranks_are_dropped_and_ranks_may_differ(case, tmp_path):
    base, adapter, _ = case(k=0)
    saved = read_adapter(adapter)
    d = "model.layers.1.mlp.up_proj.d"
    all_zero = "model.layers.2.mlp.up_proj.d"
    saved.tensors[d][1:3] = 0.0
    saved.tensors[all_zero][:] = 0.0
    write_adapter(adapter, saved.method, saved.tensors, base_model=str(base), base_revision=None)
    report = export_lora(adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    ranks = {"model.layers.1.mlp.up_proj": 2, "model.layers.2.mlp.up_proj": 1}
    assert report.rank == 4 and config["rank_pattern"] == config["alpha_pattern"] == ranks
    merge(adapter, tmp_path / "merged")
    assert_close(peft_logits(base, tmp_path / "out"), logits(load(tmp_path / "merged")), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["q_proj", "up_proj"], ["q_proj", "up_proj"]),
        (["attn.c_proj"], ["attn.c_proj"]),  # GPT-2 has a c_proj in the MLP too
        (r".*h\.1\.mlp\.c_fc", ["transformer.h.1.mlp.c_fc"]),
    ],
)
def test_target_modules_name_just_what_is_adapted(case, tmp_path, targets, names):
    base, adapter, expected = case("llama" if "q_proj" in targets else "gpt2", targets=targets)
    export_lora(adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == names
    assert_close(peft_logits(base, tmp_path / "out"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rank", "option"), [(4, 8), (8, 8), (9, 16), (257, 320), (513, None)])
def test_vllm_option_is_the_next_rank_it_takes(case, tmp_path, rank, option):
    _, adapter, _ = case(method="lora", r=rank, targets=["q_proj"])
    assert export_lora(adapter, tmp_path / "out").max_lora_rank == option


@pytest.mark.parametrize("rank", [1, 3, 99])
def test_a_largest_rank_cuts_by_singular_values(case, tmp_path, rank):
    base, adapter, _ = case(k=1)
    merge(adapter, tmp_path / "merged")
    report = export_lora(adapter, tmp_path / "out", max_rank=rank)
    merge(tmp_path / "out", tmp_path / "cut", base=str(base))
    old, new, cut = (load_file(d / "model.safetensors") for d in (base, tmp_path / "merged", tmp_path / "cut"))
    lost2 = norm2 = 0.0
    for name in (n for n in old if "_proj" in n):
        s = torch.linalg.svdvals((new[name] - old[name]).double())
        lost2, norm2 = lost2 + float((s[rank:] ** 2).sum()), norm2 + float((s**2).sum())
        error = torch.linalg.matrix_norm((cut[name] - new[name]).double())
        assert_close(float(error**2), float((s[rank:] ** 2).sum()), rtol=1e-3, atol=1e-7)
    assert report.rank == min(rank, 6)
    assert_close(report.error, (lost2 / norm2) ** 0.5, rtol=1e-3, atol=1e-5)


def test_negative_d_keeps_its_sign():
    adapter = LoRAAdapter(Site("x", "x", 0, 5, 6, "x.weight"), LoRA(r=3))
    torch.nn.init.normal_(adapter.B)
    adapter.scale = -2.0
    A, B = lora_factors(adapter)
    assert_close(B @ A, adapter.delta())
