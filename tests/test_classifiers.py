"""Bases opened as sequence classifiers: which head they get, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from rasa_train import LoRA, RaSA, adapt
from rasa_train.adapters.inject import adapt as attach_any
from rasa_train.adapters.registry import METHODS
from rasa_train.adapters.shared_input import packable
from rasa_train.adapters.state import groups, trainable
from rasa_train.errors import UserError
from rasa_train.models.classifier import head_of, head_parameters
from rasa_train.models.config import ModelConfig
from rasa_train.models.load import check_base, empty_model, load_config, load_model, meta_model, tied_groups
from rasa_train.models.padding_free import check_packable
from rasa_train.models.task import Head
from tests.tiny_models import ENCODERS, tiny_model

TWO = Head(("no", "yes"))
KINDS = (*ENCODERS, "llama", "gpt2")


def saved(model: nn.Module, directory: Path) -> ModelConfig:
    model.save_pretrained(directory)  # type: ignore[operator]
    return ModelConfig(name=str(directory), dtype="float32")


@pytest.mark.parametrize("kind", KINDS)
def test_new_head_comes_from_the_seed_and_the_rest_from_the_files(kind: str, tmp_path: Path) -> None:
    stored = tiny_model(kind, labels=3)
    config = saved(stored.base_model, tmp_path)
    torch.manual_seed(1)
    model = load_model(config, TWO, 5)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    same, other = load_model(config, TWO, 5), load_model(config, TWO, 6)
    torch.manual_seed(1)
    load_model(config, TWO, 6)
    assert torch.equal(torch.get_rng_state(), state)  # drawing the head leaves no trace
    head = head_parameters(model)
    for name, parameter in model.named_parameters():
        if name in head:
            assert torch.equal(parameter, same.get_parameter(name)), name
        else:
            assert torch.equal(parameter, stored.get_parameter(name)), name
    assert any(not torch.equal(parameter, other.get_parameter(name)) for name, parameter in head.items())
    outputs = model(input_ids=torch.tensor([[5, 6, 7], [8, 9, 10]])).logits
    assert outputs.shape == (2, 2) and outputs.abs().max() < 3
    assert head_of(model.config) == TWO and model.config.num_labels == 2
    for opened in (check_base(config, TWO), meta_model(config, TWO), empty_model(config, tied_groups(model), TWO)):
        assert {n: p.shape for n, p in opened.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "drawn"),
    [
        ("roberta", {"classifier.out_proj.weight", "classifier.out_proj.bias"}),
        ("deberta-v2", {"classifier.weight", "classifier.bias"}),
        ("bert", {"classifier.weight", "classifier.bias"}),
        ("llama", {"score.weight"}),
    ],
)
def test_head_of_the_base_is_kept_if_it_fits(
    kind: str, drawn: set[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored = tiny_model(kind, labels=3)
    config = saved(stored, tmp_path)
    kept = load_model(config, Head(("entailment", "neutral", "contradiction")), 5)
    assert all(torch.equal(p, stored.get_parameter(n)) for n, p in kept.named_parameters())
    assert kept.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}
    with caplog.at_level(logging.WARNING):
        other = load_model(config, TWO, 5)
    assert "the head of" in caplog.text and "drawn anew" in caplog.text
    equal = {n for n, p in other.named_parameters() if p.shape == stored.get_parameter(n).shape and n not in drawn}
    assert equal == {n for n, _ in other.named_parameters()} - drawn
    assert all(torch.equal(other.get_parameter(n), stored.get_parameter(n)) for n in equal)


def test_missing_weights_of_the_encoder_are_still_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    config = saved(tiny_model("roberta", labels=2).base_model, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if "layer.1.attention.self.key.weight" in name)
    del tensors[lost]
    save_file(tensors, path, metadata={"format": "pt"})
    for opened in (load_model, check_base):
        with pytest.raises(UserError, match=r"files lack .*layer\.1\.attention\.self\.key\.weight"):
            opened(config, TWO)


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "deberta-v2", "modernbert"])
def test_encoder_as_a_language_model_is_told_of_classification(kind: str, tmp_path: Path) -> None:
    config = saved(tiny_model(kind, labels=2).base_model, tmp_path)
    with pytest.raises(UserError, match="set task: classification"):
        check_base(config)


def test_no_classifier_of_this_architecture(tmp_path: Path) -> None:
    from transformers import Mamba2Config, T5Config

    for architecture, why in ((Mamba2Config(), "no sequence classifier"), (T5Config(), "an encoder and a decoder")):
        architecture.save_pretrained(tmp_path)
        with pytest.raises(UserError, match=f"task: .* has {why}"):
            meta_model(ModelConfig(name=str(tmp_path)), TWO)


def test_decoder_without_a_padding_token_gets_one(tmp_path: Path) -> None:
    """transformers reads a decoder at the last token that is not padding."""
    model = tiny_model("llama")
    model.config.pad_token_id = None
    config = saved(model, tmp_path)
    assert load_config(config, TWO).pad_token_id == model.config.eos_token_id
    assert load_config(config).pad_token_id is None
    classifier = load_model(config, TWO)
    text = torch.tensor([[5, 6, 7, 8]])
    padded = torch.cat([text, torch.full((1, 3), 2)], 1)
    with torch.no_grad():
        alone = classifier(input_ids=text).logits
        beside = classifier(input_ids=padded, attention_mask=(padded != 2).long()).logits
    torch.testing.assert_close(alone, beside)


def test_classifiers_are_not_packed(tmp_path: Path) -> None:
    for kind in ("roberta", "llama"):
        with pytest.raises(UserError, match=r"training\.batching: classifiers are trained with padding"):
            check_packable(tiny_model(kind, labels=2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapted_classifier_trains_its_head_in_fp32_on_the_fast_path(kind: str, dtype: torch.dtype) -> None:
    model = tiny_model(kind, labels=3).to(dtype)
    ids = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    ids = ids.masked_fill(mask == 0, model.config.pad_token_id)
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
    head = set(head_parameters(model))
    adapt(model, RaSA(r=4, k=1, alpha=8))
    after = model(input_ids=ids, attention_mask=mask).logits
    assert after.dtype == torch.float32
    torch.testing.assert_close(after, before.float(), atol=0 if dtype == torch.float32 else 0.01, rtol=0)
    after.square().sum().backward()
    trained = trainable(model)
    assert head < set(trained) and all(p.dtype == torch.float32 for p in trained.values())
    assert all(p.grad is not None for p in trained.values())
    assert all(map(packable, groups(model)))
    sizes = [len(group.members) for group in groups(model)]
    assert (3 in sizes) == (kind not in ("gpt2", "modernbert"))  # q, k and v are one linear there


def test_config_names_labels_and_problem(tmp_path: Path) -> None:
    config = saved(tiny_model("roberta", labels=2), tmp_path)
    for head, problem in (
        (Head(("a", "b", "c"), "multi_label"), "multi_label_classification"),
        (Head((), "regression"), "regression"),
        (TWO, "single_label_classification"),
    ):
        architecture = load_config(config, head)
        architecture.save_pretrained(tmp_path / "written")
        written = json.loads((tmp_path / "written" / "config.json").read_text())
        assert written["problem_type"] == problem
        assert written["id2label"] == {str(i): label for i, label in enumerate(head.labels or ("LABEL_0",))}
        assert head_of(architecture) == head and architecture.num_labels == head.outputs


def test_lora_trains_the_head_as_peft_does() -> None:
    """PEFT trains the head of a classifier whole, beside the adapter: the same values are trained."""
    from peft import LoraConfig, get_peft_model

    ours = adapt(tiny_model("roberta", labels=3), LoRA(r=2, alpha=4, targets=["query", "value"]))
    theirs = get_peft_model(
        tiny_model("roberta", labels=3), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    )
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, theirs)]
    assert counts[0] == counts[1]


def test_methods_of_peft_do_not_train_a_classifier() -> None:
    method = METHODS["peft"].model_validate({"config": {"peft_type": "IA3"}})
    with pytest.raises(UserError, match=r"adapter\.method: peft cannot train a classifier"):
        attach_any(tiny_model("roberta", labels=2), method)
