"""Activations in host memory: nothing changes but where they are."""

from __future__ import annotations

import weakref
from typing import ClassVar

import pytest
import torch
from torch import nn

from rasa_train.adapters.inject import attach
from rasa_train.adapters.registry import METHODS
from rasa_train.adapters.shared_input import packed
from rasa_train.adapters.state import groups
from rasa_train.training.offload import LEAST, CopyAtOnce, offloaded


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


class LateCopy:
    """A copy that is made only when something has to begin after it. It does not hold the tensor that it reads."""

    waiting: ClassVar[list[LateCopy]] = []
    guarded: ClassVar[list[int]] = []

    def __init__(self, tensor: torch.Tensor, host: torch.Tensor) -> None:
        self.address, self.tensor, self.host = tensor.data_ptr(), weakref.ref(tensor), host
        host.fill_(torch.nan)
        self.waiting.append(self)

    def done(self) -> bool:
        return self not in self.waiting

    def before_next(self) -> None:
        while not self.done():  # copies are made in order
            first = self.waiting.pop(0)
            tensor = first.tensor()
            assert tensor is not None
            first.host.copy_(tensor)

    def guard(self, tensor: torch.Tensor) -> None:
        assert tensor.data_ptr() == self.address and not self.done()
        self.guarded.append(tensor.nbytes)


@pytest.mark.parametrize("fit", [0, 1, 2, 100])
def test_tensors_are_held_until_they_are_copied(fit: int) -> None:
    """At most ``fit`` of the tensors are held at a time, and gradients are right whatever is copied late."""
    torch.manual_seed(0)
    LateCopy.waiting, LateCopy.guarded = [], []
    model, x = Layers(), torch.randn(LEAST // 1024, 256)
    expected, _ = gradients(model, "cuda", x)
    with offloaded(model, "cpu", LateCopy, most=fit * LEAST) as moved:
        loss = model(x).square().mean()
        number = moved.bytes // LEAST
        assert number >= 5 and moved.held == min(fit, number) * LEAST == len(LateCopy.waiting) * LEAST
    assert moved.held == 0 and LateCopy.guarded == [LEAST] * min(fit, number)
    for again in (True, False):  # the tensors of a graph may be asked for twice
        model.zero_grad()
        loss.backward(retain_graph=again)
        for p, right in zip(model.parameters(), expected, strict=True):
            assert p.grad is not None
            torch.testing.assert_close(p.grad, right, rtol=0, atol=0)


def test_a_copy_that_is_done_releases_its_tensor() -> None:
    """Memory of tensors that nothing else uses is free before the backward pass begins."""
    released = []

    class Watched(CopyAtOnce):
        def __init__(self, tensor: torch.Tensor, host: torch.Tensor) -> None:
            super().__init__(tensor, host)
            released.append(weakref.ref(tensor.untyped_storage()))

    x = torch.randn(LEAST // 4, requires_grad=True)
    with offloaded(nn.Identity(), "cpu", Watched) as moved:
        loss = x.exp().sin().cos().sum()
        assert moved.bytes == 3 * LEAST and moved.held == 0
    assert [storage() for storage in released] == [None] * 3
    loss.backward()
    exact = x.detach().requires_grad_()
    exact.exp().sin().cos().sum().backward()
    assert x.grad is not None and exact.grad is not None and torch.equal(x.grad, exact.grad)


@pytest.mark.gpu
def test_memory_of_a_gpu() -> None:
    def peak(source: str) -> int:
        torch.manual_seed(0)
        model = Layers().cuda()
        x = torch.randn(2**17, 256, device="cuda", requires_grad=True)
        torch.cuda.reset_peak_memory_stats()
        with offloaded(model, source, most=2**27):
            loss = model(x).square().mean()
        loss.backward()
        return torch.cuda.max_memory_allocated()

    assert peak("cuda") < 0.8 * peak("none")


@pytest.mark.gpu
@pytest.mark.parametrize("most", [0, 2**20, 2**40])
def test_gradients_on_a_gpu(most: int) -> None:
    """Memory that is released is soon used again, by tensors of the same size."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Layers() for _ in range(8))).cuda()
    x = torch.randn(2**14, 256, device="cuda")
    expected, _ = gradients(model, "none", x)
    for _ in range(3):
        with offloaded(model, most=most):
            loss = model(x).square().mean()
        model.zero_grad()
        loss.backward()
        for p, right in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, right, rtol=0, atol=0)
