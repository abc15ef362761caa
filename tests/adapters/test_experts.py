"""Mixture of experts: the oracle is transformers' own forward, with the base's weights or with W + dW in them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rasa_train.adapters.contract import Adapter, Built, FactorAdapter, Method, linear, zeros
from rasa_train.adapters.experts import is_supported
from rasa_train.adapters.inject import attach
from rasa_train.adapters.site import Site
from rasa_train.adapters.sites import find_sites, not_adapted
from rasa_train.adapters.state import adapters, trainable
from rasa_train.methods.dora import DoRA
from rasa_train.methods.lora import LoRA
from rasa_train.methods.mora import MoRA
from rasa_train.methods.prilora import PriLoRA
from rasa_train.methods.rasa import RaSA
from rasa_train.methods.vera import VeRA

SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
MIXTRAL_8X7B: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {**SMALL, "num_local_experts": 4},
    "qwen3_moe": {**SMALL, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 8, "head_dim": 8},
    "deepseek_v3": {  # one dense layer, and a shared expert beside the fused ones
        **SMALL, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 8,
    },
    "gemma4_text": {  # its router is a linear in a module, and has scales of its own
        **SMALL, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 8,
        "head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 0,
    },
}  # fmt: skip
IDS = torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(0))
METHODS = pytest.mark.parametrize("method", [LoRA(r=4), RaSA(r=4, k=1), DoRA(r=4)], ids=lambda m: m.method)
MORE = [RaSA(r=4, k=1), LoRA(r=4), MoRA(r=4), MoRA(r=4, type=2), VeRA(r=8), DoRA(r=4), PriLoRA()]
every_model = pytest.mark.parametrize("kind", MODELS)


def tiny(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **MODELS[kind])
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").to(dtype).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def test_flags_of_older_and_newer_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.17 does not have the flag for a norm after the experts; with it and set, the layout is another."""
    experts = tiny("mixtral").get_submodule("model.layers.0.mlp.experts")
    for holder in (experts, type(experts)):
        if "has_post_expert_norm" in vars(holder):
            monkeypatch.delattr(holder, "has_post_expert_norm")
    assert not hasattr(experts, "has_post_expert_norm") and is_supported(experts)
    experts.has_post_expert_norm = True
    assert not is_supported(experts)


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_changes_at_first(kind: str, dtype: torch.dtype) -> None:
    model = tiny(kind, dtype)
    before, names = model(IDS).logits, [name for name, _ in model.named_parameters()]
    sites = attach(model, RaSA(r=4, k=1))
    assert torch.equal(model(IDS).logits, before)
    assert set(names) <= set(dict(model.named_parameters())), "the base keeps its names"
    fused = [site for site in sites if site.num_experts]
    assert len(fused) == 3 * (1 if kind == "deepseek_v3" else 2) and {s.path for s in fused} <= set(adapters(model))
    assert not any(name in site.path.split(".") for site in sites for name in ("gate", "router"))


@every_model
@METHODS
def test_the_update_is_of_each_experts_weights(kind: str, method: Method) -> None:
    model, merged = tiny(kind), tiny(kind)
    attach(model, method)
    torch.manual_seed(1)
    for parameter in trainable(model).values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for adapter in adapters(model).values():
        site, rows = adapter.site, slice(*(adapter.site.rows or (None,)))
        W = merged.get_parameter(site.weight)
        part = W.data[:, rows] if site.num_experts else W.data
        part += adapter.delta(part.clone()).detach()
    assert (model(IDS).logits - tiny(kind)(IDS).logits).abs().max() > 1e-2
    torch.testing.assert_close(model(IDS).logits, merged(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [MORE[0], *MORE[2:6]], ids=lambda m: m.method)
def test_gradients_are_those_of_transformers_loop(method: Method) -> None:
    """Those of the input, and those of the adapters, which are the gradients of W + dW times the derivative of dW."""
    model, merged = tiny("qwen3_moe"), tiny("qwen3_moe")
    attach(model, method)
    torch.manual_seed(1)
    for parameter in trainable(model).values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    merged.requires_grad_(False)
    found = adapters(model).values()
    views = [adapter.site.view(merged.get_parameter(adapter.site.weight)) for adapter in found]
    deltas = [adapter.delta(view.clone()) for adapter, view in zip(found, views, strict=True)]
    for view, delta in zip(views, deltas, strict=True):
        view += delta.detach()
    names, own = zip(*trainable(model).items(), strict=True)
    x = torch.randn(3, 9, 16, requires_grad=True)
    ours = torch.autograd.grad(model(inputs_embeds=x).logits.square().mean(), [x, *own])

    bases = [merged.get_parameter(adapter.site.weight).requires_grad_() for adapter in found]
    dx, *dW = torch.autograd.grad(merged(inputs_embeds=x).logits.square().mean(), [x, *bases])
    dW = [adapter.site.view(gradient) for adapter, gradient in zip(found, dW, strict=True)]
    theirs = [dx, *torch.autograd.grad(deltas, own, dW)]
    for name, a, b in zip(["x", *names], ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max(), name


@pytest.mark.parametrize("method", MORE, ids=lambda m: m.method)
def test_the_host_needs_no_number_of_the_device(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no values: whatever reads one, or makes a shape of one, fails, as it would wait for a GPU."""
    model, fake = tiny("mixtral", torch.bfloat16), FakeTensorMode()
    attach(model, method)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: fake.from_tensor(t) for name, t in tensors.items() if t is not None})
    experts = model.get_submodule("model.layers.0.mlp.experts").train()
    own = [parameter for parameter in experts.parameters() if parameter.requires_grad]
    with fake:
        x, chosen = torch.randn(11, 16, dtype=torch.bfloat16, requires_grad=True), torch.randint(4, (11, 2))
        weights = torch.rand(11, 2, requires_grad=True)
        gradients = torch.autograd.grad(experts(x, chosen, weights).sum(), [x, weights, *own])
        assert [g.shape for g in gradients] == [p.shape for p in (x, weights, *own)]
        if isinstance(method, LoRA):
            monkeypatch.setattr(FactorAdapter, "takes_rows", False)
            with pytest.raises(DataDependentOutputException):
                experts(x, chosen, weights)


@pytest.mark.slow
@pytest.mark.parametrize("method", MORE[:4], ids=lambda m: m.method)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_as_one_graph(method: Method, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    model = tiny("mixtral", dtype)
    attach(model, method)
    for parameter in trainable(model).values():
        nn.init.normal_(parameter, std=0.1)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    own = [parameter for parameter in experts.parameters() if parameter.requires_grad]
    compiled = torch.compile(experts, backend="aot_eager", dynamic=True, fullgraph=True)
    for tokens in (11, 6):
        x = torch.randn(tokens, 16, dtype=dtype, requires_grad=True)
        weights, chosen = torch.rand(tokens, 4).topk(2)
        results = []
        for module in (experts, compiled):
            y = module(x, chosen, weights.requires_grad_())
            results.append((y, *torch.autograd.grad(y.float().square().sum(), [x, weights, *own])))
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


class Plain(LoRA):
    """A method of a user's own, whose adapters want the counts as a list."""

    def build(self, sites: list[Site]) -> Built:
        return Built({site.path: PlainAdapter(site, self) for site in sites}, {})


class PlainAdapter(Adapter):
    effective_rank = 1

    def __init__(self, site: Site, method: Method) -> None:
        super().__init__(site, method)
        self.b = zeros(*site.lead, site.out_features)

    def forward(self, x: Tensor, weight: Tensor, counts: list[int] | None = None) -> Tensor:
        assert counts is not None
        parts = zip(torch.split(x, counts), self.b, strict=True)
        return torch.cat([rows.sum(-1, keepdim=True) * b for rows, b in parts])

    def delta(self, weight: Tensor | None = None) -> Tensor:
        return self.b.detach().unsqueeze(-1).expand(*self.site.lead, *self.site.shape)


def test_an_adapter_may_take_the_counts_as_a_list() -> None:
    model, merged = tiny("mixtral"), tiny("mixtral")
    attach(model, Plain(targets=["experts.up_proj", "experts.down_proj"]))
    for adapter in adapters(model).values():
        nn.init.normal_(adapter.b, std=0.1)
        adapter.site.view(merged.get_parameter(adapter.site.weight)).data += adapter.delta()
    torch.testing.assert_close(model(IDS).logits, merged(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tokens(dtype: torch.dtype) -> None:
    model = tiny("mixtral", dtype)
    attach(model, RaSA(r=4, k=1))
    x = torch.zeros(0, 16, dtype=dtype, requires_grad=True)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    y = experts(x, torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    y.sum().backward()
    assert y.shape == (0, 16) and x.grad is not None


def test_saved_names_and_shapes() -> None:
    model = tiny("mixtral")
    attach(model, RaSA(r=4, k=1))
    shapes = {name: tuple(p.shape) for name, p in trainable(model).items()}
    path = "model.layers.1.mlp.experts"
    assert shapes[f"{path}.gate_proj.A"] == (4, 3, 16) and shapes[f"{path}.down_proj.B"] == (4, 16, 3)
    assert shapes[f"{path}.up_proj.d"] == (4, 3 + 2)
    assert shapes["pools.mlp__experts__down_proj.A_S"] == (4, 2, 24), "a pool of each expert across the layers"


def test_activation_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny("mixtral").train()
        attach(model, LoRA(r=4, dropout=0.2))
        for parameter in trainable(model).values():
            nn.init.normal_(parameter, std=0.1)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        model(IDS, use_cache=False).logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in trainable(model).items()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_an_expert_without_tokens_gets_a_zero_gradient() -> None:
    model = tiny("mixtral")
    attach(model, LoRA(r=4))
    for parameter in trainable(model).values():
        nn.init.normal_(parameter, std=0.1)
    model(IDS[:1, :1]).logits.square().sum().backward()  # one token, two of four experts
    grad = trainable(model)["model.layers.0.mlp.experts.up_proj.A"].grad
    assert grad is not None and (grad.flatten(1).norm(dim=1) > 0).sum() == 2


@pytest.mark.parametrize(("method", "count"), [(LoRA(r=4), 60_030_976), (RaSA(r=4, k=1), 60_062_336)])
def test_parameters_on_mixtral_8x7b(method: Method, count: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **MIXTRAL_8X7B))
        assert len(attach(model, method)) == 7 * 32
    attention = 2 * (4096 + 4096) + 2 * (4096 + 1024)
    by_hand = 32 * 4 * (attention + 8 * 3 * (4096 + 14336))
    if isinstance(method, RaSA):  # d of 4 + 3 * 8 types in 32 layers
        by_hand += (4 + 3 * 8) * 32 * (4 - 1 + 32)
    assert sum(p.numel() for p in trainable(model).values()) == by_hand == count


@pytest.mark.parametrize(
    ("name", "found"),
    [("w1", {"gate_proj"}), ("w2", {"down_proj"}), ("experts.up_proj", {"up_proj"}), ("down_proj", {"down_proj"}),
     ("gate_up_proj", {"gate_proj", "up_proj"})],
)  # fmt: skip
def test_names_of_experts_linears(name: str, found: set[str]) -> None:
    sites = find_sites(tiny("mixtral"), [name])
    assert {site.kind for site in sites} == {f"mlp.experts.{name}" for name in found}
    model = tiny("mixtral")
    before = model(IDS).logits
    attach(model, LoRA(targets=[name]))
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("gpt_oss", {"num_local_experts": 3, "head_dim": 8}), ("llama4_text", {"num_local_experts": 2, "head_dim": 8})],
)
def test_experts_in_other_layouts_are_left_out_and_named(kind: str, fields: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **fields))
    assert {site.kind.rpartition(".")[2] for site in find_sites(model)} >= {"q_proj", "o_proj"}
    assert not any("experts" in site.kind or "router" in site.kind for site in find_sites(model))
    assert re.search(r"^not adapted: the weights of \w+Experts", not_adapted(model) or "")
    assert not_adapted(tiny("mixtral")) is None
    assert {site.kind for site in find_sites(model, ["q_proj"])} == {"self_attn.q_proj"}


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "in_"), [(24, 16), (6, 16), (16, 5)])
def test_each_experts_rows_by_its_own_weights(out: int, in_: int, dtype: torch.dtype, autocast: bool) -> None:
    """Whether the kernel allows the sides or not; an expert without rows among them."""
    counts = [5, 0, 9, 6]
    x = torch.randn(20, in_, dtype=dtype, requires_grad=True)
    W = torch.randn(4, out, in_, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = linear(x, W, counts)
        expected = torch.cat([rows @ own.T for rows, own in zip(x.split(counts), W, strict=True)])
    torch.testing.assert_close(y, expected)
    for dy in (torch.randn_like(y), torch.ones(()).to(y.dtype).expand_as(y)):
        ours, theirs = (torch.autograd.grad(t, (x, W), dy, retain_graph=True) for t in (y, expected))
        torch.testing.assert_close(ours, theirs)
