"""Merged and exported classifiers: what transformers and PEFT load computes what the adapted model does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from rasa_train import adapt, load_adapter, merge, save_adapter
from rasa_train.adapters.registry import METHODS
from rasa_train.adapters.saved import read_adapter
from rasa_train.adapters.state import trainable
from rasa_train.errors import UserError
from rasa_train.merging import export_lora, export_peft, verify
from rasa_train.merging import merge as merge_checkpoint
from rasa_train.merging.merged import check_base
from rasa_train.merging.parameters import Weights
from rasa_train.models.classifier import head_parameters
from rasa_train.models.config import ModelConfig
from rasa_train.models.load import load_model
from rasa_train.models.task import Head
from tests.tiny_models import tiny_model

from .conftest import FIELDS

HEAD = Head(("no", "yes", "maybe"))
TOKENS = torch.randint(3, 60, (3, 11), generator=torch.Generator().manual_seed(5))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=TOKENS).logits.float()
    return result


def trained(directory: Path, kind: str, name: str, *, of: str = "classifier", dtype: str = "float32") -> Tensor:
    """Save a base (a whole ``lm`` or ``classifier`` of two labels, or only its ``encoder``), and an adapter of random
    values for three labels. Returns the logits of the adapted model."""
    stored = tiny_model(kind, labels=2) if of != "lm" else tiny_model(kind)
    (stored.base_model if of == "encoder" else stored).to(getattr(torch, dtype)).save_pretrained(directory / "base")
    model = load_model(ModelConfig(name=str(directory / "base"), dtype=dtype), HEAD, 3)
    adapt(model, METHODS[name].model_validate({"method": name, **FIELDS.get(name, {})}))
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    save_adapter(model, directory / "adapter")
    return logits(model)


def slow(*kinds: str) -> list[object]:
    return [pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


@pytest.mark.parametrize("of", ["classifier", "encoder"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta-v2", *slow("modernbert", "electra", "llama", "gpt2")])
def test_transformers_loads_the_merged_classifier(kind: str, of: str, tmp_path: Path) -> None:
    expected = trained(tmp_path, kind, "rasa", of=of)
    report = merge_checkpoint(tmp_path / "adapter", tmp_path / "merged")
    merged, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert merged.config.id2label == dict(enumerate(HEAD.labels)) and merged.config.label2id["maybe"] == 2
    assert merged.config.problem_type == "single_label_classification" and merged.config.pad_token_id is not None
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert set(written) == {name for name, _ in merged.named_parameters()}
    assert report.tensors == len(written) and report.rounding == pytest.approx(0, abs=1e-6)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == [type(merged).__name__]


def test_heads_of_language_models_are_left_out(tmp_path: Path) -> None:
    expected = trained(tmp_path, "roberta", "lora", of="lm")
    merge_checkpoint(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert not any("lm_head" in name for name in load_file(tmp_path / "merged" / "model.safetensors"))


def test_merged_shards_have_an_index_of_their_own_tensors(tmp_path: Path) -> None:
    expected = trained(tmp_path, "roberta", "rasa", of="lm")
    model = tiny_model("roberta")
    (tmp_path / "base" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    merge_checkpoint(tmp_path / "adapter", tmp_path / "merged", threads=1)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())["weight_map"]
    held = {name: path.name for path in (tmp_path / "merged").glob("*.safetensors") for name in load_file(path)}
    assert index == held and len(set(index.values())) > 2
    assert_close(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")), expected)


QUICK = ("rasa", "full", "bitfit", "dora")


@pytest.mark.parametrize("name", [*QUICK, *slow(*sorted(set(FIELDS) - {"peft", *QUICK}))])
def test_every_method_trains_the_head_and_merges(name: str, tmp_path: Path) -> None:
    expected = trained(tmp_path, "roberta", name)
    saved = read_adapter(tmp_path / "adapter")
    assert saved.head == HEAD
    assert "classifier.out_proj.weight" in saved.tensors and saved.tensors["classifier.out_proj.weight"].shape[0] == 3
    merge_checkpoint(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert_close(logits(merged), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["roberta", "deberta-v2", *slow("bert", "modernbert", "llama", "gpt2")])
@pytest.mark.parametrize(("export", "name"), [(export_lora, "rasa"), (export_peft, "lora")])
def test_peft_computes_what_the_adapted_classifier_does(kind: str, export: object, name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    expected = trained(tmp_path, kind, name)
    report = export(tmp_path / "adapter", tmp_path / "out")  # type: ignore[operator]
    assert report.peft_loads
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True
    )
    assert_close(logits(PeftModel.from_pretrained(base, str(tmp_path / "out"))), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_memory_as_on_disk(dtype: str, tmp_path: Path) -> None:
    expected = trained(tmp_path, "roberta", "rasa", of="encoder", dtype=dtype)
    model = load_model(ModelConfig(name=str(tmp_path / "base"), dtype=dtype), HEAD, 7)
    load_adapter(model, tmp_path / "adapter")
    assert_close(logits(model), expected)
    merge(model)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    merge_checkpoint(tmp_path / "adapter", tmp_path / "merged")
    on_disk = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype="auto")
    assert all(torch.equal(p, on_disk.get_parameter(name)) for name, p in model.named_parameters())
    assert_close(logits(model), logits(on_disk))


def test_verify_compares_the_labels(tmp_path: Path) -> None:
    expected = trained(tmp_path, "deberta-v2", "rasa", of="encoder")
    merge_checkpoint(tmp_path / "adapter", tmp_path / "merged")
    report = verify(tmp_path / "adapter", tmp_path / "merged", exact=True)
    assert report.logits < 1e-5 < report.adapter_logits and report.tokens == report.prompts and report.kl < 1e-6
    assert abs(report.loss_difference) < 1e-5 and report.loss < torch.tensor(3.0).log()
    assert expected.shape == (3, 3)


def test_adapter_without_its_head_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    trained(tmp_path, "roberta", "lora")
    path = tmp_path / "adapter" / "adapter.safetensors"
    tensors = load_file(path)
    lost = min(name for name in head_parameters(tiny_model("roberta", labels=3)) if name in tensors)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, path)
    (tmp_path / "adapter" / "checksums.json").unlink(missing_ok=True)
    for file in (tmp_path / "adapter").iterdir():
        if file.suffix not in (".json", ".safetensors"):
            file.unlink()
    with pytest.raises(UserError, match=rf"does not fit .*missing \(first: {lost}"):
        merge_checkpoint(tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("task", [{"name": "classification", "labels": 3}, "translation", [1]])
def test_a_damaged_task_is_refused(task: object, tmp_path: Path) -> None:
    trained(tmp_path, "roberta", "lora")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["task"] == {"name": "classification", "labels": ["no", "yes", "maybe"], "problem": "single_label"}
    from rasa_train.io.checksums import CHECKSUMS

    (tmp_path / "adapter" / CHECKSUMS).unlink()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "task": task}))
    with pytest.raises(UserError, match=r"adapter_config\.json: task"):
        read_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["deberta-v2", "roberta"])
def test_a_base_is_checked_and_read_as_a_classifier(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind, labels=2)
    model.save_pretrained(tmp_path)
    check_base(tmp_path, HEAD)  # of another shape, which a merge replaces
    weights = Weights(tmp_path)
    assert all(torch.equal(weights.read(name), parameter) for name, parameter in model.named_parameters())
