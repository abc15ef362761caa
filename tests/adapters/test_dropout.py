"""Dropout on an adapter's input: shares, scales and gradients, against their definitions."""

from __future__ import annotations

import pytest
import torch

from rasa_train.kernels.dropout import dropout, dropped, fused


@pytest.mark.parametrize("draw", [dropout, fused])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_share_and_scale(draw: object, p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(999, 1001, dtype=dtype)
    y, mask, factor = draw(x, p)  # type: ignore[operator]
    zero = float((y == 0).double().mean())
    assert zero == pytest.approx(p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5 + 2**-17)
    assert torch.equal(y, (x.float() * mask.float() * factor).to(dtype))  # rounded once, from fp32
    assert float(y.double().sum()) == pytest.approx(x.numel(), rel=5e-3)
    kept = mask.double().reshape(-1)  # neighbours come of one draw; they must be independent all the same
    for lag in (1, 2, 3, 4):
        correlation = torch.corrcoef(torch.stack([kept[:-lag], kept[lag:]]))[0, 1]
        assert abs(float(correlation)) < 5 / x.numel() ** 0.5


def test_odd_sizes_and_extremes() -> None:
    for shape in ((0,), (1,), (3, 5), (2, 3, 7)):
        y, mask, _ = dropout(torch.ones(shape), 0.5)
        assert y.shape == mask.shape == shape
    assert dropout(torch.ones(1000), 1 - 1e-9)[0].count_nonzero() <= 1
    y, _, factor = dropout(torch.ones(1000), 1e-9)
    assert factor == 1 and torch.equal(y, torch.ones(1000))


def test_gradient_and_seed() -> None:
    x = torch.randn(64, 33, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    y, mask, factor = dropout(x, 0.3)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(gradient, 2 * x.detach() * (mask * factor) ** 2)
    torch.manual_seed(3)
    assert torch.equal(dropped(x, 0.3), y) and not torch.equal(dropped(x, 0.3), y)
