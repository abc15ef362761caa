"""AdaLoRA against PEFT's allocator step by step; PriLoRA against its schedule and dense algebra."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from rasa_train.adapters.contract import Method
from rasa_train.adapters.inject import attach
from rasa_train.adapters.linear import AdaptedLinear
from rasa_train.adapters.registry import METHODS
from rasa_train.adapters.shared_input import packed
from rasa_train.adapters.site import Site
from rasa_train.adapters.state import adapters, rule_state, saved_tensors, trainable
from rasa_train.errors import UserError
from rasa_train.merging.lora import lora_factors
from rasa_train.methods.adalora import AdaLoRA
from rasa_train.methods.prilora import PriLoRA

STEPS = 16


class Toy(nn.Module):
    """Linears of two shapes in three layers; returns a loss, as PEFT's regulariser wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(10, 14), "down": nn.Linear(14, 10)}) for _ in range(3)
        )

    def forward(self, x: Tensor) -> SimpleNamespace:
        for layer in self.layers:
            x = x + layer["down"](layer["up"](x).tanh())
        return SimpleNamespace(loss=x.square().mean())


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def batch(step: int) -> Tensor:
    return torch.randn(32, 10, generator=torch.Generator().manual_seed(step))


def llama_count(method: Method) -> int:
    """Trained parameters on the shape of Llama-3.1-8B."""
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


# -- AdaLoRA -------------------------------------------------------------------------------------------------

# t_i = 3, masks at 4, 6, 8 and 10, the last choice at T - t_f = 11
FIELDS: dict[str, Any] = {"r": 3, "alpha": 10, "gamma": 0.5, "beta1": 0.8, "beta2": 0.9, "mask_every": 2}
METHOD = AdaLoRA(**FIELDS, tinit_ratio=3 / STEPS, tfinal_ratio=5 / STEPS)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, method: Method, steps: range, total: int) -> list[float]:
    losses = []
    for step in steps:
        loss = model(batch(step)).loss
        penalty = method.penalty(adapters(model))
        loss = loss if penalty is None else loss + penalty
        loss.backward()
        optimizer.step()
        method.after_step(adapters(model), step, total)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)


def test_adalora_agrees_with_peft_step_by_step() -> None:
    ours, base = toy(), toy()
    attach(ours, METHOD)
    config = peft.AdaLoraConfig(
        init_r=5,
        target_r=3,
        lora_alpha=10,
        beta1=0.8,
        beta2=0.9,
        orth_reg_weight=0.5,
        tinit=3,
        tfinal=5,
        deltaT=2,
        total_step=STEPS,
        target_modules=["up", "down"],
    )
    theirs = peft.get_peft_model(base, config).base_model
    pairs = []
    for path, adapter in adapters(ours).items():
        layer = theirs.model.get_submodule(path)
        names = {"Q": layer.lora_A, "P": layer.lora_B, "Lambda": layer.lora_E}
        for name, parameter in ((n, p["default"]) for n, p in names.items()):
            mine = adapter.get_parameter(name)
            mine.data.copy_(parameter.view_as(mine))
            pairs.append((name, mine, parameter))
    assert len(pairs) == 18
    our_sgd, their_sgd = sgd(ours), torch.optim.SGD([p for _, _, p in pairs], lr=0.5)
    zeros, regrown, left = [], 0, []
    for step in range(1, STEPS + 1):
        (mine,) = train(ours, our_sgd, METHOD, range(step, step + 1), STEPS)
        loss = theirs(batch(step)).loss
        loss.backward()
        their_sgd.step()
        theirs.update_and_allocate(step)
        their_sgd.zero_grad()
        assert mine == pytest.approx(float(loss.detach()), rel=1e-5)
        for _, a, b in pairs:
            torch.testing.assert_close(a, b.view_as(a), rtol=1e-4, atol=1e-6)
        Lambda = torch.cat([a for name, a, _ in pairs if name == "Lambda"])
        theirs_zero = torch.cat([b.flatten() for name, _, b in pairs if name == "Lambda"]) == 0
        assert torch.equal(Lambda == 0, theirs_zero), step
        regrown += bool(zeros and zeros[-1] and not theirs_zero.any())
        zeros.append(int(theirs_zero.sum()))
        left.append(len(Lambda) - zeros[-1])
    assert zeros[10:] == [12] * 6 and regrown >= 3, "masked, grown again, final"
    masked = [left[step - 1] for step in (4, 6, 8, 10, 11)]
    assert masked == [int(12 * (1 - (t - 3) / 8) ** 3 + 18) for t in (4, 6, 8, 10, 11)]
    kept = [lora_factors(adapter)[0].shape[0] for adapter in adapters(ours).values()]
    assert len(set(kept)) > 1, "ranks differ between sites"
    assert sum(kept) == 18
    for path, adapter in adapters(ours).items():
        torch.testing.assert_close(
            adapter.delta(),
            theirs.model.get_submodule(path).get_delta_weight("default"),
            rtol=1e-4,
            atol=1e-6,
        )


@pytest.mark.parametrize("stop", [2, 7, 11, 13])
def test_adalora_resumes_to_the_bit(stop: int) -> None:
    whole, first, second = toy(), toy(), toy()
    for model in (whole, first, second):
        torch.manual_seed(1)
        attach(model, METHOD)
    train(whole, sgd(whole), METHOD, range(1, STEPS + 1), STEPS)
    train(first, sgd(first), METHOD, range(1, stop + 1), STEPS)
    saved = {name: tensor.clone() for name, tensor in (saved_tensors(first) | rule_state(first)).items()}
    assert not any(name in saved_tensors(first) for name in rule_state(first))
    with torch.no_grad():
        for name, tensor in (saved_tensors(second) | rule_state(second)).items():
            tensor.copy_(saved[name])
    train(second, sgd(second), METHOD, range(stop + 1, STEPS + 1), STEPS)
    for name, tensor in saved_tensors(whole).items():
        assert torch.equal(tensor, saved_tensors(second)[name]), name


def test_adalora_starts_at_zero_and_learns() -> None:
    model = toy()
    before = float(model(batch(0)).loss.detach())
    attach(model, METHOD)
    assert float(model(batch(0)).loss.detach()) == before
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    train(model, optimizer, METHOD, range(1, STEPS + 1), STEPS)
    assert float(model(batch(0)).loss.detach()) < 0.8 * before


def test_penalty_is_zero_for_orthonormal_factors() -> None:
    model = toy()
    attach(model, METHOD)
    for adapter in adapters(model).values():
        adapter.P.data = torch.linalg.qr(adapter.P.data).Q
        adapter.Q.data = torch.linalg.qr(adapter.Q.data.T).Q.T
    penalty = METHOD.penalty(adapters(model))
    assert penalty is not None and float(penalty.detach()) == pytest.approx(0.0, abs=1e-6)
    adapter.P.data *= 2  # now |P^T P - I| = |3 I| = 3 sqrt(5), one of twelve matrices
    penalty = METHOD.penalty(adapters(model))
    assert penalty is not None and float(penalty.detach()) == pytest.approx(0.5 * 3 * math.sqrt(5) / 12, rel=1e-5)
    assert AdaLoRA(gamma=0).penalty(adapters(model)) is None


def test_no_budget_to_give_back_masks_nothing() -> None:
    model, method = toy(), AdaLoRA(r=4, init_r=4, mask_every=1)
    attach(model, method)
    train(model, sgd(model), method, range(1, STEPS + 1), STEPS)
    assert all(adapter.Lambda.all() for adapter in adapters(model).values())


def test_adalora_of_fused_experts() -> None:
    """Each expert is a site of its own to the allocator: the same as linears side by side."""
    torch.manual_seed(0)
    method = AdaLoRA(r=2, gamma=0.1, mask_every=1, tinit_ratio=0.0, tfinal_ratio=0.0)
    fused = method.build([Site("e", "e", 0, 12, 10, "e", num_experts=3)]).adapters
    single = method.build([Site(f"e{i}", "e", 0, 12, 10, f"e{i}") for i in range(3)]).adapters
    whole = fused["e"]
    nn.init.normal_(whole.Lambda)
    for i, adapter in enumerate(single.values()):
        for name, parameter in adapter.named_parameters():
            parameter.data.copy_(whole.get_parameter(name)[i])
    x = torch.randn(3, 7, 10)
    for step in (1, 2):
        for group, outputs in (
            (fused, [whole(x.flatten(0, 1), torch.empty(0), [7, 7, 7])]),
            (single, [adapter(x[i], torch.empty(0)) for i, adapter in enumerate(single.values())]),
        ):
            penalty = method.penalty(group)
            assert penalty is not None
            (sum(y.square().sum() for y in outputs) + penalty).backward()
            method.after_step(group, step, 4)
    for i, adapter in enumerate(single.values()):
        torch.testing.assert_close(whole.P.grad[i], adapter.P.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(whole.delta()[i], adapter.delta(), rtol=1e-4, atol=1e-6)
    assert 0 < int((whole.Lambda == 0).sum()) < 9


def test_adalora_without_gradients_is_an_error() -> None:
    model = toy()
    attach(model, METHOD)
    with pytest.raises(UserError, match=r"distributed\.strategy must be ddp"):
        METHOD.after_step(adapters(model), 1, STEPS)


@pytest.mark.parametrize("r", [8, 16, 32])
def test_counts_of_adalora(r: int) -> None:
    expected = {8: 31_459_968, 16: 62_919_936, 32: 125_839_872}[r]
    assert AdaLoRA(r=r).init_r == 1.5 * r
    assert llama_count(AdaLoRA(r=r)) == expected


@pytest.mark.parametrize(
    "fields",
    [{"r": 8, "init_r": 7}, {"tinit_ratio": 0.5, "tfinal_ratio": 0.5}, {"gamma": -1}, {"beta1": 1.0}],
)
def test_fields_of_adalora(fields: dict[str, float]) -> None:
    assert AdaLoRA(r=5).init_r == 8
    with pytest.raises(ValidationError):
        AdaLoRA(**fields)


# -- PriLoRA -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("r", "first", "last", "total", "count"),
    [
        (8, 4, 12, 260, 21_299_200),
        (16, 8, 24, 520, 42_598_400),
        (32, 17, 48, 1040, 85_196_800),
    ],
)
def test_ranks_grow_with_depth(r: int, first: int, last: int, total: int, count: int) -> None:
    ranks = [PriLoRA(r=r).rank(l, 32) for l in range(1, 33)]
    assert (ranks[0], ranks[-1], sum(ranks)) == (first, last, total) and ranks == sorted(ranks)
    assert llama_count(PriLoRA(r=r)) == count


def test_l_counts_layers_with_sites() -> None:
    sites = [Site(f"{i}.{k}", k, i, 12, 10, "w") for i in (7, 3, 5) for k in ("up", "down")]
    built = PriLoRA(r=6, alpha=12).build(sites).adapters
    assert {path: a.A.shape[0] for path, a in built.items()} == {
        "3.up": 5, "3.down": 5, "5.up": 7, "5.down": 7, "7.up": 9, "7.down": 9
    }  # fmt: skip
    adapter = built["5.up"]
    adapter.B.data.normal_()
    torch.testing.assert_close(adapter.delta(), 12 / 7 * adapter.B @ adapter.A)
    assert adapter.effective_rank == 7


def one(**fields: Any) -> tuple[PriLoRA, Any, dict[str, Any]]:
    torch.manual_seed(0)
    method = PriLoRA(r=4, **fields)
    group = method.build([Site("s", "s", 0, 12, 10, "w")]).adapters
    return method, group["s"].train(), group


def test_pruning_takes_the_least_important_of_each_row() -> None:
    method, adapter, group = one(prune_every=3, prune_ratio=0.33, ema_beta=0.8)
    norms, scales = torch.zeros(10), torch.logspace(-1, 1, 10)
    for step in range(1, 4):
        parts = [torch.randn(2, 5, 10) * scales, torch.randn(3, 4, 10) * scales]  # two micro-batches
        for x in parts:
            adapter.watch(x)
        tokens = torch.cat([x.reshape(-1, 10) for x in parts])
        norms = 0.8 * norms + 0.2 * tokens.norm(dim=0)
        before = adapter.A.detach().clone()
        method.after_step(group, step, 10)
        torch.testing.assert_close(adapter.norms, norms)
        assert torch.equal(adapter.A, before) == (step < 3)
    for row, old in zip(adapter.A, before, strict=True):
        order = sorted(range(10), key=lambda j: abs(float(old[j])) * float(norms[j]))
        assert (row[order[:3]] == 0).all(), "a share of 0.33 of 10, rounded down"
        assert torch.equal(row[order[3:]], old[order[3:]])
    by_size_alone = before.abs().topk(3, largest=False).indices.sort().values
    assert not torch.equal((adapter.A == 0).nonzero()[:, 1].view(-1, 3), by_size_alone), "the input counts too"


def test_pruned_entries_grow_again_and_the_end_prunes_once_more() -> None:
    model, method = toy(), PriLoRA(r=4, prune_every=5, prune_ratio=0.5)
    attach(model, method)
    optimizer, history = sgd(model), []
    for step in range(1, 14):
        train(model, optimizer, method, range(step, step + 1), 13)
        zeros = {float((adapter.A == 0).float().mean()) for adapter in adapters(model).values()}
        history.append(zeros)
    assert [step for step, zeros in enumerate(history, 1) if zeros == {0.5}] == [5, 10, 13]
    assert all(zeros == {0.0} for step, zeros in enumerate(history, 1) if step not in (5, 10, 13))


@pytest.mark.parametrize("fast", [False, True])
def test_only_training_is_watched(fast: bool) -> None:
    method, adapter, group = one(prune_every=1)
    linear = AdaptedLinear(nn.Linear(10, 12, bias=False).bfloat16().requires_grad_(False), adapter)
    with packed([linear.group]) if fast else nullcontext():
        with torch.no_grad():
            linear.eval()(1e6 * torch.randn(5, 10, dtype=torch.bfloat16))
        linear.train()(x := torch.randn(5, 10, dtype=torch.bfloat16))
    method.after_step(group, 1, 10)
    torch.testing.assert_close(adapter.norms, 0.1 * x.float().norm(dim=0))
    assert list(rule_state_names(adapter)) == ["norms"] and "norms" not in adapter.state_dict()


def rule_state_names(adapter: nn.Module) -> list[str]:
    return [name for name, _ in adapter.named_buffers()]


def test_activation_checkpointing_prunes_the_same_entries() -> None:
    plain, checkpointed = toy(), toy()
    method = PriLoRA(r=4, prune_every=1, dropout=0.5)
    for model in (plain, checkpointed):
        torch.manual_seed(1)
        attach(model, method)
        for adapter in adapters(model).values():
            nn.init.normal_(adapter.B)

    def loss(model: Toy, x: Tensor, recompute: bool) -> Tensor:
        torch.manual_seed(2)
        for layer in model.layers:

            def run(x: Tensor, layer: Any = layer) -> Tensor:
                return x + layer["down"](layer["up"](x).tanh())

            x = checkpoint(run, x, use_reentrant=False) if recompute else run(x)
        return x.square().mean()

    for model in (plain, checkpointed):
        loss(model, batch(0), model is checkpointed).backward()
        grads = {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}
        if model is plain:
            expected = grads
        method.after_step(adapters(model), 1, 10)
    for name, tensor in trainable(plain).items():
        torch.testing.assert_close(grads[name], expected[name], rtol=0, atol=0)
        torch.testing.assert_close(trainable(checkpointed)[name], tensor, rtol=0, atol=0)


def test_workers_prune_the_same_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each worker sees a part of the batch; the sums of all workers decide."""
    model = toy()
    method = PriLoRA(r=4, prune_every=1)
    torch.manual_seed(1)
    attach(model, method)
    other, whole = copy.deepcopy(model), copy.deepcopy(model)
    x = batch(0) * torch.logspace(-1, 1, 32).unsqueeze(1)
    for worker, share in ((model, x[:16]), (other, x[16:]), (whole, x)):
        worker(share)
    seen = torch.cat([adapter.squares.flatten() for adapter in adapters(other).values()])
    method.after_step(adapters(whole), 1, 10)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(seen))
    method.after_step(adapters(model), 1, 10)
    for name, tensor in trainable(whole).items():
        assert torch.equal(trainable(model)[name], tensor), name


def test_prilora_of_fused_experts() -> None:
    torch.manual_seed(0)
    method = PriLoRA(r=4, prune_every=1)
    group = method.build([Site("e", "e", 0, 12, 10, "e", num_experts=3)]).adapters
    fused = group["e"].train()
    x = torch.randn(7, 10)
    fused.watch(torch.cat([x, 2 * x]), [0, 7, 7])
    method.after_step(group, 1, 10)
    torch.testing.assert_close(fused.norms, 0.1 * torch.outer(torch.tensor([0.0, 1, 2]), x.norm(dim=0)))
    assert ((fused.A == 0).sum(-1) == 5).all() and fused.A.shape == (3, 6, 10)


@pytest.mark.parametrize("fields", [{"prune_ratio": 1.0}, {"prune_every": 0}, {"ema_beta": 1.0}, {"r": 0}])
def test_fields_of_prilora(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        PriLoRA(**fields)


def test_methods_are_known_by_name() -> None:
    assert (METHODS["adalora"], METHODS["prilora"]) == (AdaLoRA, PriLoRA)
