"""Reports of others about merging and exporting, and what happens here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from rasa_train.adapters.saved import tokenizer_files, write_tokenizer
from rasa_train.errors import UserError
from rasa_train.evaluate.load import merge_in_memory
from rasa_train.io.checkpoint_files import INDEX
from rasa_train.merging.lora import export_lora
from rasa_train.merging.merged import check_base, merge
from rasa_train.merging.peft_format import export_peft
from rasa_train.merging.source import open_source
from rasa_train.models.config import ModelConfig
from rasa_train.models.load import load_model, meta_model

from ..conftest import Cli
from ..merge.conftest import load, logits, save_adapter, save_base

DEMO = ModelConfig(name="demo").name
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
    """thinking-machines-lab/tinker-cookbook#593: a merge took the head and the embedding of a tied model for two
    tensors, of which the file holds one.

    Here: tied names are one parameter, whichever of them the file holds, and all that it holds are the trained one.
    """
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
    """hiyouga/LlamaFactory#10832: a config that ties what the file holds with different values made one of them replace
    the other.

    Here: the merge looks at the values, as loading the model does, and keeps both.
    """
    base = stored_twice(save_base(tmp_path / "base", "tied"), torch.randn(64, 32))
    wanted = save_adapter(tmp_path / "adapter", base, "full")
    merge(tmp_path / "adapter", tmp_path / "out")
    assert same(logits(load(tmp_path / "out")), wanted)


@pytest.mark.parametrize("kind", ["tied", "gpt2"])
@pytest.mark.parametrize("more", [{}, {"ensure_weight_tying": True}, {"modules_to_save": ["lm_head"]}])
def test_a_head_with_its_own_update_is_untied(tmp_path: Path, kind: str, more: dict[str, object]) -> None:
    """huggingface/transformers#45127: a merged LM head was lost when the model was loaded, because the config still
    tied it to the embedding.

    Here: a head whose update is not the embedding's is written as a tensor of its own, and the config says so. PEFT's
    merge in place does not reach the embedding.
    """
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


@pytest.mark.parametrize("targets", ["all-linear", ["gate_proj", "o_proj"]], ids=str)
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
    with pytest.raises(UserError, match=r"PEFT does not load .* use --format lora"):
        export_peft(tmp_path / "adapter", tmp_path / "out")
    assert export_lora(tmp_path / "adapter", tmp_path / "lora").peft_loads and not (tmp_path / "out").exists()


def test_a_linear_that_peft_refuses_is_named(tmp_path: Path) -> None:
    """huggingface/peft#2556: a LoRA of Mamba's out_proj, which a fused kernel reads past the adapter, had no effect or
    failed when it was merged.

    Here: an export with it ends before anything is written, with the linear and with what works.
    """
    base = save_base(tmp_path / "base", "mamba")
    save_adapter(tmp_path / "adapter", base, targets=["in_proj", "out_proj"])
    with pytest.raises(UserError, match=r"out_proj.*--format merged"):
        export_lora(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


PLACES: dict[str, dict[str, object]] = {
    "exclude": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "exclude-pattern": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.0\..*"},
    "layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "pattern": {"target_modules": r".*\.[12]\.self_attn\.(q|v)_proj"},
    "ranks": {"target_modules": r".*proj", "rank_pattern": {"q_proj": 2, r"1\.mlp\.up_proj": 6}},
    "parameters": {"target_modules": ["q_proj"], "target_parameters": ["up_proj.weight"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "bias": {"target_modules": ["q_proj"], "lora_bias": False, "use_dora": True, "exclude_modules": ["k_proj"]},
}  # fmt: skip


def save_changed(model: PeftModel, directory: Path) -> None:
    """Save an adapter of PEFT whose trained tensors all have other values than at first."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(directory)


@pytest.mark.parametrize("kind", PLACES)
def test_an_adapter_of_peft_is_merged_as_peft_merges(tmp_path: Path, kind: str) -> None:
    """huggingface/peft#1035: merging changed what the model answers, depending on how the targets were chosen.

    Here: whatever keys the configuration selects its targets with, the merged model computes what PEFT computes. What
    this package has no method for (an LM head, embeddings, saved modules) is merged by PEFT's own code.
    """
    base = save_base(tmp_path / "base")
    torch.manual_seed(3)
    model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **PLACES[kind]))
    save_changed(model, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "out", base=str(base))
    wanted = logits(model)
    assert not same(logits(load(base)), wanted)
    assert same(logits(load(tmp_path / "out")), wanted)


def test_other_methods_of_peft_are_read(tmp_path: Path) -> None:
    """huggingface/trl#386: a script that merged an adapter gave back the weights of the base.

    Here: files of any method of PEFT that changes weights are merged by PEFT's code; the others end with the reason.
    """
    base = save_base(tmp_path / "base")
    torch.manual_seed(3)
    model = get_peft_model(load(base), LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    save_changed(model, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "out", base=str(base))
    assert same(logits(load(tmp_path / "out")), logits(model))
    get_peft_model(load(base), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(
        tmp_path / "p"
    )
    with pytest.raises(UserError, match=r"PREFIX_TUNING cannot be merged"):
        merge(tmp_path / "p", tmp_path / "prefix", base=str(base))


def test_new_tokens_are_named(tmp_path: Path) -> None:
    """axolotl-ai-cloud/axolotl#2277: an adapter with more tokens than the base ended in a list of size mismatches.

    Here: the message says how many tokens the adapter was trained with, and how to make a base that it fits. That base
    is then merged.
    """
    base = save_base(tmp_path / "base", "tied")
    wide = load(base)
    wide.resize_token_embeddings(70)
    model = get_peft_model(wide, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(UserError, match=r"resize_token_embeddings\(70\)"):
        merge(tmp_path / "adapter", tmp_path / "out", base=str(base))
    again = load(base)
    again.resize_token_embeddings(70)
    again.save_pretrained(tmp_path / "wide")
    merge(tmp_path / "adapter", tmp_path / "out", base=str(tmp_path / "wide"))
    assert same(logits(load(tmp_path / "out")), logits(model))


def test_the_tokenizer_of_training_is_merged(tmp_path: Path, cli: Cli) -> None:
    """unslothai/unsloth#188: the chat template and the end token that were trained with were lost when the model was
    saved.

    Here: an adapter that was trained with a tokenizer of its own holds it, and merges, exports and evaluations use it.
    """
    base = Path(shutil.copytree(DEMO, tmp_path / "base"))
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(tmp_path / "words")
    (tmp_path / "words" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}!")
    adapter = tmp_path / "adapter"
    save_adapter(adapter, base, tokens=torch.ones(1, 2, dtype=torch.long))
    write_tokenizer(adapter, ModelConfig(name=str(base), tokenizer=str(tmp_path / "words")))
    done = cli("merge", adapter, "--output", "out", check=True)
    assert "the tokenizer is the one that was trained with" in done.stdout
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template.endswith("!")
    assert not str(AutoTokenizer.from_pretrained(base).chat_template).endswith("!")
    export_lora(adapter, tmp_path / "lora")
    assert tokenizer_files(tmp_path / "lora") and not tokenizer_files(tmp_path / "out" / "none")


def test_a_relative_base_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """unslothai/unsloth#699: the base of an adapter was looked for on the hub although it is on this machine.

    Here: a relative path is recorded with the absolute one. If the base has moved, the same path below the directories
    above the adapter is tried, and then --base is asked for: the hub never is.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    save_base(Path("models/base"))
    save_adapter(Path("runs/adapter"), Path("models/base"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert open_source("../runs/adapter", None, weights=True).directory == tmp_path / "models" / "base"
    moved = shutil.move(tmp_path / "models", tmp_path / "runs" / "models")
    assert open_source("../runs/adapter", None, weights=True).directory == Path(moved) / "base"
    shutil.rmtree(moved)
    with pytest.raises(UserError, match=r"when the adapter was trained.*--base"):
        open_source("../runs/adapter", None, weights=True)


def test_an_adapter_beside_the_base_is_not_loaded_unasked(tmp_path: Path) -> None:
    """huggingface/transformers#43781: a directory that held a model and an adapter was loaded as the base that the
    adapter names.

    Here: training, its check, merging and evaluating refuse such a base and say which file is too much.
    """
    base = save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapter", base)
    get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(base)
    for opened in (load_model, meta_model):
        with pytest.raises(UserError, match=r"a whole model and an adapter"):
            opened(ModelConfig(name=str(base)))
    with pytest.raises(UserError, match=r"base model: .* a whole model and an adapter"):
        merge(tmp_path / "adapter", tmp_path / "out")


def test_a_prompt_method_is_written_for_peft(tmp_path: Path) -> None:
    """huggingface/peft#1030: merging after prompt tuning ended in an AttributeError, right after training and later.

    Here: prefix and prompt tuning say before and after training that they cannot be merged, and are written for PEFT.
    """
    base = save_base(tmp_path / "base")
    config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}
    wanted = save_adapter(tmp_path / "adapter", base, "peft", config=config)
    with pytest.raises(UserError, match=r"PREFIX_TUNING cannot be merged.*--format peft"):
        merge(tmp_path / "adapter", tmp_path / "out")
    export_peft(tmp_path / "adapter", tmp_path / "out")
    model = PeftModel.from_pretrained(load(base), tmp_path / "out")
    assert same(logits(model)[:, -wanted.shape[1] :], wanted) and not same(logits(load(base)), wanted)


def test_a_base_that_a_merge_would_refuse_is_seen_before(tmp_path: Path) -> None:
    """Blaizzy/mlx-vlm#1827: with an index that no longer belonged to its files, a part of the weights was loaded, and a
    much later error named tensors instead of the cause.

    Here: the check before training opens the base as the merge will, so that a stale index is found at once.
    """
    base = save_base(tmp_path / "base", shards="20KB")
    check_base(base)
    index = json.loads((base / INDEX).read_text())
    index["weight_map"]["model.gone.weight"] = next(iter(index["weight_map"].values()))
    (base / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model.gone.weight"):
        check_base(base)
