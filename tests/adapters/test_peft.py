"""``method: peft``: PEFT's own wrapped model is the oracle, and the errors say what PEFT has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rasa_train.adapters.inject import adapt
from rasa_train.adapters.saved import load_tensors, read_adapter, write_adapter
from rasa_train.adapters.state import adapters, saved_tensors, trainable
from rasa_train.errors import UserError
from rasa_train.merging.lora import export_lora
from rasa_train.merging.merged import merge
from rasa_train.methods.from_peft import Peft
from rasa_train.methods.lora import LoRA

SHAPE = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
IDS = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 6:] = 0
LINEARS = {"target_modules": ["q_proj", "down_proj"]}
PROMPTS: dict[str, tuple[dict[str, Any], int]] = {  # and how many parameters are trained
    "PREFIX_TUNING": ({"num_virtual_tokens": 4}, 4 * 2 * 2 * 2 * 8),
    "PROMPT_TUNING": ({"num_virtual_tokens": 4}, 4 * 32),
    "P_TUNING": ({"num_virtual_tokens": 4, "encoder_hidden_size": 8}, 4 * 32 + 32 * 8 + 8 + 8 * 8 + 8 + 8 * 32 + 32),
}
LAYERS: dict[str, tuple[dict[str, Any], int]] = {
    "IA3": ({"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, 2 * (16 + 48)),
    "LOHA": ({"r": 3, **LINEARS}, 2 * 2 * 3 * (64 + 80)),
    "LOKR": ({"r": 3, "decompose_factor": 4, **LINEARS}, 0),
    "OFT": ({"oft_block_size": 8, "r": 0, **LINEARS}, 2 * (32 + 48) // 8 * 28),
    "LN_TUNING": ({"target_modules": ["input_layernorm"]}, 2 * 32),
    "LORA": ({"r": 3, "modules_to_save": ["lm_head"], **LINEARS}, 2 * 3 * (64 + 80) + 64 * 32),
}
EVERY = PROMPTS | LAYERS


def method(kind: str) -> Peft:
    return Peft(config={"peft_type": kind, **EVERY[kind][0]})


def base(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(SHAPE).to(dtype).eval()


def perturbed(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in trainable(model).values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits[MASK.bool()].float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", EVERY)
def test_trained_saved_and_loaded(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    before = logits(base(dtype))
    if dtype == torch.bfloat16 and kind in ("LN_TUNING", "LORA"):  # these train copies of the base's own weights
        with pytest.raises(UserError, match=r"model\.dtype must be float32"):
            adapt(base(dtype), method(kind))
        return
    model, sites = adapt(base(dtype), method(kind))
    parameters = trainable(model)
    assert sites == [] and not adapters(model) and all(p.dtype == torch.float32 for p in parameters.values())
    if count := EVERY[kind][1]:
        assert sum(p.numel() for p in parameters.values()) == count
    if kind in LAYERS:
        assert_close(logits(model), before, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
    perturbed(model)
    model.train()
    out = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    assert out.shape == (3, 9, 64), "no logits of virtual tokens"
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in parameters.values())
    model.eval()
    write_adapter(tmp_path, method(kind), saved_tensors(model), base_model="b", base_revision=None)
    saved = read_adapter(tmp_path)
    assert saved.method == method(kind) and saved.tensors.keys() == parameters.keys()
    again, _ = adapt(base(dtype), saved.method)
    load_tensors(again, saved.tensors, origin="test")
    assert torch.equal(logits(again), logits(model))
    assert (logits(again) - before).abs().max() > 1e-3


def test_it_is_pefts_model() -> None:
    torch.manual_seed(3)
    model, _ = adapt(base(), method("PREFIX_TUNING"))
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    theirs = peft.get_peft_model(base(), config)
    theirs.load_state_dict(model.state_dict())
    assert_close(logits(model.eval()), logits(theirs.eval()), rtol=0, atol=0)


@pytest.mark.parametrize("kind", LAYERS)
def test_merged(kind: str, tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    model, _ = adapt(base(), method(kind))
    perturbed(model)
    (tmp_path / "adapter").mkdir()
    tensors = saved_tensors(model)
    write_adapter(tmp_path / "adapter", method(kind), tensors, base_model=str(tmp_path / "base"), base_revision=None)
    report = merge(tmp_path / "adapter", tmp_path / "out")
    assert report.method == "peft" and report.adapted == {"LN_TUNING": 2, "LORA": 5}.get(kind, 4)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="--format merged"):
        export_lora(tmp_path / "adapter", tmp_path / "lora")


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_cannot_be_merged(kind: str, tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    model, _ = adapt(base(), method(kind))
    tensors = trainable(model)
    write_adapter(tmp_path, method(kind), tensors, base_model=str(tmp_path / "base"), base_revision=None)
    with pytest.raises(UserError, match=f"{kind} cannot be merged"):
        merge(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="activation_checkpointing must be false"):
        model.gradient_checkpointing_enable({"use_reentrant": False})


@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("kind", PROMPTS)
@torch.no_grad()
def test_generates_with_the_prompt(kind: str, how: dict[str, Any]) -> None:
    """Token by token, each text alone, is the oracle; padding on the left changes nothing; beams know their scores."""
    model = perturbed(adapt(base(), method(kind))[0])
    length, new = IDS.shape[1], 6
    mask = torch.ones_like(IDS)
    mask[1, :4] = mask[2, :2] = 0
    texts = [row[m.bool()][None] for row, m in zip(IDS, mask, strict=True)]

    def likelihood(text: Tensor) -> float:
        scores = model(input_ids=text).logits.log_softmax(-1)[:, -new - 1 : -1]
        return float(scores.gather(-1, text[:, -new:, None]).sum())

    greedy = []
    for text in texts:
        for _ in range(new):
            text = torch.cat([text, model(input_ids=text).logits[:, -1:].argmax(-1)], 1)
        greedy.append(text)
    options: dict[str, Any] = {
        "max_new_tokens": new,
        "min_new_tokens": new,
        "do_sample": False,
        "pad_token_id": 0,
        **how,
    }
    options |= {"return_dict_in_generate": True, "output_scores": True}
    found = model.generate(input_ids=IDS, attention_mask=mask, **options)  # type: ignore[operator]
    got = found.sequences
    assert torch.equal(got[:, :length], IDS) and got.shape == (3, length + new)
    if "num_beams" in how:
        for text, row, score in zip(texts, got, found.sequences_scores, strict=True):
            whole = torch.cat([text, row[None, length:]], 1)
            assert likelihood(whole) == pytest.approx(new * float(score), rel=1e-3)
    else:
        assert torch.equal(got[:, length:], torch.cat([text[:, -new:] for text in greedy]))
        theirs = base().generate(input_ids=IDS, attention_mask=mask, **options)
        assert not torch.equal(got, theirs.sequences)
    assert "forward" not in vars(model.base_model)


def test_activation_checkpointing_of_layers() -> None:
    gradients = []
    for checkpointing in (False, True):
        model, _ = adapt(base(), method("LOHA"))
        perturbed(model).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=IDS, use_cache=False).logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in trainable(model).items()})
    assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@pytest.mark.parametrize("kind", EVERY)
def test_counted_on_the_meta_device(kind: str) -> None:
    with torch.device("meta"):
        model, _ = adapt(LlamaForCausalLM(SHAPE), method(kind))
    count = sum(p.numel() for p in trainable(model).values())
    assert count == sum(p.numel() for p in trainable(adapt(base(), method(kind))[0]).values())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "HOULSBY"}, ["adapter.config.peft_type", "'HOULSBY'", "IA3, ", "PREFIX_TUNING", "bottleneck"]),
        ({}, ["adapter.config.peft_type", "got None"]),
        ({"peft_type": "IA3", "rank": 3}, ["IA3", "PEFT says", "'rank'"]),
        ({"peft_type": "IA3", "target_modules": ["nowhere"]}, ["IA3", "LlamaForCausalLM", "nowhere"]),
        ({"peft_type": "ADALORA"}, ["method: adalora"]),
        ({"peft_type": "VERA", **LINEARS}, ["frozen tensors", "save_projection: false"]),
    ],
)
def test_what_peft_cannot_do_is_said_before_training(config: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        adapt(base(), Peft(config=config))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert error.value.key == "adapter.config"


def test_peft_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install peft"):
        adapt(base(), method("IA3"))


def test_other_methods_are_put_into_the_model_itself() -> None:
    model = base()
    adapted, sites = adapt(model, LoRA())
    assert adapted is model and len(sites) == 14 and len(adapters(model)) == 14
