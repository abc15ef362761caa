"""The plug-in in PEFT's own life cycle, under TRL, and in lm-eval."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from peft import (
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from rasa_train.adapters.saved import read_adapter
from rasa_train.adapters.site import Site
from rasa_train.integrations.peft_layer import Holder, PoolView
from rasa_train.integrations.peft_plugin import MoraConfig, RasaConfig
from rasa_train.merging.merged import merge
from rasa_train.methods.rasa import Pool

DEMO = Path(__file__).parents[1] / "rasa_train" / "demo" / "model"
TOKENS = torch.randint(0, 64, (2, 13), generator=torch.Generator().manual_seed(5))
CONFIGS = {
    "rasa": lambda: RasaConfig(r=4, rasa_k=1, rasa_alpha=8, task_type="CAUSAL_LM"),
    "mora": lambda: MoraConfig(r=4, task_type="CAUSAL_LM"),
}


@pytest.fixture(params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    sizes = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    config = {
        "llama": LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, **sizes,
        ),
        "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **sizes),
    }[request.param]  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model.eval()(input_ids=TOKENS).logits


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 1) -> None:
    torch.manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.copy_(torch.randn_like(p) * 0.3)


@pytest.mark.parametrize("name", CONFIGS)
def test_save_load_merge(base, tmp_path, name):
    model = get_peft_model(load(base), CONFIGS[name]())
    before = logits(load(base))
    assert torch.equal(logits(model), before)  # an adapter starts at nothing
    randomise(model)
    expected = logits(model)
    assert (expected - before).abs().max() > 0.05
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path / "adapter")
    assert isinstance(PeftConfig.from_pretrained(tmp_path / "adapter"), RasaConfig if name == "rasa" else MoraConfig)
    again = PeftModel.from_pretrained(load(base), tmp_path / "adapter")
    assert_close(logits(again), expected)
    assert not any(p.requires_grad for p in again.parameters())
    again.merge_adapter()
    assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)
    again.unmerge_adapter()
    assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)
    assert_close(logits(again.merge_and_unload(safe_merge=True)), expected, rtol=1e-4, atol=1e-5)
    # and rasa-merge, which knows nothing of PEFT, reads the same file and computes the same
    saved = read_adapter(tmp_path / "adapter")
    assert saved.method.method == name and len(saved.tensors) == len(
        load_file(tmp_path / "adapter/adapter_model.safetensors")
    )
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert_close(logits(load(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-5)


def test_parameters_are_counted_once_and_pools_get_gradients(base):
    model = get_peft_model(load(base), RasaConfig(r=4, rasa_k=1, target_modules=["c_fc", "up_proj"]))
    shapes = {n.rpartition(".")[2]: tuple(p.shape) for n, p in model.named_parameters() if "_S" in n}
    (b, layers), (ranks, a) = shapes["B_S"], shapes["A_S"]
    assert layers == ranks == model.config.num_hidden_layers  # k = 1
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == layers * 3 * (a + b) + layers * (a + b) + layers * (3 + layers)
    randomise(model)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_two_adapters_at_once(base, tmp_path):
    model = get_peft_model(load(base), CONFIGS["rasa"]())
    randomise(model)
    first = logits(model)
    model.add_adapter("other", RasaConfig(r=2, rasa_k=2))
    assert_close(logits(model), first)
    model.set_adapter("other")
    randomise(model, seed=2)
    second = logits(model)
    assert (second - first).abs().max() > 0.05
    assert {n for n, p in model.named_parameters() if "_S" in n and p.requires_grad} == {
        n for n, _ in model.named_parameters() if "rasa_train_pools.other" in n
    }
    model.save_pretrained(tmp_path / "both", selected_adapters=["other"])
    again = PeftModel.from_pretrained(load(base), tmp_path / "both" / "other")
    assert_close(logits(again), second)
    model.set_adapter("default")
    assert_close(logits(model), first)
    model.delete_adapter("other")
    assert_close(logits(model), first)
    assert not any("other" in n for n, _ in model.named_parameters())


def test_adapters_of_the_reference_implementation_load(tmp_path):
    golden = next(
        (d for d in (Path(__file__).parent / "golden", Path(__file__).parents[1].parent / "shared" / "golden")
         if (d / "llama-rasa-r8-k1" / "final").is_dir() and (d / "llama-base").is_dir()),
        None,
    )  # fmt: skip
    if golden is None:
        pytest.skip("no golden numbers here")
    case = golden / "llama-rasa-r8-k1"
    model = PeftModel.from_pretrained(load(golden / "llama-base"), case / "final")
    rows = [json.loads(line)["input_ids"] for line in (case / "batches.jsonl").read_text().splitlines()[:6]]
    (expected,) = load_file(case / "final_logits_batch0.safetensors").values()
    tokens = torch.zeros(expected.shape[:2], dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    with torch.no_grad():
        got = model(input_ids=tokens, attention_mask=mask).logits
    assert_close(got[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-3)


def test_bad_values_are_pydantics_and_say_so(base):
    with pytest.raises(ValueError, match=r"must be in \[0, r=2\], got 3"):
        get_peft_model(load(base), RasaConfig(r=2, rasa_k=3))
    with pytest.raises(ValueError, match="bias must be one of none, all, rasa_only"):
        RasaConfig(bias="some")


@pytest.mark.parametrize("rank", [12, 1.0])
def test_conversion_to_lora_is_exact_with_the_rank_of_the_update(base, rank):
    model = get_peft_model(load(base), RasaConfig(r=4, rasa_k=3, target_modules=["c_fc", "up_proj"]))
    randomise(model)  # r - k + L k = 1 + 3 L, at most 10
    config, tensors = convert_to_lora(model, rank)
    lora = get_peft_model(load(base), config)
    set_peft_model_state_dict(lora, tensors)
    # A threshold of the energy leaves out singular values that fp32 cannot tell from nothing.
    assert_close(logits(lora), logits(model), rtol=0, atol=1e-4 if rank == 12 else 0.05)


def test_methods_for_lora_alone_refuse_plainly(base, tmp_path):
    model = get_peft_model(load(base), CONFIGS["rasa"]())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="RASA"):
        hotswap_adapter(model, tmp_path, "default")
    with pytest.raises(ValueError, match="RASA"):
        PeftMixedModel(load(base), CONFIGS["rasa"]())


def test_injection_of_the_modules_that_a_file_names(base):
    model = get_peft_model(load(base), RasaConfig(r=4, rasa_k=1, target_modules=["c_fc", "up_proj"]))
    randomise(model)
    plain = {name.removeprefix("base_model.model."): t for name, t in get_peft_model_state_dict(model).items()}
    other = load(base)
    inject_adapter_in_model(RasaConfig(r=4, rasa_k=1), other, "x", low_cpu_mem_usage=True, state_dict=plain)
    assert not set_peft_model_state_dict(other, plain, "x", low_cpu_mem_usage=True).unexpected_keys
    assert torch.equal(logits(other), logits(model)) and not any(p.is_meta for p in other.parameters())


@pytest.mark.parametrize("config", [RasaConfig, MoraConfig])
def test_linears_outside_repeated_layers_are_adapted(config, tmp_path):
    def make():
        return torch.nn.Sequential(OrderedDict(a=torch.nn.Linear(6, 8), act=torch.nn.ReLU(), b=torch.nn.Linear(8, 4)))

    torch.manual_seed(0)
    plain, x = make(), torch.randn(5, 6)
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(make(), config(r=2))
    model = get_peft_model(copy.deepcopy(plain), config(r=2, target_modules=["a", "b"], init_weights=False))
    assert (model(x) - plain(x)).abs().max() > 0.01
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)(x), model(x))
    layer = model.base_model.model.a
    assert (layer.in_features, layer.out_features) == (6, 8)
    assert_close(layer.get_delta_weight("default") + plain.a.weight, model.merge_and_unload().a.weight)


def test_bad_updates_and_quantised_weights_are_not_merged():
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), MoraConfig(r=1, target_modules=["0"]))
    layer = model.base_model.model[0]
    layer.mora_M["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    layer.base_layer.weight = torch.nn.Parameter(layer.base_layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised"):
        model.merge_adapter()


def test_a_pool_is_read_on_the_device_of_the_layer():
    pool = Pool(Site("x", "x", 0, 4, 3, "x.weight"), 2)
    view = PoolView(pool, Holder(torch.nn.Parameter(torch.empty(2, device="meta"))))
    assert view.A_S.device.type == "meta" and view.A_S.shape == pool.A_S.shape
    assert PoolView(pool, Holder(torch.nn.Parameter(torch.empty(2)))).B_S is pool.B_S


@pytest.mark.slow
def test_trl_trains_a_rasa_model(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": f"{i} plus {i}?", "completion": f" {2 * i}"} for i in range(32)]
    trainer = trl.SFTTrainer(
        model=str(DEMO),
        train_dataset=datasets.Dataset.from_list(rows),
        peft_config=RasaConfig(r=4, rasa_alpha=8, task_type="CAUSAL_LM"),
        args=trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=1,
            report_to=[], use_cpu=True, save_strategy="no", bf16=False,
        ),
    )  # fmt: skip
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 12 and losses[-1] < 0.8 * losses[0]
    trainer.save_model(str(tmp_path / "adapter"))
    report = merge(tmp_path / "adapter", tmp_path / "merged", base=str(DEMO))
    assert report.adapted > 0 and report.rounding is not None


TASK = """
task: counting
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: "{{target}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]
"""


@pytest.mark.slow
def test_lm_eval_loads_a_rasa_adapter(tmp_path):
    pytest.importorskip("lm_eval")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(DEMO), CONFIGS["rasa"]())
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "rows.jsonl").write_text('{"text": "one two three", "target": " four"}\n' * 4)
    (tmp_path / "counting.yaml").write_text(TASK)
    perplexities = []
    for peft in ("", f",peft={tmp_path / 'adapter'}"):
        command = [sys.executable, "-m", "rasa_train.peft", "lm_eval", "run", "--model", "hf"]
        command += ["--model_args", f"pretrained={DEMO}{peft}", "--tasks", "counting", "--include_path", str(tmp_path)]
        done = subprocess.run([*command, "--device", "cpu"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        rows = [line for line in done.stdout.splitlines() if line.startswith("|counting")]
        perplexities.append(float(rows[0].split("|")[-4]))
    assert abs(perplexities[0] - perplexities[1]) > 0.01 * perplexities[0]
