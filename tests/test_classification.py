"""The loss of classifiers is that of transformers, whatever the micro-batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from rasa_train.data.encode import IGNORE, Example
from rasa_train.models.classifier import set_head
from rasa_train.models.families import most_tokens
from rasa_train.models.task import Head
from rasa_train.objectives.classification import Classification

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 22,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
HEADS = {
    "single_label": Head(("a", "b", "c")),
    "multi_label": Head(("a", "b", "c"), "multi_label"),
    "regression": Head((), "regression"),
}


def classifier(kind: str, head: Head) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **SIZES, pad_token_id=1)
    set_head(config, head, 1)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def some_texts(head: Head, *, typed: bool) -> list[Example]:
    rng = np.random.default_rng(0)
    texts = []
    for length in (3, 20, 7, 12, 1):
        ids = rng.integers(2, 61, length).astype(np.int32)
        answer = {"single_label": rng.integers(0, 3, 1), "multi_label": rng.integers(0, 2, 3)}
        types = (np.arange(length) > length // 2).astype(np.int8) if typed else np.full(length, -1, np.int8)
        texts.append(Example(ids, answer.get(head.problem, rng.normal(size=1)).astype(np.float64), types))
    return texts


@pytest.mark.parametrize("problem", HEADS)
@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
def test_loss_and_gradients_are_those_of_transformers(kind: str, problem: str) -> None:
    head = HEADS[problem]
    texts, objective = some_texts(head, typed=kind == "bert"), Classification(head)
    model, reference = classifier(kind, head), classifier(kind, head)
    expected = 0.0
    for ids, answer, types in texts:  # one by one, without padding
        inputs: dict[str, Any] = {"input_ids": torch.tensor(ids[None], dtype=torch.long)}
        if kind == "bert":
            inputs["token_type_ids"] = torch.tensor(types[None], dtype=torch.long)  # type: ignore[index]
        values = torch.tensor(answer, dtype=torch.long if problem == "single_label" else torch.float32)
        loss = reference(**inputs, labels=values if problem == "single_label" else values[None]).loss
        loss.backward()
        expected += loss.item()
    call = objective.install(model)
    found = 0.0
    for some in (texts[:3], texts[3:]):
        batch = objective.tensors(some, flat=False)
        assert ("token_type_ids" in batch) == (kind == "bert")
        loss = call(model, batch)
        assert loss.dtype == torch.float32
        loss.backward()
        found += loss.item()
    assert found == pytest.approx(expected, rel=1e-5)
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-6)
    with objective.with_logits(model):
        assert model(**inputs).logits.shape == (1, head.outputs)
    assert call(model, batch).ndim == 0


def test_a_worker_without_a_text_has_a_loss_of_zero_and_gradients() -> None:
    """It must take part in collective operations, but must not change the sum."""
    head = HEADS["single_label"]
    model, objective = classifier("bert", head), Classification(head)
    nothing = Example(np.zeros(8, np.int32), np.full(8, IGNORE, np.int32))
    loss = objective.install(model)(model, objective.tensors([nothing], flat=False))
    loss.backward()
    assert loss.item() == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(("kind", "most"), [("bert", 22), ("roberta", 20), ("electra", 22), ("llama", None)])
def test_batches_are_no_longer_than_learned_positions(kind: str, most: int | None) -> None:
    head = HEADS["single_label"]
    model, objective = classifier(kind, head), Classification(head)
    assert most_tokens(model) == most
    call = objective.install(model)
    for length, padded in ((3, 8), (most or 22, most or 24)):
        text = Example(np.full(length, 5, np.int32), np.zeros(1), np.zeros(length, np.int8))
        batch = objective.tensors([text], flat=False)
        assert batch["input_ids"].shape == (1, padded) and torch.isfinite(call(model, batch))  # type: ignore[union-attr]
