"""What each worker computes at once: the tries before the first step, and the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from rasa_train.data.batching import Limit
from rasa_train.data.prepare import prepare
from rasa_train.distributed.choose import make_engine
from rasa_train.recipe.schema import Recipe
from rasa_train.training.micro_batches import limit_of, memory_suffices, plan_steps
from rasa_train.training.trainable_model import TrainableModel


@pytest.fixture
def accelerator() -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


def recipe(model: Path, rows: Path, method: str = "lora", **training: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": str(model), "dtype": "float32"},
            "adapter": {"method": method},
            "data": {"dataset": str(rows)},
            "training": {"batch_size": 8, **training},
            "output_dir": "run",
        }
    )


@pytest.mark.parametrize("flat", [False, True])
def test_a_try_leaves_no_trace(tiny_llama: Path, token_rows: Path, accelerator: Accelerator, flat: bool) -> None:
    """PriLoRA keeps statistics of what it sees; the longest sequences are tried, with gradients."""
    what = recipe(tiny_llama, token_rows, "prilora", padding_free=flat)
    train = prepare(what.data, None).train
    model = TrainableModel(what, make_engine(what.distributed, accelerator, 1.0))
    model.prepare()
    state = {name: tensor.clone() for name, tensor in model.rule_state.items()}
    plain, seen = model._loss, list[int]()

    def with_memory_for(tokens: int, wrapped: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        seen.append(batch["input_ids"].numel())
        if seen[-1] > tokens:
            raise torch.OutOfMemoryError
        return plain(wrapped, batch)

    limit = Limit(tokens=70) if flat else Limit(examples=3)  # the three longest have 23 tokens and fewer
    for enough, tokens in ((True, 72), (False, 71)):
        model._loss = partial(with_memory_for, tokens)
        assert memory_suffices(model, train, limit) == enough and seen[-1] == 72
        assert state.keys() == model.rule_state.keys() and state
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.rule_state.items())
        assert all(p.grad is None for p in model.module.parameters())


def test_limits(tiny_llama: Path, token_rows: Path) -> None:
    def limit(workers: int, **training: Any) -> Limit:
        what = recipe(tiny_llama, token_rows, **training)
        return limit_of(what.training, prepare(what.data, None).train, workers, 100)

    assert limit(1) == Limit(examples=4)  # 100 tokens, 23 in the longest
    assert limit(4) == Limit(examples=2), "8 sequences, something for every worker"
    assert limit(4, micro_batch_size=3) == Limit(examples=2)
    assert limit(2, batching="packed") == Limit(tokens=100, multiple_of=2)
    assert limit(2, batching="packed", micro_batch_tokens=50) == Limit(tokens=50)
    assert limit(2, batching="packed", micro_batch_size=3) == Limit(examples=3)


def test_steps_are_those_that_are_left(tiny_llama: Path, token_rows: Path, accelerator: Accelerator) -> None:
    """Resumed in the middle of an epoch, the batches are those of an undisturbed run."""
    what = recipe(tiny_llama, token_rows, batching="packed")
    train = prepare(what.data, None).train
    model = TrainableModel(what, make_engine(what.distributed, accelerator, 1.0))
    plan = partial(plan_steps, model, train, Limit(tokens=40))
    whole, rest = list(plan(range(10), 5)), list(plan(range(7, 10), 5))
    for a, b in zip(whole[7:], rest, strict=True):
        assert (a.batch == b.batch).all() and len(a.tensors) == len(a.mine) == a.micro_batches > 1
        for x, y in zip(a.tensors, b.tensors, strict=True):
            assert torch.equal(x["input_ids"], y["input_ids"]) and torch.equal(x["targets"], y["targets"])
    assert sorted(np.concatenate([step.batch for step in whole[:5]])) == list(range(40))
    assert sum(len(t["targets"]) for t in whole[0].tensors) == train.supervised[whole[0].batch].sum()


@pytest.mark.gpu
def test_a_try_leaves_a_margin(tiny_llama: Path, token_rows: Path) -> None:
    """With 5% of the GPU's memory free the tiny model would fit, but not with 8% to spare."""
    AcceleratorState._reset_state(reset_partial_state=True)
    what = recipe(tiny_llama, token_rows, padding_free=True)
    train = prepare(what.data, None).train
    model = TrainableModel(what, make_engine(what.distributed, Accelerator(), 1.0))
    model.prepare()
    tried = partial(memory_suffices, model, train, Limit(tokens=70))
    free, total = torch.cuda.mem_get_info()
    filled = torch.empty(free - total // 20, dtype=torch.uint8, device="cuda")
    assert not tried()
    del filled
    torch.cuda.empty_cache()
    assert tried()
