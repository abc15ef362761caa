"""Section ``training``: what batches and memory may be."""

from __future__ import annotations

from typing import Any

import pytest

from rasa_train.errors import UserError
from rasa_train.recipe.schema import TrainingConfig


@pytest.mark.parametrize(("value", "kept"), [(True, True), (False, False), ("auto", "auto"), (3, 3), (1, 1)])
def test_activation_checkpointing_keeps_its_kind(value: Any, kept: Any) -> None:
    """``1`` is one layer, ``true`` is all of them."""
    read = TrainingConfig.model_validate({"activation_checkpointing": value}).activation_checkpointing
    assert read == kept and type(read) is type(kept)


def test_packed_is_shuffled_without_padding() -> None:
    assert TrainingConfig.model_validate({"batching": "packed"}).flat
    assert TrainingConfig.model_validate({"padding_free": True}).flat
    assert not TrainingConfig().flat


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"micro_batch_tokens": 100}, "needs batching: packed, or padding_free: true, got batching: length-grouped"),
        ({"batching": "packed", "micro_batch_tokens": 100, "micro_batch_size": 2}, "leave one of them out"),
    ],
)
def test_a_budget_of_tokens_needs_rows_without_padding(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        TrainingConfig.model_validate(section)
    assert caught.value.key == "training.micro_batch_tokens"
