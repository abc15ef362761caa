"""OLoRA, PiSSA and DoRA against PEFT with identical tensors, and against dense algebra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from rasa_train.adapters.contract import Adapter, Method
from rasa_train.adapters.inject import attach
from rasa_train.adapters.registry import METHODS
from rasa_train.adapters.saved import load_tensors, read_adapter, write_adapter
from rasa_train.adapters.site import Site
from rasa_train.adapters.state import saved_tensors, trainable
from rasa_train.errors import UserError
from rasa_train.merging.lora import lora_factors
from rasa_train.methods.dora import DoRA, DoRAAdapter
from rasa_train.methods.lora import LoRA
from rasa_train.methods.olora import OLoRA, StartedAdapter
from rasa_train.methods.pissa import PiSSA

SHAPES = [(12, 10), (10, 12)]
STARTED: list[Method] = [OLoRA(r=4, alpha=10), PiSSA(r=4, alpha=10)]
STARTED_IDS = ["olora", "pissa"]


def site(out: int = 12, in_: int = 10, experts: int | None = None) -> Site:
    return Site("layers.0.up", "up", 0, out, in_, "layers.0.up.weight", num_experts=experts)


def started(method: Method, weight: Tensor) -> Any:
    out, in_ = weight.shape[-2:]
    place = site(out, in_, weight.shape[0] if weight.dim() == 3 else None)
    adapter: Adapter = method.build([place]).adapters[place.path]
    adapter.start(weight)
    return adapter


def of_peft(weight: Tensor, **fields: Any) -> nn.Module:
    """PEFT's layer for a linear with this weight and a bias."""
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.data.copy_(weight)
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["0"], **fields)
    layer: nn.Module = peft.get_peft_model(nn.Sequential(linear), config).base_model.model[0]
    return layer


def base(x: Tensor, weight: Tensor, theirs: nn.Module) -> Tensor:
    return x @ weight.T + theirs.base_layer.bias


# -- OLoRA and PiSSA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", STARTED, ids=STARTED_IDS)
def test_olora_and_pissa_agree_with_peft(method: Method, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    W, x = torch.randn(shape), torch.randn(7, shape[1])
    ours, theirs = started(method, W), of_peft(W, init_lora_weights=method.method)
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    torch.testing.assert_close(ours.A, A)
    torch.testing.assert_close(ours.B, B)
    torch.testing.assert_close(theirs.base_layer.weight, W - 2.5 * ours.B0 @ ours.A0)  # PEFT changes the base
    # "Training": the same new A and B on both sides.
    for mine, other in ((ours.A, A), (ours.B, B)):
        mine.data += 0.1 * torch.randn_like(mine)
        other.data.copy_(mine)
    y, expected = base(x, W, theirs) + ours(x, W), theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    merged = theirs.base_layer.weight + theirs.get_delta_weight("default")
    torch.testing.assert_close(W + ours.delta(), merged, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.A.grad, A.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.B.grad, B.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_start_of_olora_is_orthonormal(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    W = torch.randn(shape)
    ours = started(OLoRA(r=4), W)
    torch.testing.assert_close(ours.B0.T @ ours.B0, torch.eye(4))
    torch.testing.assert_close(ours.A0, ours.B0.T @ W)  # R = Q^T W


@pytest.mark.parametrize("niter", [None, 16])
def test_start_of_pissa_is_the_best_rank_r_part(niter: int | None) -> None:
    torch.manual_seed(0)
    U, V = torch.linalg.qr(torch.randn(12, 10)).Q, torch.linalg.qr(torch.randn(10, 10)).Q
    W = (U * torch.tensor([9.0, 8, 7, 6, 1, 0.5, 0.4, 0.3, 0.2, 0.1])) @ V.T
    ours = started(PiSSA(r=4, alpha=10, niter=niter), W)
    best = (U[:, :4] * torch.tensor([9.0, 8, 7, 6])) @ V[:, :4].T
    torch.testing.assert_close(2.5 * ours.B0 @ ours.A0, best, rtol=1e-4, atol=1e-4)
    # Each factor takes the square root of the singular values.
    torch.testing.assert_close(ours.A0.norm(dim=1), ours.B0.norm(dim=0), rtol=1e-4, atol=1e-4)


def test_fields_of_pissa() -> None:
    assert PiSSA(r=16).alpha == 16 and PiSSA(r=16).scale == 1.0
    assert PiSSA(r=16, alpha=32).scale == 2.0
    for wrong in ({"r": 0}, {"niter": -1}, {"alpha": 0}):
        with pytest.raises(ValidationError):
            PiSSA(**wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("method", [*STARTED, DoRA(r=4)], ids=[*STARTED_IDS, "dora"])
def test_start_is_the_base_to_the_bit(method: Method, dropout: float, dtype: torch.dtype) -> None:
    """In training mode too: dropout acts on an update that is zero, not on principal directions of W."""
    torch.manual_seed(0)
    W = torch.randn(12, 10).to(dtype)
    ours = started(method.model_copy(update={"dropout": dropout}), W.float()).train()
    assert not ours(torch.randn(64, 10, dtype=dtype), W).any()
    assert not ours.delta(W).any()


def test_bfloat16_loses_none_of_a_small_update() -> None:
    """The differences to the start are taken in fp32: B A x - B0 A0 x in bfloat16 would be noise here."""
    torch.manual_seed(0)
    W = torch.randn(64, 64)
    ours = started(PiSSA(r=16), W)
    ours.A.data += 1e-3 * torch.randn_like(ours.A)
    ours.B.data += 1e-3 * torch.randn_like(ours.B)
    x = torch.randn(256, 64, dtype=torch.bfloat16)
    exact = x.double() @ ours.delta().double().T
    assert (ours(x, W) - exact).norm() / exact.norm() < 0.01
    halves = [x @ A.bfloat16().T @ B.bfloat16().T for A, B in ((ours.A, ours.B), (ours.A0, ours.B0))]
    assert (halves[0] - halves[1] - exact).norm() / exact.norm() > 0.1


@pytest.mark.parametrize("method", STARTED, ids=STARTED_IDS)
def test_export_has_rank_2r(method: Method) -> None:
    torch.manual_seed(0)
    ours = started(method, torch.randn(12, 10))
    ours.A.data.normal_()
    ours.B.data.normal_()
    A, B = lora_factors(ours)
    assert A.shape == (8, 10) and B.shape == (12, 8) and ours.effective_rank == 8
    torch.testing.assert_close(B @ A, 2.5 * (ours.B @ ours.A - ours.B0 @ ours.A0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [OLoRA(r=11), PiSSA(r=11)], ids=STARTED_IDS)
def test_more_ranks_than_the_weight_has_is_an_error(method: Method) -> None:
    with pytest.raises(UserError, match=r"adapter\.r must be at most 10.*layers\.0\.up.*got 11") as error:
        method.build([site(50, 60), site(12, 10)])
    assert error.value.key == "adapter.r"


# -- DoRA ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_dora_agrees_with_peft(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    W, x = torch.randn(shape), torch.randn(7, shape[1])
    ours, theirs = started(DoRA(r=4, alpha=10), W), of_peft(W, use_dora=True)
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    m = theirs.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(ours.m, m)
    for mine, other in ((ours.A, A), (ours.B, B), (ours.m, m)):
        mine.data += torch.randn_like(mine)
        other.data.copy_(mine)
    y, expected = base(x, W, theirs) + ours(x, W), theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    y.square().sum().backward()
    expected.square().sum().backward()
    for mine, other in ((ours.A, A), (ours.B, B), (ours.m, m)):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-3)
    theirs.merge()
    torch.testing.assert_close(W + ours.delta(W), theirs.base_layer.weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(x, W), x @ ours.delta(W).T, rtol=1e-4, atol=1e-4)


def test_m_is_the_norm_of_the_merged_rows() -> None:
    torch.manual_seed(0)
    W = torch.randn(12, 10)
    ours = started(DoRA(r=4), W)
    torch.testing.assert_close(ours.m, W.norm(dim=1))
    ours.B.data.normal_()
    ours.m.data.uniform_(1, 2)
    torch.testing.assert_close((W + ours.delta(W)).norm(dim=1), ours.m)
    assert ours.effective_rank == 10
    with pytest.raises(ValueError, match="needs it"):
        ours.delta()


def test_dora_of_peft_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base_model = Blocks()
    config = peft.LoraConfig(
        r=4, lora_alpha=10, use_dora=True, use_rslora=True, target_modules=["up"], init_lora_weights=False
    )
    theirs = peft.get_peft_model(base_model.copy(), config)
    for name, parameter in theirs.named_parameters():
        if "magnitude" in name:
            parameter.data.uniform_(1, 2)
    theirs.save_pretrained(tmp_path)
    saved = read_adapter(tmp_path)
    assert isinstance(saved.method, DoRA) and (saved.method.r, saved.method.targets) == (4, ["up"])
    attach(base_model, saved.method)
    load_tensors(base_model, saved.tensors, origin="test")
    x = torch.randn(5, 10)
    torch.testing.assert_close(base_model(x), theirs(x), rtol=1e-5, atol=1e-5)


# -- all three -----------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """Two layers, with the list of layers that ``attach`` looks for."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(10, 10)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["up"](x).tanh()
        return x

    def copy(self) -> Blocks:
        other = Blocks()
        other.load_state_dict(self.state_dict())
        return other


@pytest.mark.parametrize("method", [*STARTED, DoRA(r=4)], ids=[*STARTED_IDS, "dora"])
def test_saved_and_read_back_to_the_bit(method: Method, tmp_path: Path) -> None:
    """Also into a model whose own start would be another one (signs of QR and SVD, a randomized SVD)."""
    torch.manual_seed(0)
    model = Blocks()
    other = model.copy()
    before = model(x := torch.randn(5, 10))
    attach(model, method)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    for parameter in trainable(model).values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    write_adapter(tmp_path, method, saved_tensors(model), base_model="b", base_revision=None)
    saved = read_adapter(tmp_path)
    assert saved.method == method
    attach(other, saved.method)
    for name, tensor in saved_tensors(other).items():
        if name.endswith("0"):
            tensor.data.neg_()
    load_tensors(other, saved.tensors, origin="test")
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("method", [*STARTED, PiSSA(r=4, niter=4), DoRA(r=4)], ids=[*STARTED_IDS, "pissa-fast", "dora"])
def test_experts_are_linears_side_by_side(method: Method) -> None:
    torch.manual_seed(0)
    W = torch.randn(3, 12, 10)
    fused = started(method, W)
    for parameter in fused.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x, counts = torch.randn(7, 10), [4, 0, 3]
    delta = fused.delta(W)
    assert delta.shape == (3, 12, 10)
    outputs = fused(x, W, counts).split(counts)
    for expert, rows in enumerate(x.split(counts)):
        torch.testing.assert_close(outputs[expert], rows @ delta[expert].T, rtol=1e-4, atol=1e-4)
        if isinstance(method, PiSSA) and method.niter:
            continue  # random
        alone = started(method, W[expert])
        for name, parameter in alone.named_parameters():
            parameter.data.copy_(fused.get_parameter(name)[expert])
        torch.testing.assert_close(delta[expert], alone.delta(W[expert]), rtol=1e-4, atol=1e-5)


def llama(method: Method) -> int:
    """Trained parameters on the shape of Llama-3.1-8B."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        attach(model, method)
    return sum(parameter.numel() for parameter in trainable(model).values())


@pytest.mark.parametrize(("r", "count"), [(8, 20_971_520), (16, 41_943_040), (32, 83_886_080)])
def test_counts_of_olora_and_pissa_are_loras(r: int, count: int) -> None:
    assert [llama(method) for method in (LoRA(r=r), OLoRA(r=r), PiSSA(r=r))] == [count] * 3


def test_count_of_dora() -> None:
    assert llama(DoRA(r=8)) == 22_347_776


def test_methods_are_known_by_name() -> None:
    assert (METHODS["olora"], METHODS["pissa"], METHODS["dora"]) == (OLoRA, PiSSA, DoRA)
    assert StartedAdapter.needs_weight and DoRAAdapter.needs_weight
