"""Switching a model from one adapter to another, against fresh merges: bit for bit, however often."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rasa_train import LoRA, UserError, adapt, load_adapter, switch
from rasa_train import merge as merge_in_memory
from rasa_train import save_adapter as write_adapter
from rasa_train.merging.merged import merge
from rasa_train.merging.options import Writing
from tests.merge.conftest import load, logits, save_adapter, save_base
from tests.tiny_models import tiny_model

METHODS = {"lora": {}, "rasa": {"k": 1}, "dora": {}, "full": {}}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_twenty_switches_are_fresh_merges(dtype: torch.dtype, tmp_path: Path) -> None:
    """Low-rank, normalised and dense updates with the base between them; the merged files are the other oracle."""
    base = save_base(tmp_path / "base", dtype=dtype)
    before = load(base).state_dict()
    fresh = {}
    for method, fields in METHODS.items():
        save_adapter(tmp_path / method, base, method, **fields)
        merge(tmp_path / method, tmp_path / "merged", writing=Writing(overwrite=True))
        fresh[method] = load(tmp_path / "merged")
    in_memory = merge_in_memory(load_adapter(load(base), tmp_path / "lora"))
    model, draw = load(base), random.Random(0)
    order = [draw.choice([*METHODS, None]) for _ in range(17)] + ["full", "dora", "lora"]
    for method in order:
        assert switch(model, to=method and tmp_path / method) is model
        wanted = before if method is None else fresh[method].state_dict()
        for name, p in model.state_dict().items():
            assert p.dtype == dtype and torch.allclose(p.float(), wanted[name].float(), rtol=0, atol=1e-6), (
                method,
                name,
            )
    assert all(torch.equal(p, in_memory.state_dict()[name]) for name, p in model.state_dict().items())
    assert torch.equal(logits(model), logits(in_memory))
    switch(model, to=None)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_a_sum_and_transposed_weights(tmp_path: Path) -> None:
    """Two adapters with weights; GPT-2's fused c_attn is stored the other way round."""
    base = save_base(tmp_path / "base", "gpt2")
    for name, r in (("one", 2), ("two", 4)):
        save_adapter(tmp_path / name, base, "lora", r=r)
    parts = [(tmp_path / "one", 0.5), (tmp_path / "two", 2.0)]
    merge(parts, tmp_path / "merged")
    model = switch(switch(load(base), to=tmp_path / "two"), to=parts)
    assert torch.allclose(logits(model), logits(load(tmp_path / "merged")), atol=1e-5)


def test_a_classifier_switches_its_head_too(tmp_path: Path) -> None:
    base = tiny_model("roberta", labels=3)
    base.save_pretrained(tmp_path / "base")
    ids = torch.arange(5, 25).view(2, 10)
    for number, name in enumerate(("one", "two")):
        adapted = adapt(AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"), LoRA(r=2))
        torch.manual_seed(number)
        with torch.no_grad():
            for p in adapted.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn_like(p))
        write_adapter(adapted, tmp_path / name)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    for name in ("one", "two", "one"):
        switch(model, to=tmp_path / name)
        other = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        merged = merge_in_memory(load_adapter(other, tmp_path / name)).eval()
        assert torch.equal(model(ids).logits, merged(ids).logits)
    assert torch.equal(switch(model, to=None)(ids).logits, base.eval()(ids).logits)


def test_what_is_refused_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    base, other = save_base(tmp_path / "base"), save_base(tmp_path / "other")
    changed = load(other)
    with torch.no_grad():
        changed.get_parameter("model.layers.0.self_attn.q_proj.weight").mul_(2)
    changed.save_pretrained(other)
    small = save_base(tmp_path / "small", "tied")
    save_adapter(tmp_path / "lora", base, "lora")
    save_adapter(tmp_path / "of-small", small, "lora", targets=["gate_proj"])
    of_other = adapt(load(other), LoRA(r=2))
    write_adapter(of_other, tmp_path / "of-other")
    model = switch(load(base), to=tmp_path / "lora")
    before = logits(model)
    for path, words in ((tmp_path / "of-other", "is not the base that"), (tmp_path / "nothing", "does not exist")):
        with pytest.raises(UserError, match=words):
            switch(model, to=path)
    with pytest.raises(UserError, match="does not fit"):
        switch(model, to=tmp_path / "of-small")
    with pytest.raises(UserError, match="does not fit this model: it needs"):
        switch(load(small), to=tmp_path / "lora", base=str(base))
    with pytest.raises(UserError, match="has adapters attached"):
        switch(of_other, to=tmp_path / "of-other")
    assert torch.equal(logits(model), before)
