"""Sequences in one row give what each gives alone."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rasa_train.data.batching import flatten, with_targets
from rasa_train.errors import UserError
from rasa_train.kernels import varlen_attention
from rasa_train.kernels.varlen_attention import NAME
from rasa_train.models.families import PLAIN_HEADS
from rasa_train.models.padding_free import check_packable, use_varlen
from rasa_train.objectives.next_token import NextToken

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
    loss_of = NextToken().install(model)
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


def of_torch_2_11(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    *, return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """Stand in for ``varlen_attn`` of torch 2.11, with its signature: it takes fewer key heads without being asked."""
    assert cu_seq_q is cu_seq_k and max_q == max_k and return_aux is None and window_size[1] == 0
    window = None if window_size[0] < 0 else window_size[0] + 1
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
    return varlen_attention._one_by_one((q, k, v), cu_seq_q, scale, 0.0, window)[0]


def of_torch_2_13(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    *, return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False, num_splits: int | None = None,
) -> Tensor:  # fmt: skip
    """Stand in for ``varlen_attn`` of torch 2.13, which must be asked."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return of_torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


@pytest.mark.parametrize("kernel", [of_torch_2_11, of_torch_2_13])
@pytest.mark.parametrize("key_heads", [2, 4])
@pytest.mark.parametrize("window", [None, 3])
def test_the_kernel_is_called_as_its_version_takes_it(
    kernel: Callable[..., Tensor], key_heads: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen_attention, "varlen_attn", kernel)
    monkeypatch.setattr(varlen_attention, "_grouped_varlen_attn", varlen_attention.for_fewer_key_heads(kernel))
    query, key, value = (torch.randn(1, heads, 12, 8) for heads in (4, key_heads, key_heads))
    starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    got = varlen_attention._in_one_kernel((query, key, value), starts, 7, 0.5, window)
    expected = varlen_attention._one_by_one((query, key, value), starts, 0.5, 0.0, window)
    torch.testing.assert_close(got, expected)


def test_the_kernel_of_this_torch_can_be_called() -> None:
    """Its signature takes what ``_in_one_kernel`` gives."""
    q = torch.zeros(12, 4, 8)
    for kernel in (varlen_attention.varlen_attn, varlen_attention._grouped_varlen_attn):
        inspect.signature(kernel).bind(q, q, q, q, q, 7, 7, scale=0.5, window_size=(-1, 0))


@pytest.mark.gpu
@pytest.mark.parametrize("key_heads", [2, 4])
@pytest.mark.parametrize("window", [None, 32])
def test_the_kernel_on_a_gpu(key_heads: int, window: int | None) -> None:
    """Values and gradients in bf16 against fp32."""
    lengths = torch.tensor([5, 130, 64, 1])
    starts = F.pad(lengths.cumsum(0), (1, 0)).int().cuda()
    made = [torch.randn(1, heads, 200, 64, device="cuda") for heads in (4, key_heads, key_heads)]
    low = [t.bfloat16().requires_grad_() for t in made]
    high = [t.detach().float().requires_grad_() for t in low]
    got = varlen_attention._in_one_kernel(tuple(low), starts, 130, None, window)
    expected = varlen_attention._one_by_one(tuple(high), starts, None, 0.0, window)
    dy = torch.randn_like(expected)
    got.backward(dy.bfloat16())
    expected.backward(dy)
    for a, b in [(got, expected), *((x.grad, y.grad) for x, y in zip(low, high, strict=True))]:
        assert a is not None and b is not None and (a - b).norm() < 2e-2 * b.norm()


@pytest.mark.parametrize(
    ("kind", "why"),
    [("gemma2_capped", "soft caps"), ("mamba", "cannot be replaced"), ("stablelm", "cannot be replaced")],
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
