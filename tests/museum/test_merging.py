"""Reports of others about merging and exporting, and what happens here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from rasa_train.errors import UserError
from rasa_train.evaluate.load import merge_in_memory
from rasa_train.merging.lora import export_lora
from rasa_train.merging.merged import merge
from rasa_train.merging.peft_format import export_peft
from rasa_train.merging.source import open_source
from rasa_train.models.config import ModelConfig
from rasa_train.models.load import load_model

from ..merge.conftest import load, logits, save_adapter, save_base

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def stored_twice(base: Path, head: Tensor | None = None) -> Path:
    """Let the file of a tied base hold the LM head beside the embedding, as many published files do."""
    tensors = load_file(base / "model.safetensors")
    head = tensors[EMBEDDING].clone() if head is None else head
    save_file(tensors | {HEAD: head}, base / "model.safetensors", {"format": "pt"})
    return base


def same(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() < 1e-4)


@pytest.mark.parametrize("stored", ["embedding", "both", "head"])
def test_a_tied_head_that_is_stored_too_is_the_trained_one(tmp_path: Path, stored: str) -> None:
    base = save_base(tmp_path / "base", "tied")
    if stored != "embedding":
        stored_twice(base)
    if stored == "head":
        tensors = load_file(base / "model.safetensors")
        del tensors[EMBEDDING]
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
    wanted = save_adapter(tmp_path / "adapter", base, "full")
    merge(tmp_path / "adapter", tmp_path / "out")
    assert same(logits(load(tmp_path / "out")), wanted)
    held = {name for name in load_file(tmp_path / "out" / "model.safetensors") if name in (HEAD, EMBEDDING)}
    assert held == {name for name in load_file(base / "model.safetensors") if name in (HEAD, EMBEDDING)}


def test_names_with_different_values_are_not_tied(tmp_path: Path) -> None:
    base = stored_twice(save_base(tmp_path / "base", "tied"), torch.randn(64, 32))
    wanted = save_adapter(tmp_path / "adapter", base, "full")
    merge(tmp_path / "adapter", tmp_path / "out")
    assert same(logits(load(tmp_path / "out")), wanted)


@pytest.mark.parametrize("kind", ["tied", "gpt2"])
@pytest.mark.parametrize("more", [{}, {"ensure_weight_tying": True}, {"modules_to_save": ["lm_head"]}])
def test_a_head_with_its_own_update_is_untied(tmp_path: Path, kind: str, more: dict[str, object]) -> None:
    base = save_base(tmp_path / "base", kind)
    linear = "q_proj" if kind == "tied" else "c_attn"
    targets = [linear] if "modules_to_save" in more else [linear, "lm_head"]
    config = {"peft_type": "LORA", "r": 4, "target_modules": targets, **more}
    wanted = save_adapter(tmp_path / "adapter", base, "peft", config=config)
    merge(tmp_path / "adapter", tmp_path / "out")
    assert same(logits(load(tmp_path / "out")), wanted)
    model = load_model(ModelConfig(name=str(base), dtype="float32"))
    merge_in_memory(model, open_source(tmp_path / "adapter", None, weights=True))
    assert same(logits(model), wanted)


@pytest.mark.parametrize("targets", ["all-linear", ["down_proj"], ["gate_proj", "o_proj"]], ids=str)
def test_peft_loads_linears_beside_fused_experts(tmp_path: Path, targets: str | list[str]) -> None:
    """huggingface/peft#3711: the targets of shared experts, which are ordinary linears, were taken for those of fused
    experts, so that an adapter of a DeepSeek or GLM model did not load.

    Here: the export names their weights as parameters, which PEFT leaves alone, and is loaded by PEFT before it is
    called exact. It is also read back.
    """
    base = save_base(tmp_path / "base", "deepseek_v3")
    save_adapter(tmp_path / "adapter", base, targets=targets)
    report = export_lora(tmp_path / "adapter", tmp_path / "lora")
    assert report.peft_loads
    merge(tmp_path / "adapter", tmp_path / "direct")
    merge(tmp_path / "lora", tmp_path / "via-lora")
    wanted = logits(load(tmp_path / "direct"))
    assert not same(logits(load(base)), wanted)
    assert same(logits(PeftModel.from_pretrained(load(base), tmp_path / "lora")), wanted)
    assert same(logits(load(tmp_path / "via-lora")), wanted)


def test_peft_own_format_is_loaded_too(tmp_path: Path) -> None:
    """huggingface/peft#3009: with fused experts, an adapter that earlier versions had saved could not be loaded.

    Here: an adapter in PEFT's own format that PEFT would take for one of the experts is refused, with the format that
    works.
    """
    base = save_base(tmp_path / "base", "deepseek_v3")
    save_adapter(tmp_path / "adapter", base, "lora", targets=["shared_experts.gate_proj", "shared_experts.up_proj"])
    with pytest.raises(UserError, match="PEFT does not load .* use --format lora"):
        export_peft(tmp_path / "adapter", tmp_path / "out")
    assert export_lora(tmp_path / "adapter", tmp_path / "lora").peft_loads and not (tmp_path / "out").exists()


def test_a_linear_that_peft_refuses_is_named(tmp_path: Path) -> None:
    """huggingface/peft#2556: a LoRA of Mamba's out_proj, which a fused kernel reads past the adapter, had no effect or
    failed when it was merged.

    Here: an export with it ends before anything is written, with the linear and with what works.
    """
    base = save_base(tmp_path / "base", "mamba")
    save_adapter(tmp_path / "adapter", base, targets=["in_proj", "out_proj"])
    with pytest.raises(UserError, match="out_proj.*--format merged"):
        export_lora(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
