"""Bug reports about PEFT's life cycle of adapters, tried with RaSA and MoRA in PEFT (``rasa_train.peft``)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.peft_model import PeftModelForCausalLM
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rasa_train.peft import RasaConfig

TOKENS = torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(5))
SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def built() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


@pytest.fixture
def base(built) -> Callable[[], LlamaForCausalLM]:
    return lambda: copy.deepcopy(built)


def rasa(**options: object) -> RasaConfig:
    return RasaConfig(**{"r": 4, "rasa_k": 1, "rasa_alpha": 8, "task_type": "CAUSAL_LM", **options})


@torch.no_grad()
def logits(model: nn.Module, **options: object) -> Tensor:
    return model.eval()(input_ids=TOKENS, **options).logits


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 1) -> None:
    torch.manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.copy_(torch.randn_like(p) * 0.3)


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def saved(base, tmp_path) -> tuple[Path, Tensor]:
    """An adapter in a directory, and the logits of the model with it."""
    model = get_peft_model(base(), rasa())
    randomise(model, seed=3)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", logits(model)


def test_a_frozen_adapter_beside_the_trained_one_freezes_nothing(base, saved) -> None:
    """huggingface/peft#3487: adding an adapter in inference mode froze the adapter in training.

    Here: a reference adapter is loaded, and the same tensors train as before, the pools among them.
    """
    model = get_peft_model(base(), rasa())
    before = trained(model)
    assert sum("_S" in name for name in before) == 14  # two tensors for each of the seven kinds of linear
    model.load_adapter(saved[0], "reference")
    assert trained(model) == before
    model.set_requires_grad("reference", False)
    model.base_model.disable_adapter_layers()
    assert not trained(model)
    model.base_model.enable_adapter_layers()
    assert trained(model) == before
    model.delete_adapter("reference")
    assert trained(model) == before


def test_a_trainable_adapter_beside_a_frozen_one_trains_alone(base, saved) -> None:
    """huggingface/peft#3580: loading a trainable adapter made the frozen, active adapter trainable.

    Here: each tensor and each pool follows its own adapter, so only the second adapter's train.
    """
    model = PeftModel.from_pretrained(base(), saved[0])
    model.load_adapter(saved[0], "second", is_trainable=True)
    names = trained(model)
    assert names and all(".second." in name for name in names)
    assert sum("_S" in name for name in names) == 14
    model.set_requires_grad("second", False)
    assert not trained(model)


def test_an_adapter_loaded_for_inference_trains_nothing(base, tmp_path) -> None:
    """huggingface/peft#2759: modules_to_save were trainable in an adapter loaded with is_trainable=False.

    Here: no tensor, no pool and no saved module is trainable, neither after loading nor after switching.
    """
    get_peft_model(base(), rasa(modules_to_save=["lm_head"])).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base(), tmp_path, is_trainable=False)
    model.load_adapter(tmp_path, "second", is_trainable=False)
    model.set_adapter("second", inference_mode=True)
    assert not trained(model)


def test_disabling_an_adapter_restores_the_saved_modules(base) -> None:
    """huggingface/peft#736: with disable_adapter, the trained modules_to_save stayed in use.

    Here: the disabled model is the base, bit for bit.
    """
    model = get_peft_model(base(), rasa(modules_to_save=["lm_head"]))
    randomise(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base()))
    assert not torch.allclose(logits(model), logits(base()), atol=0.05)


def test_a_merged_adapter_cannot_be_deleted(base) -> None:
    """huggingface/peft#3498: deleting a merged adapter left its update in the base for ever.

    Here: the deletion is refused and nothing is changed; after unmerging, the base is back.
    """
    model = get_peft_model(base(), rasa())
    randomise(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert_close(logits(model.unload()), logits(base()), rtol=1e-4, atol=1e-5)


def test_repeated_merging_does_not_drift(base) -> None:
    """huggingface/trl#6688: each cycle of merging and unmerging in bf16 moved the base further away.

    Here: the sums are made in fp32 and rounded once, so that twenty cycles change no more than one.
    """
    model = get_peft_model(base().to(torch.bfloat16), rasa(target_modules=["q_proj"]))
    randomise(model)
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    original, after = weight.clone(), []
    for _ in range(20):
        model.merge_adapter()
        model.unmerge_adapter()
        after.append(weight.clone())
    assert all(torch.equal(w, after[0]) for w in after)
    assert_close(after[0], original, rtol=0, atol=0.02)


def test_merged_weights_are_rounded_once(base) -> None:
    """huggingface/peft#1388: a merged bf16 model was less exact than adding the update to the weights.

    Here: the merged weight is W + dW, added in fp32, and then rounded to bf16.
    """
    model = get_peft_model(base().to(torch.bfloat16), rasa(target_modules=["q_proj"]))
    randomise(model)
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    A = torch.cat([layer.rasa_A["default"].weight, pool(model, "A_S")])
    B = torch.cat([layer.rasa_B["default"].weight, pool(model, "B_S")], 1)
    wanted = layer.base_layer.weight.float() + (B * layer.rasa_mixing["default"].weight) @ A
    merged = model.merge_and_unload().model.layers[1].self_attn.q_proj.weight
    assert torch.equal(merged, wanted.to(torch.bfloat16))


def pool(model: nn.Module, name: str) -> Tensor:
    (tensor,) = [p for n, p in model.named_parameters() if n.endswith(name)]
    return tensor.detach()


def test_adapters_load_without_a_copy_in_memory(base, saved) -> None:
    """huggingface/peft#2156: the models of tasks did not pass low_cpu_mem_usage on to add_adapter.

    Here: both the first and a further adapter are loaded over empty tensors; none stays empty, and no bit differs.
    """
    model = PeftModelForCausalLM.from_pretrained(base(), saved[0], low_cpu_mem_usage=True)
    assert torch.equal(logits(model), saved[1])
    model.load_adapter(saved[0], "second", low_cpu_mem_usage=True)
    model.set_adapter("second")
    assert torch.equal(logits(model), saved[1]) and not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_the_dtype_of_adapters_is_the_one_asked_for(base, saved, low_cpu_mem_usage) -> None:
    """huggingface/peft#2421: adapters of a half-precision model were loaded in fp32, whatever was asked for.

    Here: they are in fp32 without loss, and with autocast_adapter_dtype=False in the dtype of the base.
    """
    half = {"low_cpu_mem_usage": low_cpu_mem_usage, "autocast_adapter_dtype": False}
    model = PeftModel.from_pretrained(base().to(torch.bfloat16), saved[0], **half)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert_close(logits(model).float(), saved[1], rtol=0, atol=0.2)
    model = PeftModel.from_pretrained(base().to(torch.bfloat16), saved[0], low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(pool(model, "q_proj.A_S"), load_file(saved[0] / "adapter_model.safetensors")[POOL])


POOL = "base_model.model.model.layers.0.self_attn.q_proj.rasa_train_pools.self_attn__q_proj.A_S"


def test_rows_of_one_batch_use_different_adapters(base, saved) -> None:
    """huggingface/peft#2283: a batch for several adapters could not be generated with beam search.

    Here: each row gets the update of its adapter or none, in a forward pass and with beams.
    """
    model = get_peft_model(base(), rasa())
    randomise(model)
    alone = {"__base__": logits(base()), "default": logits(model), "other": saved[1]}
    model.load_adapter(saved[0], "other")
    names = ["other", "__base__", "default"]
    mixed = logits(model, adapter_names=names)
    for i, name in enumerate(names):
        assert_close(mixed[i], alone[name][i], rtol=1e-4, atol=1e-5)
    options = {"num_beams": 2, "max_new_tokens": 3, "do_sample": False}
    out = model.generate(input_ids=TOKENS, adapter_names=names, **options)
    assert torch.equal(out[2], model.generate(input_ids=TOKENS, **options)[2])
    with model.disable_adapter():
        assert torch.equal(out[1], model.generate(input_ids=TOKENS, **options)[1])


def test_unknown_adapter_names_are_refused(base) -> None:
    """huggingface/peft#2090: rows with a mistyped adapter name silently got the output of the base.

    Here: an unknown name is an error, as are a list of the wrong length, merged adapters and training.
    """
    model = get_peft_model(base(), rasa())
    with pytest.raises(ValueError, match="defualt"):
        logits(model, adapter_names=["default", "defualt", "__base__"])
    with pytest.raises(ValueError, match="each of the 3 rows, got 2"):
        logits(model, adapter_names=["default"] * 2)
    with pytest.raises(ValueError, match="training"):
        model.train()(input_ids=TOKENS, adapter_names=["default"] * 3)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        logits(model, adapter_names=["default"] * 3)


@pytest.mark.parametrize("bias", ["all", "rasa_only"])
def test_trained_biases_are_saved(tmp_path, bias) -> None:
    """huggingface/peft#3306: bias="lora_only" trained the biases of adapted linears but did not save them.

    Here: they are trained, saved and loaded, with both settings.
    """
    torch.manual_seed(0)
    plain = Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()
    model = get_peft_model(copy.deepcopy(plain), rasa(bias=bias, target_modules=["q_proj"]))
    assert sum(name.endswith(".bias") for name in trained(model)) == (6 if bias == "all" else 2)
    randomise(model)
    model.save_pretrained(tmp_path)
    assert_close(logits(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)), logits(model))


def test_adapters_save_different_modules(base, tmp_path) -> None:
    """huggingface/peft#2422: a second adapter with other modules_to_save could not be loaded.

    Here: each adapter keeps its own modules, and switching between them gives each one's output.
    """
    model = get_peft_model(base(), rasa(modules_to_save=["lm_head"]))
    randomise(model)
    first = logits(model)
    model.add_adapter("second", rasa(modules_to_save=["norm"], target_modules=["up_proj"]))
    model.set_adapter("second")
    randomise(model, seed=2)
    second = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    again.load_adapter(tmp_path / "second", "second")
    assert_close(logits(again), first)
    again.set_adapter("second")
    assert_close(logits(again), second)


def test_transformers_loads_what_peft_saved(base, saved, tmp_path) -> None:
    """huggingface/sentence-transformers#3865: transformers loaded an adapter, dropped its weights and kept silent.

    Here: transformers' load_adapter and add_adapter read and write the pools too, in both directions.
    """
    model = base()
    info = model.load_adapter(saved[0])
    assert not info.missing_keys and not info.unexpected_keys and torch.equal(logits(model), saved[1])
    model = base()
    model.add_adapter(rasa())
    assert sum("_S" in name for name in trained(model)) == 14
    randomise(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "own")
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path / "own")), expected)
    model = base()
    model.load_adapter(tmp_path / "own", low_cpu_mem_usage=True)
    assert torch.equal(logits(model), expected)


def test_deleting_an_adapter_leaves_none_of_its_tensors(base) -> None:
    """huggingface/transformers#41252: transformers' delete_adapter left modules of the adapter in the model.

    Here: the adapter's tensors, pools and settings are gone, and the other adapter works as before.
    """
    model = base()
    model.add_adapter(rasa(), "first")
    randomise(model)
    expected = logits(model)
    model.add_adapter(rasa(r=2), "second")
    model.delete_adapter("second")
    model.set_adapter("first")
    assert torch.equal(logits(model), expected)
    assert not any(".second" in name for name, _ in model.named_modules()) and list(model.peft_config) == ["first"]


def test_shared_tensors_are_saved_once(base, saved) -> None:
    """adapter-hub/adapters#763: tensors that layers share could not be saved, because several names led to them.

    Here: a pool has one name, in the model and in the file, and the layers that share it find it after a copy.
    """
    names = [name for name in load_file(saved[0] / "adapter_model.safetensors") if "_S" in name]
    assert len(names) == 14 and all(".layers.0." in name for name in names)
    model = PeftModel.from_pretrained(base(), saved[0])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(logits(twin), saved[1])


def test_an_active_adapter_beside_a_merged_one_counts(base, saved) -> None:
    """huggingface/peft#3763: of two active adapters, the one that was not merged was silently not applied.

    Here: its update is added to the merged weights.
    """
    model = get_peft_model(base(), rasa())
    randomise(model)
    model.load_adapter(saved[0], "other")
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model)
    model.merge_adapter(["other"])
    assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
