"""A base in 8 or 4 bits against the same products with the weights it stands for, and through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from rasa_train.adapters.inject import adapt, narrow_base
from rasa_train.adapters.registry import METHODS
from rasa_train.adapters.shared_input import packed
from rasa_train.adapters.state import groups, trainable
from rasa_train.errors import UserError
from rasa_train.kernels import quantized_weight as precision
from rasa_train.kernels.quantized_weight import LARGEST, Base, NarrowLinear, narrow, to_fp8
from tests.conftest import Cli

SIZES = {"vocab_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
BOTH: list[Base] = ["fp8", "nf4"]


def test_rows_in_fp8() -> None:
    matrix = torch.randn(8, 64) * torch.logspace(-3, 3, 8)[:, None]
    matrix[3] = 0
    values, scales = to_fp8(matrix)
    assert values.float().abs().amax(1)[[0, 7]].eq(LARGEST).all() and scales.shape == (8, 1)
    error = (values.float() * scales - matrix).abs()
    assert (error <= matrix.abs() * 2**-4 + scales * 2**-9).all(), "three bits of mantissa, or the smallest step"


@pytest.mark.parametrize(("base", "weights", "products"), [("fp8", 0.04, 0.06), ("nf4", 0.12, 0.005)])
def test_products(base: Base, weights: float, products: float) -> None:
    """The weights are near, and the products are those of the weights as they are held (fp8 rounds x and dy too)."""
    torch.manual_seed(0)
    W, x = torch.randn(48, 64).bfloat16(), torch.randn(3, 7, 64).bfloat16().requires_grad_()
    held, dy = narrow(W, base), torch.randn(3, 7, 48).bfloat16()
    dense = held.dense()
    assert dense.dtype == torch.bfloat16 and len(held) == 48
    assert 0 < (dense - W).norm() < weights * W.norm()
    y = NarrowLinear.apply(x, held)
    y.backward(dy)
    assert x.grad is not None
    for got, wanted in ((y, x @ dense.T), (x.grad, dy @ dense)):
        assert got.shape == wanted.shape and (got - wanted).norm() < products * wanted.norm()


def tiny(method: str, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SIZES, hidden_size=64, intermediate_size=96, attention_bias=bias)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    fields = {"lora": {"r": 4}, "rasa": {"r": 4, "k": 1}, "vera": {"r": 16}, "mora": {"r": 2}, "dora": {"r": 4}}
    model, _ = adapt(model, METHODS[method].model_validate({"method": method, **fields[method]}))
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.train()


def gradients(model: nn.Module, *, fast: bool) -> Tensor:
    ids = torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(0))
    with packed(groups(model) if fast else []):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    found = torch.cat([p.grad.flatten() for p in trainable(model).values() if p.grad is not None])
    model.zero_grad()
    return found


def test_linears_that_share_an_input_quantise_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 layers of 7 linears in 4 groups: the forward pass quantises 4 inputs a layer; the backward pass 7 gradients a
    layer, less 3 in the first, where the input of q, k and v comes from the frozen embedding and needs none."""
    model, calls = tiny("lora"), list[tuple[int, ...]]()
    narrow_base(model, "fp8", torch.device("cpu"))

    def counted(matrix: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(tuple(matrix.shape))
        return to_fp8(matrix)

    monkeypatch.setattr(precision, "to_fp8", counted)
    gradients(model, fast=True)
    assert len(calls) == 2 * 4 + 2 * 7 - 3


def test_gradients_of_factors_are_summed_in_full() -> None:
    """The flag of cuBLAS is off for every product of the backward pass, and as before afterwards."""
    seen: list[bool] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            in_backward = torch._C._current_graph_task_id() != -1
            if in_backward and "out" in (kwargs or {}):  # how the gradients of factors are written
                seen.append(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction)
            return func(*args, **(kwargs or {}))

    before = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    for method in ("lora", "mora"):
        with Watch():
            gradients(tiny(method), fast=True)
    assert before and len(seen) > 20 and not any(seen)
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction == before


@pytest.mark.parametrize("base", BOTH)
@pytest.mark.parametrize("method", ["lora", "rasa", "vera", "mora", "dora"])
def test_adapters_beside_it(method: str, base: Base) -> None:
    """Fast and plain path agree, and both are near to the gradients with the 16-bit base."""
    model = tiny(method)
    exact = gradients(model, fast=False)
    difference = narrow_base(model, base, torch.device("cpu"))
    plain, fast = gradients(model, fast=False), gradients(model, fast=True)
    assert 0 < difference < (0.04 if base == "fp8" else 0.12)
    assert torch.cosine_similarity(plain, fast, dim=0) > 0.999
    assert 0.9 < torch.cosine_similarity(fast, exact, dim=0) < 1 - 1e-6


def test_trained_weights_stay_as_they_are() -> None:
    model, _ = adapt(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)), METHODS["full"]())
    with pytest.raises(UserError, match=r"model\.quantization: nf4 needs frozen linears"):
        narrow_base(model, "nf4", torch.device("cpu"))


@pytest.mark.parametrize("base", BOTH)
def test_train_and_merge(base: Base, cli: Cli, tiny_llama: Path, token_rows: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        f"model: {{name: {tiny_llama}, quantization: {base}}}\nadapter: {{method: rasa, r: 4, k: 1}}\n"
        f"data: {{dataset: {token_rows}}}\ntraining: {{max_steps: 3, batch_size: 8}}\noutput_dir: run\n"
    )
    cli("train", "r.yaml", check=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 < summary["base_difference"] < 0.12
    done = cli("merge", "run", "--output", "merged", "--json", check=True)
    assert json.loads(done.stdout)["adapted"] > 0, "the base's own weights are merged"
    refused = cli("train", "r.yaml", "training.compile=true", "output_dir=other")
    assert refused.returncode == 2 and f"model.quantization: {base} works with" in refused.stderr
