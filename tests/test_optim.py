"""Optimizers, against other implementations."""

from __future__ import annotations

import pytest
import torch
from lion_pytorch import Lion as Oracle
from torch import Tensor, nn

from rasa_train.distributed.ddp import DataParallel
from rasa_train.optim.optimizers import AdamW, LionW, make_optimizer
from rasa_train.optim.schedule import set_lr


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lion_is_lion_pytorch_to_the_bit(weight_decay: float) -> None:
    """130 tensors (several rounds), one of which never has a gradient, over 20 steps of a moving learning rate."""
    torch.manual_seed(0)
    shapes = [(1 + i % 7, 3) for i in range(128)] + [(40, 50), ()]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    config = LionW(lr=1e-2, betas=(0.9, 0.95), weight_decay=weight_decay)
    a = make_optimizer(config, ours)
    b = Oracle(theirs, lr=1e-2, betas=(0.9, 0.95), weight_decay=weight_decay, decoupled_weight_decay=True)
    for step in range(20):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            if i != 3:
                p.grad = torch.randn_like(p) * (step % 3)  # all zero at times: a sign of 0
                q.grad = p.grad.clone()
        for optimizer in (a, b):
            set_lr(optimizer, 1e-2 * (1 - step / 25))
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    assert ours[3] not in a.state and len(a.state) == len(b.state) == 129
    assert all(
        torch.equal(a.state[p]["exp_avg"], b.state[q]["exp_avg"])
        for p, q in zip(ours, theirs, strict=True)
        if p is not ours[3]
    )


@pytest.mark.parametrize("config", [LionW(lr=1e-2), AdamW(lr=1e-2)], ids=lambda c: c.name)
def test_groups_have_rates_of_their_own(config: LionW | AdamW) -> None:
    """A group with factor 4 moves as one that was given four times the rate."""
    grouped = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    single = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    together = make_optimizer(config, {1.0: grouped[:1], 4.0: grouped[1:]})
    apart = [make_optimizer(config, [p]) for p in single]
    for step in range(3):
        lr = 1e-2 / (step + 1)
        for p in (*grouped, *single):
            p.grad = torch.tensor([1.0, -2.0, 0.5])
        set_lr(together, lr)
        for optimizer, factor in zip(apart, (1.0, 4.0), strict=True):
            set_lr(optimizer, lr * factor)
            optimizer.step()
        together.step()
    assert all(torch.equal(p, q) for p, q in zip(grouped, single, strict=True))
    assert not torch.equal(grouped[0], grouped[1])


@pytest.mark.gpu
def test_adamw_on_a_gpu_is_fused_and_resumes() -> None:
    """The fused kernel against torch's loop over tensors on the CPU, its state carried over in the middle."""
    torch.manual_seed(0)
    values, gradients = [torch.randn(7, 5) for _ in range(9)], [torch.randn(7, 5) for _ in range(6)]

    def run(device: str, handed_over: bool) -> list[Tensor]:
        parameters = [nn.Parameter(value.clone().to(device)) for value in values]  # a CPU tensor is not copied by to()
        engine = DataParallel.__new__(DataParallel)
        engine.optimizer = make_optimizer(AdamW(lr=1e-2), parameters)
        for step, gradient in enumerate(gradients):
            if handed_over and step == 3:
                states = {p: {key: t.cpu() for key, t in engine.optimizer.state[p].items()} for p in parameters}
                engine.optimizer = make_optimizer(AdamW(lr=1e-2), parameters)
                engine.load_optimizer_state(states)
            for parameter in parameters:
                parameter.grad = gradient.to(device)
            engine.optimizer.step()
        assert bool(engine.optimizer.param_groups[0]["fused"]) == (device == "cuda")
        return [parameter.detach().cpu() for parameter in parameters]

    expected = run("cpu", False)
    for handed_over in (False, True):
        for a, b in zip(run("cuda", handed_over), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
