"""The loss in chunks, on supervised tokens only, against the logits that transformers gives."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rasa_train.data.batching import collate, flatten, with_targets
from rasa_train.data.encode import Example
from rasa_train.kernels.linear_cross_entropy import linear_cross_entropy
from rasa_train.models.families import PLAIN_HEADS, has_plain_head
from rasa_train.objectives.next_token import LossHead, NextToken, from_logits

from .tiny_models import VOCABULARY, tiny_model

OTHERS = {"cohere", "gemma2", "granite"}


def examples(*lengths: int) -> list[Example]:
    """Random tokens; the first third of each example, and the last token, are not supervised."""
    rng = np.random.default_rng(0)
    result = []
    for length in lengths:
        ids = rng.integers(3, VOCABULARY, length).astype(np.int32)
        labels = ids.copy()
        labels[: length // 3] = -100
        labels[-1:] = -100
        result.append(Example(ids, labels))
    return result


def reference(model: nn.Module, some: list[Example]) -> torch.Tensor:
    """Each example alone, all logits, transformers' own shift by one."""
    total = torch.zeros(())
    for example in some:
        logits = model(torch.from_numpy(example.input_ids.astype(np.int64))[None], use_cache=False).logits[0, :-1]
        labels = torch.from_numpy(example.labels.astype(np.int64))[1:]
        total = total + F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    return total


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = gradients(a), gradients(b)
    assert ours.keys() == theirs.keys() and ours
    scale = max(float(g.abs().max()) for g in theirs.values())
    worst = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    assert worst < 2e-6 * max(scale, 1.0), (worst, scale)


@pytest.mark.parametrize("kind", sorted(PLAIN_HEADS | OTHERS))
def test_loss_and_gradients_of_an_architecture(kind: str) -> None:
    model = tiny_model(kind)
    own = copy.deepcopy(model)
    assert has_plain_head(model) == (kind not in OTHERS)
    loss_of = NextToken().install(model)
    assert isinstance(model.get_output_embeddings(), LossHead) == (kind not in OTHERS)
    some = examples(5, 17, 9)
    batch = with_targets(collate(some, pad_token_id=0) or {})
    loss, expected = loss_of(model, batch), reference(own, some)
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx(float(expected), rel=1e-6)
    loss.backward()
    expected.backward()
    assert_same_gradients(model, own)


def test_a_row_of_own_logits_is_computed_where_it_is_supervised() -> None:
    model = tiny_model("gemma2")
    (example,) = examples(12)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    batch = with_targets(collate([example], pad_token_id=0) or {})
    expected = float(from_logits(model, batch))
    loss = NextToken().install(model)(model, batch)
    assert float(loss) == pytest.approx(expected, rel=1e-6) and rows[-1] == len(batch["targets"]) == 7


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 7, 8])
def test_chunks(rows: int, bias: bool, trained: bool) -> None:
    torch.manual_seed(0)
    ours = [torch.randn(rows, 6, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64)]
    ours += [torch.randn(11, dtype=torch.float64)]
    for i, tensor in enumerate(ours):
        tensor.requires_grad_(trained or i == 0)
    theirs = [t.detach().clone().requires_grad_(t.requires_grad) for t in ours]
    targets = torch.randint(11, (rows,))
    loss = linear_cross_entropy(ours[0], ours[1], ours[2] if bias else None, targets, chunk=3)
    expected = F.cross_entropy(F.linear(theirs[0], theirs[1], theirs[2] if bias else None), targets, reduction="sum")
    (3.0 * loss).backward()
    (3.0 * expected).backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6, abs=1e-9)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_bf16_head_gives_an_fp32_loss(autocast: bool) -> None:
    """Frozen in bf16, or trained in fp32 under autocast: the loss of bf16 logits, summed in fp32."""
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(400, 32), torch.randn(90, 32), torch.randint(90, (400,))
    if not autocast:
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    pairs = [[t.clone().requires_grad_() for t in (hidden, weight)] for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = linear_cross_entropy(*pairs[0], None, targets, chunk=128)
        logits = F.linear(*pairs[1])
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    expected = F.cross_entropy(logits.float(), targets, reduction="sum")
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    exact = [t.detach().bfloat16().float().requires_grad_() for t in (hidden, weight)]
    (loss / 510).backward()  # bf16 has no such factor: 0.4% off
    (F.cross_entropy(F.linear(*exact), targets, reduction="sum") / 510).backward()
    for a, b in zip(pairs[0], exact, strict=True):
        assert a.grad is not None and b.grad is not None and a.grad.dtype == a.dtype
        assert F.cosine_similarity(a.grad.float().flatten(), b.grad.flatten(), dim=0) > 0.9999
        assert float(a.grad.float().norm()) == pytest.approx(float(b.grad.norm()), rel=2.5e-3)


def test_no_more_logits_than_a_chunk() -> None:
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dim() == 2 and result.shape[1] == 50:
                self.rows = max(self.rows, result.shape[0])
            return result

    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(50, 4)
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, None, torch.zeros(64, dtype=torch.long), chunk=8).backward()
    assert largest.rows == 8


def test_evaluation_computes_no_gradient() -> None:
    hidden, weight = torch.randn(4, 3), torch.randn(5, 3, requires_grad=True)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, None, torch.tensor([0, 1, 2, 3]))
    assert not loss.requires_grad


def test_a_row_without_targets_is_connected() -> None:
    """A worker with nothing to do still gives a gradient (of zeros) to every parameter, as DDP demands."""
    model = tiny_model("llama")
    batch = with_targets(flatten([Example(np.zeros(8, np.int32), np.full(8, -100, np.int32))]) or {})
    batch = {n: batch[n] for n in ("input_ids", "position_ids", "positions", "targets")}
    loss = NextToken().install(model)(model, batch)
    loss.backward()
    assert float(loss) == 0.0 and gradients(model).keys() == dict(model.named_parameters()).keys()
