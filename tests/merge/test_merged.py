"""Merged checkpoints: the oracle is the adapted model itself, PEFT, or W + dW written out."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig

from rasa_train.adapters.contract import Adapter, Built, Method
from rasa_train.adapters.inject import attach
from rasa_train.adapters.registry import METHODS
from rasa_train.adapters.saved import read_adapter, write_adapter
from rasa_train.adapters.site import Site
from rasa_train.adapters.state import adapters, trainable
from rasa_train.errors import UserError
from rasa_train.io.checkpoint_files import open_checkpoint
from rasa_train.merging.folding import Folding
from rasa_train.merging.lora import export_lora
from rasa_train.merging.merged import merge
from rasa_train.merging.source import Source, find_adapter
from rasa_train.methods.lora import LoRA
from rasa_train.models.config import ModelConfig
from rasa_train.models.load import meta_model

from .conftest import load, logits, save_adapter, save_base


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("fields", [{"method": "lora"}, {"k": 0}, {"k": 1}, {"k": 4}], ids=str)
def test_merged_model_computes_what_the_adapted_one_does(case, tmp_path, kind, fields):
    base, adapter, expected = case(kind, **fields)
    report = merge(adapter, tmp_path / "out")
    assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-5, atol=1e-5)
    assert (logits(load(base)) - expected).abs().max() > 0.1
    assert report.adapted == {"llama": 21, "tied": 14, "gpt2": 8, "mixtral": 12, "qwen3_moe": 12}[kind]
    assert report.rounding == 0.0


def test_shards_stay_as_they_are(case, tmp_path):
    base, adapter, expected = case(shards="20KB")
    merge(adapter, tmp_path / "out")
    shards = sorted(p.name for p in base.glob("*.safetensors"))
    assert len(shards) > 3 and shards == sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    index = "model.safetensors.index.json"
    old, new = (json.loads((d / index).read_text()) for d in (base, tmp_path / "out"))
    assert old["weight_map"] == new["weight_map"]
    assert old["metadata"]["total_size"] == new["metadata"]["total_size"]
    assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_bf16_is_rounded_once_and_the_loss_is_reported(block, tmp_path, monkeypatch):
    """Whatever the number of rows that are folded at a time."""
    monkeypatch.setattr("rasa_train.merging.folding.BLOCK", block)
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    save_adapter(tmp_path / "adapter", base)
    report = merge(tmp_path / "adapter", tmp_path / "out")
    adapted = load(base).float()
    saved = read_adapter(tmp_path / "adapter")
    attach(adapted, saved.method)
    with torch.no_grad():
        for name, p in trainable(adapted).items():
            p.copy_(saved.tensors[name])
    old, new = (load_file(d / "model.safetensors") for d in (base, tmp_path / "out"))
    assert old.keys() == new.keys()
    deltas = {f"{path}.weight": a.delta().detach() for path, a in adapters(adapted).items()}
    error = update = 0.0
    for name, W in old.items():
        if name in deltas:
            exact = W.float() + deltas[name]
            # A product of fewer rows may sum in another order: the nearest bf16 value but for the last bit of fp32.
            off, nearest = ((rounded.float() - exact).abs() for rounded in (new[name], exact.bfloat16()))
            assert (off <= nearest + 1e-6).all(), name
            assert block < W.numel() or torch.equal(new[name], exact.bfloat16()), name
            error += float((new[name].float() - exact).square().sum())
            update += float(deltas[name].square().sum())
        else:
            assert torch.equal(new[name].view(torch.int16), W.view(torch.int16)), name
    assert report.rounding == pytest.approx((error / update) ** 0.5, rel=1e-3)
    assert 1e-5 < report.rounding < 0.1


def test_dtype_of_the_whole_checkpoint(case, tmp_path):
    _, adapter, expected = case()
    report = merge(adapter, tmp_path / "out", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load(tmp_path / "out").dtype == torch.bfloat16
    assert report.rounding > 0
    assert (logits(load(tmp_path / "out", torch.float32)) - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_dtype_too_narrow_is_an_error(case, tmp_path):
    base, adapter, _ = case()
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][0, 0] = 1e6
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight has values that are not finite.*float16"):
        merge(adapter, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_checkpoint_names_without_the_base_prefix(case, tmp_path):
    base, adapter, expected = case("gpt2")
    weights = load_file(base / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    assert "h.0.attn.c_attn.weight" in bare
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    merge(adapter, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == bare.keys()
    assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-5, atol=1e-5)


def test_peft_lora_merges_as_peft_does(tmp_path):
    from peft import LoraConfig, get_peft_model

    patterns = {
        "rank_pattern": {"q_proj": 5, "h.1.mlp.c_fc": 2},
        "alpha_pattern": {r"layers\.[12].*up_proj": 3, "c_proj": 9},
    }
    for kind, rslora in (("llama", True), ("gpt2", False)):
        base = save_base(tmp_path / f"{kind}-base", kind)
        config = LoraConfig(
            r=3, lora_alpha=7, target_modules="all-linear", use_rslora=rslora, task_type="CAUSAL_LM",
            fan_in_fan_out=kind == "gpt2", exclude_modules=["lm_head"], **patterns,
        )  # fmt: skip
        torch.manual_seed(3)
        model = get_peft_model(load(base), config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.copy_(torch.randn_like(p) * 0.3)
        model.save_pretrained(tmp_path / f"{kind}-peft")
        merge(tmp_path / f"{kind}-peft", tmp_path / f"{kind}-out")
        expected = model.merge_and_unload().state_dict()
        merged = load(tmp_path / f"{kind}-out").state_dict()
        assert merged.keys() == expected.keys()
        for name, tensor in expected.items():
            assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)


def test_base_parameters_that_were_trained_replace_the_bases(case, tmp_path):
    base, adapter, _ = case("gpt2", method="lora")
    saved = read_adapter(adapter)
    bias = "transformer.h.1.mlp.c_fc.bias"
    new_bias = torch.randn(128)
    write_adapter(adapter, saved.method, {**saved.tensors, bias: new_bias}, base_model=str(base), base_revision=None)
    merge(adapter, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged[bias], new_bias)
    # with an adapter on top of it: what was trained, plus dW
    name = "transformer.h.1.mlp.c_fc.weight"
    both = {**saved.tensors, name: torch.randn(32, 128)}
    write_adapter(adapter, saved.method, both, base_model=str(base), base_revision=None)
    merge(adapter, tmp_path / "both")
    delta = merged[name] - load_file(base / "model.safetensors")[name]
    assert_close(load_file(tmp_path / "both" / "model.safetensors")[name], both[name] + delta)
    # and alone: an adapter of nothing but base parameters
    write_adapter(adapter, saved.method, {bias: new_bias}, base_model=str(base), base_revision=None)
    report = merge(adapter, tmp_path / "alone")
    alone, old = (load_file(d / "model.safetensors") for d in (tmp_path / "alone", base))
    assert report.adapted == 1
    assert {name for name in old if not torch.equal(old[name], alone[name])} == {bias}
    with pytest.raises(UserError, match="base parameters"):
        export_lora(adapter, tmp_path / "lora")


class Scaled(Method):
    """dW = diag(m) W: an update that depends on the weight and is no factor product."""

    method: str = "scaled"
    r: int = 1
    alpha: float = 1.0

    def build(self, sites: list[Site]) -> Built:
        return Built({site.path: ScaledAdapter(site, self) for site in sites}, {})


class ScaledAdapter(Adapter):
    needs_weight = True

    def __init__(self, site: Site, method: Method) -> None:
        super().__init__(site, method)
        self.m = torch.nn.Parameter(torch.zeros(site.out_features))

    def delta(self, weight=None):
        return self.m[:, None] * weight.float()

    def forward(self, x, weight, counts=None):
        return x @ self.delta(weight).T

    effective_rank = 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_update_that_depends_on_the_weight_gets_it(case, tmp_path, monkeypatch, kind):
    monkeypatch.setitem(METHODS.registered, "scaled", Scaled)
    _, adapter, expected = case(kind, method="scaled")
    merge(adapter, tmp_path / "out")
    assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=r"'scaled' is not a product of low-rank factors: use --format merged"):
        export_lora(adapter, tmp_path / "lora")


def fold_experts(tmp_path: Path, config, sites: list[Site], method: Method | None = None) -> tuple[dict, dict, dict]:
    """Merge LoRA on fused expert weights. Returns parameters before and after, and the deltas by path."""
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # expert weights are left empty by some models
        for p in model.parameters():
            p.normal_(std=0.02)
    model.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    built = (method or LoRA(r=2)).build(sites)
    with torch.no_grad():
        for adapter in built.adapters.values():
            for p in adapter.parameters():
                p.normal_()
    meta = meta_model(ModelConfig(name=str(tmp_path / "base")))
    source = Source("lora", "base", tmp_path / "base", [], meta, sites, built.adapters, {})
    checkpoint = open_checkpoint(tmp_path / "base")
    folding = Folding(source, checkpoint, None)
    (tmp_path / "out").mkdir()
    for file in checkpoint.files:
        folding.write(file, tmp_path / "out" / file, lambda n: None)
    for path in (tmp_path / "base").glob("*.json"):
        (tmp_path / "out" / path.name).write_bytes(path.read_bytes())
    old, new = (dict(load(tmp_path / d).named_parameters()) for d in ("base", "out"))
    return old, new, built.adapters


def experts(layer: int, name: str, out: int, into: int, **fields) -> Site:
    path = f"model.layers.{layer}.mlp.experts"
    return Site(f"{path}.{name}", f"mlp.experts.{name}", layer, out, into, **{"num_experts": 3, **fields})


@pytest.mark.parametrize("method", [LoRA(r=2), Scaled()], ids=["lora", "needs the weight"])
def test_fused_experts_whose_file_has_one_tensor_per_expert(tmp_path, method):
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    gate_up = "model.layers.1.mlp.experts.gate_up_proj"
    sites = [
        experts(1, "gate_proj", 24, 16, weight=gate_up, rows=(0, 24)),
        experts(1, "up_proj", 24, 16, weight=gate_up, rows=(24, 48)),
        experts(1, "down_proj", 16, 24, weight="model.layers.1.mlp.experts.down_proj"),
    ]
    old, new, built = fold_experts(tmp_path, config, sites, method)
    names = open_checkpoint(tmp_path / "base").tensors
    assert "model.layers.1.block_sparse_moe.experts.2.w3.weight" in names  # else this tests nothing
    with torch.no_grad():
        W = old[gate_up]
        gate, up, down = (built[s.path] for s in sites)
        half = torch.cat([gate.delta(W[:, :24]), up.delta(W[:, 24:])], 1)
        expected = dict(old) | {gate_up: W + half}
        path = sites[2].weight
        expected[path] = old[path] + down.delta(old[path])
    for name, tensor in expected.items():
        assert_close(new[name], tensor, rtol=1e-6, atol=1e-6)
    assert not torch.equal(new[gate_up], old[gate_up])


def test_fused_experts_that_are_stored_transposed(tmp_path):
    config = GptOssConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, num_local_experts=3, layer_types=["full_attention"],
    )  # fmt: skip
    down, gate_up = (f"model.layers.0.mlp.experts.{n}" for n in ("down_proj", "gate_up_proj"))
    sites = [
        experts(0, "down", 16, 24, weight=down, transposed=True),
        experts(0, "upper", 30, 16, weight=gate_up, transposed=True, rows=(18, 48)),
    ]
    old, new, built = fold_experts(tmp_path, config, sites)
    with torch.no_grad():
        assert_close(new[down], old[down] + built[sites[0].path].delta().mT)
        assert torch.equal(new[gate_up][..., :18], old[gate_up][..., :18])
        assert_close(new[gate_up][..., 18:], old[gate_up][..., 18:] + built[sites[1].path].delta().mT)


PER_EXPERT = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.2.w1.weight",
    "qwen3_moe": "model.layers.1.mlp.experts.5.gate_proj.weight",
}


@pytest.mark.parametrize("layout", ["one tensor per expert", "fused"])
@pytest.mark.parametrize("method", ["rasa", "dora"])
@pytest.mark.parametrize("kind", PER_EXPERT)
def test_a_mixture_of_experts_in_both_layouts(case, tmp_path, kind, method, layout):
    base, adapter, expected = case(kind, method=method)
    weights = load_file(base / "model.safetensors")
    assert PER_EXPERT[kind] in weights, "else this tests nothing"
    if layout == "fused":
        weights = {name: t.contiguous() for name, t in load(base).state_dict().items()}
        assert "model.layers.1.mlp.experts.gate_up_proj" in weights
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    merge(adapter, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == weights.keys()
    assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-4, atol=1e-5)
    if method == "dora":
        with pytest.raises(UserError, match=r"--format merged"):
            export_lora(adapter, tmp_path / "lora")


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "up_proj"], ["down_proj"]], ids=str)
def test_biases_are_added(case, tmp_path, targets, shards):
    base, adapter, expected = case("llama", method="bitfit", targets=targets, shards=shards)
    report = merge(adapter, tmp_path / "out", dtype=None if shards == "1GB" else torch.float32)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    attention = targets != ["down_proj"]
    assert (config["attention_bias"], config["mlp_bias"]) == (attention, True)
    assert report.adapted == 3 * (7 if targets == "all-linear" else len(targets))
    # q, k, v, o and gate, up, down: zeros where none was trained, since a switch is for all of them
    old, new = (open_checkpoint(d).tensors for d in (base, tmp_path / "out"))
    assert len(new) == report.tensors == len(old) + 3 * (7 if attention else 3)
    assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-5, atol=1e-5)
    assert (logits(load(base)) - expected).abs().max() > 0.1
    assert sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")) == report.bytes


def test_biases_are_rounded_to_the_dtype_of_their_weight(tmp_path):
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    save_adapter(tmp_path / "adapter", base, "bitfit")
    report = merge(tmp_path / "adapter", tmp_path / "out")
    bias = "model.layers.0.mlp.up_proj.added_bias"
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged[bias.replace("added_", "")], read_adapter(tmp_path / "adapter").tensors[bias].bfloat16())
    assert 0 < report.rounding < 0.01


def test_the_biases_of_the_base_are_trained_in_place(case, tmp_path):
    base, adapter, expected = case("qwen2", method="bitfit", add_bias=False)
    report = merge(adapter, tmp_path / "out")
    assert (
        report.adapted == 6
        and load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    )
    assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-5, atol=1e-5)


def test_a_bias_that_the_architecture_has_no_place_for(case, tmp_path):
    _, adapter, _ = case("qwen2", method="bitfit")  # q, k and v have one; o and the MLP cannot have any
    with pytest.raises(UserError, match=r"Qwen2ForCausalLM has no place for the bias model\.layers\.0\.mlp\.down_proj"):
        merge(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Shifted(Method):
    """An update of the bias the linear has."""

    method: str = "shifted"
    r: int = 1
    alpha: float = 1.0

    def build(self, sites: list[Site]) -> Built:
        return Built({site.path: ShiftedAdapter(site, self) for site in sites if site.bias}, {})


class ShiftedAdapter(Adapter):
    effective_rank = 0

    def __init__(self, site: Site, method: Method) -> None:
        super().__init__(site, method)
        self.b = torch.nn.Parameter(torch.zeros(site.out_features))

    def forward(self, x, weight, counts=None):
        return self.b.expand(*x.shape[:-1], -1)

    def delta(self, weight=None):
        return torch.zeros(self.site.shape)

    def delta_bias(self):
        return self.b


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_an_update_of_a_bias_that_is_there(case, tmp_path, monkeypatch, kind):
    monkeypatch.setitem(METHODS.registered, "shifted", Shifted)
    _, adapter, expected = case(kind, method="shifted")
    assert merge(adapter, tmp_path / "out").adapted == {"qwen2": 6, "gpt2": 8}[kind]
    assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-5, atol=1e-5)


def test_small_files_come_along_and_other_weights_do_not(case, tmp_path):
    base, adapter, _ = case()
    kept = ["tokenizer.json", "chat_template.jinja", "tokenizer.model", "LICENSE", "generation_config.json"]
    left = [
        "pytorch_model.bin",
        "x.gguf",
        "consolidated.safetensors",
        ".hidden",
        "pytorch_model.bin.index.json",
    ]
    for name in [*kept, *left]:
        (base / name).write_text("{}")
    (base / "original").mkdir()
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("x")
    merge(adapter, tmp_path / "out")
    got = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert got == {*kept, "config.json", "model.safetensors", "additional_chat_templates/tool.jinja"}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_run_directory_gives_its_adapter_or_its_newest_checkpoint(tmp_path):
    base = save_base(tmp_path / "base")
    run = tmp_path / "run"
    for step in (9, 10):
        save_adapter(run / "checkpoints" / f"step-{step:08d}", base)
    (run / "checkpoints" / "step-00000011").mkdir()  # torn: no adapter in it
    assert find_adapter(run).name == "step-00000010"
    save_adapter(run / "adapter", base)
    assert find_adapter(run) == run / "adapter"
    assert find_adapter(run / "adapter") == run / "adapter"
    with pytest.raises(UserError, match="holds no adapter"):
        find_adapter(base)
    with pytest.raises(UserError, match="does not exist"):
        find_adapter(tmp_path / "nowhere")


def golden(case: str) -> Path | None:
    places = [Path(__file__).parents[1] / "golden"]
    if shared := os.environ.get("RASA_TRAIN_SHARED"):
        places.append(Path(shared) / "golden")
    return next((p / case for p in places if (p / case / "final").is_dir() and (p / "llama-base").is_dir()), None)


@pytest.mark.parametrize("format", ["merged", "lora"])
@pytest.mark.parametrize("name", ["llama-lora-r8", "llama-rasa-r8-k1", "llama-vera-r64", "llama-mora6-r8"])
def test_adapters_of_the_reference_implementation(tmp_path, name, format):
    directory = golden(name)
    if directory is None:
        pytest.skip("no golden numbers here")
    if name.split("-")[1].rstrip("6") not in METHODS:
        pytest.skip("method not built yet")
    base = directory.parent / "llama-base"
    rows = [json.loads(line)["input_ids"] for line in (directory / "batches.jsonl").read_text().splitlines()[:6]]
    (expected,) = load_file(directory / "final_logits_batch0.safetensors").values()
    tokens = torch.zeros(expected.shape[:2], dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    if format == "merged":
        merge(directory / "final", tmp_path / "out", base=str(base))
        model = load(tmp_path / "out")
    else:
        from peft import PeftModel

        if name == "llama-mora6-r8":
            with pytest.raises(UserError, match="--format merged"):
                export_lora(directory / "final", tmp_path / "out", base=str(base))
            return
        export_lora(directory / "final", tmp_path / "out", base=str(base))
        model = PeftModel.from_pretrained(load(base), tmp_path / "out")
    with torch.no_grad():
        got = model(input_ids=tokens, attention_mask=mask).logits
    assert_close(got[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-3)
    assert (logits(load(base), tokens) - expected)[mask.bool()].abs().max() > 1e-2
