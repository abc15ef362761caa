"""Fused norms, rotary embedding and SwiGLU: the same function as transformers' own; chosen where they can be used."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from rasa_train.models.fused import FAMILIES, fuse, is_fused
from tests.conftest import Cli
from tests.tiny_models import tiny_model


def test_liger_without_a_gpu_is_refused_and_auto_goes_on(tiny_llama: Path, token_rows: Path, cli: Cli) -> None:
    if torch.cuda.is_available():
        pytest.skip("for a machine without a GPU")
    values = [f"model.name={tiny_llama}", f"data.dataset={token_rows}", "output_dir=run", "training.max_steps=1"]
    recipe = "model: {name: x, dtype: float32}\nadapter: {method: lora}\ndata: {dataset: x}\noutput_dir: x\n"
    Path("recipe.yaml").write_text(recipe)
    refused = cli("train", "recipe.yaml", *values, "training.kernels=liger")
    assert refused.returncode == 2 and "training.kernels: liger cannot be used: they need a GPU" in refused.stderr
    cli("train", "recipe.yaml", *values, check=True)
    assert '"kernels": "none"' in Path("run/summary.json").read_text()
    bench = cli("bench", "--kernels", "liger", "--engines", "ours", "--tokens", "64", "--device", "cpu")
    assert bench.returncode == 2 and "--kernels liger cannot be used: they need a GPU" in bench.stderr


def test_the_classes_are_those_of_transformers() -> None:
    """A class that is renamed would no longer be fused, without a word."""
    for kind, name in FAMILIES.items():
        model = tiny_model(kind)
        found = [type(module).__name__ for module in model.modules()]
        layers = model.config.num_hidden_layers
        assert found.count(f"{name}MLP") == layers and found.count(f"{name}RMSNorm") > 2 * layers
        assert model.config.hidden_act == "silu"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FAMILIES)
def test_fused_is_plain_on_a_gpu(kind: str) -> None:
    """Loss and gradients of the embedding, in fp32."""
    if find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is not installed")
    ids = torch.arange(48, device="cuda").view(2, 24) % 50
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = tiny_model(kind).cuda().train()
        if fused:
            fuse(model)
            assert is_fused(model)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append((loss.detach(), model.get_input_embeddings().weight.grad))
    (loss, gradient), (fused_loss, fused_gradient) = found
    torch.testing.assert_close(fused_loss, loss, rtol=1e-4, atol=1e-5)
    assert (fused_gradient - gradient).norm() < 1e-3 * gradient.norm()
