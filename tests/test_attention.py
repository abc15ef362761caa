"""Sequences in one row give what each gives alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from rasa_train.attention import NAME, check_packable, use_varlen
from rasa_train.data.batching import flatten, with_targets
from rasa_train.errors import UserError
from rasa_train.loss import PLAIN_HEADS, install

from .test_loss import assert_same_gradients, examples, reference
from .tiny_models import tiny_model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", sorted(PLAIN_HEADS - {"stablelm"} | {"cohere", "gemma2", "granite"}))
def test_packed_is_unpacked(kind: str, checkpointing: bool) -> None:
    """Grouped queries, rotary and learned positions, sliding windows shorter than a sequence, experts."""
    if checkpointing and kind not in ("llama", "gpt2", "mixtral"):
        pytest.skip("one of a kind is enough")
    model = tiny_model(kind)
    own = copy.deepcopy(model)
    use_varlen(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    loss_of = install(model)
    some = examples(5, 17, 9, 1)
    loss, expected = loss_of(model, with_targets(flatten(some) or {})), reference(own, some)
    assert model.config._attn_implementation == NAME
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    loss.backward()
    expected.backward()
    assert_same_gradients(model, own)


def test_no_sequence_sees_another() -> None:
    model = tiny_model("llama")
    use_varlen(model)
    some = examples(6, 9)
    row = {n: v for n, v in (flatten(some) or {}).items() if n != "labels"}
    before = model(**row, use_cache=False).logits[0]
    row["input_ids"][0, :6] = 7
    after = model(**row, use_cache=False).logits[0]
    assert torch.equal(before[6:15], after[6:15]) and not torch.equal(before[:6], after[:6])


@pytest.mark.parametrize(
    ("kind", "why"),
    [("gemma2_capped", "soft caps"), ("mamba", "cannot be exchanged"), ("stablelm", "cannot be exchanged")],
)
def test_others_are_refused(kind: str, why: str) -> None:
    if kind == "gemma2_capped":
        model = tiny_model("gemma2")
        model.config.attn_logit_softcapping = 50.0
    else:
        model = tiny_model(kind)
    with pytest.raises(UserError, match=why) as caught:
        check_packable(model)
    assert caught.value.key == "training.batching"


def test_a_batch_without_sequences_is_refused() -> None:
    model = tiny_model("llama")
    use_varlen(model)
    with pytest.raises(UserError, match="cannot be trained without padding"):
        model(torch.ones(1, 4, dtype=torch.long))


def test_stock_flash_attention_is_left_alone(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    use_varlen(model)
    assert model.config._attn_implementation == "flash_attention_2"
