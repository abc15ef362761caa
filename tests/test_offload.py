"""Activations in host memory: nothing changes but where they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rasa_train.adapters.inject import attach
from rasa_train.adapters.registry import METHODS
from rasa_train.adapters.shared_input import packed
from rasa_train.adapters.state import groups
from rasa_train.training.offload import LEAST, offloaded


def gradients(model: nn.Module, source: str, x: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    with offloaded(model, source) as moved:
        loss = model(x).square().mean()
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], moved.bytes


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("fast", [False, True])
def test_same_gradients_and_no_weight_is_moved(fast: bool) -> None:
    torch.manual_seed(0)
    model = Layers()
    attach(model, METHODS["rasa"](r=8, k=2, alpha=8))
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    tokens = 2 * LEAST // (256 * 4)
    x = torch.randn(tokens, 256)
    with packed(groups(model) if fast else []):
        expected, nothing = gradients(model, "cuda", x)
    with packed(groups(model) if fast else []):
        got, moved = gradients(model, "cpu", x)  # here the "device" is this machine, so that the copies are made
    assert nothing == 0
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    one = tokens * 256 * 4
    # Of each layer its input and the GELU's; of the loss its own: but no W, which would be another 256 KiB each.
    assert moved in range(4 * one, 7 * one) and moved % one == 0


def test_small_and_expanded_tensors_stay() -> None:
    model = nn.Linear(4, 4)
    with offloaded(model, "cpu") as moved:
        wide = torch.randn(1, 256).requires_grad_() * 1.0
        (wide.expand(4096, 256) * wide.expand(4096, 256)).sum().backward()
    assert moved.bytes == 0


@pytest.mark.gpu
def test_memory_of_a_gpu() -> None:
    def peak(source: str) -> int:
        torch.manual_seed(0)
        model = Layers().cuda()
        x = torch.randn(2**17, 256, device="cuda", requires_grad=True)
        torch.cuda.reset_peak_memory_stats()
        gradients(model, source, x)
        return torch.cuda.max_memory_allocated()

    assert peak("cuda") < 0.8 * peak("none")
