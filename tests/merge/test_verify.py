"""--verify tells an honest merge from a wrong one, and names what rounding costs."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from rasa_train.errors import UserError
from rasa_train.merging import verify
from rasa_train.merging.merged import merge

from .conftest import save_adapter, save_base


@pytest.mark.parametrize("method", ["rasa", "dora", "mora", "bitfit"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_an_exact_merge_is_exact(case, tmp_path, kind, method):
    if (kind, method) in {("gpt2", "bitfit"), ("mixtral", "bitfit"), ("mixtral", "mora")}:
        pytest.skip("covered by the others")
    _, adapter, _ = case(kind, method=method)
    merge(adapter, tmp_path / "out")
    report = verify(adapter, tmp_path / "out", exact=True)
    assert report.template == "tokens" and report.tokens == 4 * 32
    assert report.logits < 1e-4 and report.kl < 1e-9 and abs(report.loss_difference) < 1e-5
    assert report.adapter_logits > 0.01


def test_rounding_is_named_and_a_wrong_merge_refused(tmp_path):
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    save_adapter(tmp_path / "adapter", base)
    report = merge(tmp_path / "adapter", tmp_path / "out")
    assert report.rounding > 0
    proof = verify(tmp_path / "adapter", tmp_path / "out")
    assert 1e-5 < proof.logits < 0.1 * proof.adapter_logits and proof.kl > 0
    name = "model.layers.1.mlp.up_proj.weight"
    weights = load_file(tmp_path / "out" / "model.safetensors")
    save_file(weights | {name: weights[name].flip(0)}, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="does not equal the adapted model"):
        verify(tmp_path / "adapter", tmp_path / "out", exact=True)
