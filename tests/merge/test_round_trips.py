"""Every method, all the way: adapter -> merged -> loaded; adapter -> LoRA -> PEFT; that LoRA -> merged again.

The oracle is the model with the adapter on, or PEFT, which knows none of our methods but two or three.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from rasa_train.adapters.registry import METHODS
from rasa_train.merging.lora import export_lora
from rasa_train.merging.merged import merge
from rasa_train.merging.peft_format import export_peft

from .conftest import FIELDS, load, logits, save_adapter, save_base
from .test_command import refused
from .test_lora import peft_logits

LAYERS = 3
RANKS = {
    "lora": 4, "rasa": 4 - 1 + LAYERS, "vera": 16, "tied-lora": 4, "sharelora": 4, "nola": 4, "vb-lora": 4,
    "olora": 2 * 4, "pissa": 2 * 4, "adalora": 6, "prilora": 6,
}  # fmt: skip
"""The largest rank of a site in the LoRA that each factor method becomes."""
REFUSED = {
    "mora": "'mora' is not a product of low-rank factors: use --format merged",
    "dora": "'dora' is not a product of low-rank factors: use --format merged",
    "bitfit": "'bitfit' is not a product of low-rank factors: use --format merged",
    "full": "the adapter has base parameters (lm_head.weight, ...), which a LoRA cannot hold: use --format merged",
    "peft": "the adapter has base parameters (model.layers.0.mlp.down_proj.weight, ...), which a LoRA cannot hold",
}
"""What ``--format lora`` says to the others."""
UNMERGED = {"bottleneck"}
"""Methods whose adapters are not updates of weights."""
IN_PEFT = ("lora", "dora", "vera")
"""The methods that PEFT has."""


def weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def assert_same_weights(got: Path, wanted: Path) -> None:
    assert weights(got).keys() == weights(wanted).keys()
    for name, tensor in weights(wanted).items():
        assert_close(weights(got)[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def test_every_method_is_here() -> None:
    assert FIELDS.keys() == METHODS.keys() - UNMERGED == RANKS.keys() | REFUSED.keys()
    assert not RANKS.keys() & REFUSED.keys()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.mark.parametrize("method", FIELDS)
def test_there_and_back(base: Path, tmp_path: Path, method: str) -> None:
    adapter, merged, lora = tmp_path / "adapter", tmp_path / "merged", tmp_path / "lora"
    expected = save_adapter(adapter, base, method)
    assert (logits(load(base)) - expected).abs().max() > 0.05
    merge(adapter, merged)
    assert_close(logits(load(merged)), expected, rtol=1e-4, atol=1e-4)
    if method in IN_PEFT:
        export_peft(adapter, tmp_path / "peft")
        assert_close(peft_logits(base, tmp_path / "peft"), expected, rtol=1e-4, atol=1e-4)
        merge(tmp_path / "peft", tmp_path / "of-peft")
        assert_same_weights(tmp_path / "of-peft", merged)
    if method in REFUSED:
        assert REFUSED[method] in refused(tmp_path, adapter, "--output", lora, "--format", "lora")
        return
    assert export_lora(adapter, lora).rank == RANKS[method]
    assert_close(peft_logits(base, lora), expected, rtol=1e-4, atol=1e-4)
    merge(lora, tmp_path / "again")
    assert_same_weights(tmp_path / "again", merged)
