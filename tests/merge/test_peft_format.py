"""PEFT's own formats of LoRA, DoRA and VeRA: PEFT loads them and computes what the adapted model does."""

from __future__ import annotations

import json

import pytest
import torch
from torch.testing import assert_close

from rasa_train.adapters.inject import attach
from rasa_train.adapters.registry import METHODS
from rasa_train.adapters.saved import read_adapter, write_adapter
from rasa_train.adapters.state import saved_tensors, trainable
from rasa_train.errors import UserError
from rasa_train.merging.peft_format import export_peft

from .conftest import load, logits, save_base
from .test_lora import peft_logits

FIELDS = {
    "lora": {"r": 4, "alpha": 8, "rslora": True},
    "dora": {"r": 4, "alpha": 8},
    "vera": {"r": 16, "projection_seed": 3, "save_projection": False},
}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", FIELDS)
def test_peft_computes_what_the_adapted_model_does(tmp_path, kind, name):
    base = save_base(tmp_path / "base", kind)
    model, method = load(base), METHODS[name].model_validate({"method": name, **FIELDS[name]})
    torch.manual_seed(2)
    attach(model, method)
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(torch.randn_like(p) * 0.3)
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", method, saved_tensors(model), base_model=str(base), base_revision=None)
    report = export_peft(tmp_path / "adapter", tmp_path / "out")
    assert report.bytes == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == FIELDS[name]["r"]
    expected = logits(model)
    assert (expected - logits(load(base))).abs().max() > 0.05
    assert_close(peft_logits(base, tmp_path / "out"), expected, rtol=1e-4, atol=1e-5)
    assert read_adapter(tmp_path / "out").method.method == name  # and it comes back


def test_other_methods_are_told_what_to_use(case, tmp_path):
    _, adapter, _ = case(k=1)
    with pytest.raises(UserError, match=r"lora, dora, vera and peft, got rasa: use --format lora"):
        export_peft(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
