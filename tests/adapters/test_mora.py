"""MoRA against its formulas written as explicit matrices, one entry at a time."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from rasa_train.adapters.registry import METHODS
from rasa_train.adapters.site import Site
from rasa_train.errors import UserError
from rasa_train.methods.mora import MoRA

TYPES = [1, 2, 3, 4, 6]
SHAPES = [(17, 41), (41, 17), (24, 24), (32, 8), (8, 32), (30, 12), (13, 13), (2, 5)]


def site(out: int, in_: int, experts: int | None = None, name: str = "up") -> Site:
    return Site(f"layers.0.{name}", name, 0, out, in_, f"layers.0.{name}.weight", num_experts=experts)


def group_of(size: int, q: int) -> list[int]:
    """[2, 2, 1]-like groups written out: 7 features in 3 groups are 0 0 0 1 1 2 2."""
    sizes = [size // q + (1 if g < size % q else 0) for g in range(q)]
    return [g for g, n in enumerate(sizes) for _ in range(n)]


def dense(M: Tensor, kind: int, b: int, a: int) -> Tensor:
    """dW in fp64, from the table of the method: compression C, decompression D, rotations as 2 x 2 blocks."""
    q, M = M.shape[0], M.double()
    n = math.ceil(a / q)
    padded = [i % a for i in range(n * q)]  # which input stands at each place
    if kind == 6:
        u = torch.zeros(n * q, a, dtype=torch.float64)
        for g in range(n):
            place = torch.zeros(q, a, dtype=torch.float64)
            for j in range(q):
                place[j, padded[g * q + j]] = 1
            R = torch.zeros(q, q, dtype=torch.float64)
            for j in range(q // 2):
                angle = g * 10000 ** (-2 * j / q)
                R[j, j] = R[j + q // 2, j + q // 2] = math.cos(angle)
                R[j, j + q // 2], R[j + q // 2, j] = -math.sin(angle), math.sin(angle)
            u[g * q : (g + 1) * q] = M @ R @ place
        return torch.stack([u[o % (n * q)] for o in range(b)])
    C = torch.zeros(q, a, dtype=torch.float64)
    if kind in (1, 4):
        for at, i in enumerate(padded):
            C[at % q, i] += 1
    else:
        for i, g in enumerate(group_of(a, q)):
            C[g, i] = 1
    rows = [o % q for o in range(b)] if kind in (1, 3) else group_of(b, q)
    return (M @ C)[rows]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("out", "in_"), SHAPES)
@pytest.mark.parametrize("r", [1, 2, 100])
def test_forward_and_delta_are_the_formula(kind: int, out: int, in_: int, r: int) -> None:
    torch.manual_seed(0)
    here = site(out, in_)
    adapter = MoRA(r=r, type=kind).build([here]).adapters[here.path]
    assert not adapter.delta().any()
    nn.init.normal_(adapter.M)
    expected = dense(adapter.M.detach(), kind, out, in_)
    torch.testing.assert_close(adapter.delta().double(), expected, rtol=1e-5, atol=1e-5)
    x = torch.randn(3, 5, in_, requires_grad=True)
    y = adapter(x, torch.empty(0))
    torch.testing.assert_close(y.double(), x.double() @ expected.T, rtol=1e-5, atol=2e-5)
    # Gradients of M and x through forward are those through the dense update.
    ours = torch.autograd.grad(y.square().sum(), (adapter.M, x))
    algebra = torch.autograd.grad((x @ adapter.delta().T).square().sum(), (adapter.M, x))
    for got, wanted in zip(ours, algebra, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)
    assert torch.linalg.matrix_rank(expected) <= adapter.effective_rank <= min(out, in_)
    if (kind != 6 or in_ <= out) and adapter.q <= min(out, in_):
        assert torch.linalg.matrix_rank(expected) == adapter.effective_rank


def test_the_side() -> None:
    assert MoRA(r=2, type=1).side(site(17, 41)) == 11 and MoRA(r=2).side(site(17, 41)) == 10
    assert MoRA(r=1, type=1).side(site(10, 26)) == 6
    # Not bounded by the sides of W, as in the reference's files.
    assert MoRA(r=16, type=1).side(site(32, 64)) == 39 and MoRA(r=16).side(site(32, 64)) == 38
    assert MoRA(r=256).side(site(1024, 4096)) == 1144
    with pytest.raises(UserError, match=r"adapter\.type: 6 needs at least two") as error:
        MoRA(r=1).build([site(1, 1)])
    assert error.value.key == "adapter.type"


@pytest.mark.parametrize("kind", [0, 5, 7])
def test_other_types_are_refused(kind: int) -> None:
    with pytest.raises(ValidationError):
        MoRA(type=kind)


def test_type_6_says_which_inputs_it_ignores(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        MoRA(r=8).build([site(1024, 4096, name="k"), site(4096, 4096, name="q"), site(4096, 14336, name="down")])
        MoRA(r=8, type=1).build([site(1024, 4096)])
    (record,) = caplog.records  # q = 202: 6 of 21 blocks; q = 384: 11 of 38
    assert record.getMessage().endswith("out < in: k 70%, down 71%")
    here = site(8, 32)
    adapter = MoRA(r=1).build([here]).adapters[here.path]
    nn.init.normal_(adapter.M)
    unread = 32 - adapter.n * adapter.q
    read = adapter.delta().any(0)
    assert unread == 20 and not read[-unread:].any() and read[:-unread].all()


@pytest.mark.parametrize("kind", TYPES)
def test_experts(kind: int) -> None:
    here = site(12, 20, experts=3)
    adapter = MoRA(r=2, type=kind).build([here]).adapters[here.path]
    nn.init.normal_(adapter.M)
    assert adapter.delta().shape == (3, 12, 20)
    x, counts = torch.randn(7, 20), [2, 0, 5]
    outputs = adapter(x, torch.empty(0), counts).split(counts)
    for expert, rows in enumerate(x.split(counts)):
        alone = dense(adapter.M[expert].detach(), kind, 12, 20).float()
        torch.testing.assert_close(adapter.delta()[expert], alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(outputs[expert], rows @ alone.T, rtol=1e-5, atol=1e-5)


def test_angles_are_fp32_and_not_saved() -> None:
    here = site(12, 20)
    adapter = MoRA(r=2).build([here]).adapters[here.path]
    nn.init.normal_(adapter.M)
    assert list(adapter.state_dict()) == ["M"] and adapter.cos.dtype == torch.float32
    x = torch.randn(64, 20, dtype=torch.bfloat16)
    y = adapter(x, torch.empty(0))
    exact = x.double() @ adapter.delta().double().T
    assert y.dtype == torch.bfloat16 and (y.double() - exact).norm() / exact.norm() < 0.01
    assert adapter.cos.dtype == torch.float32


def test_the_forks_files_are_mora_not_lora() -> None:
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "use_mora": True, "mora_type": 1}
    assert MoRA.from_peft(config) == {"r": 8, "type": 1, "dropout": 0.0}
    assert [name for name, cls in METHODS.items() if cls.from_peft(config)] == ["mora", "peft"]  # the first counts
    assert MoRA.from_peft({**config, "use_mora": False}) is None
