"""Mixture of experts: the oracle is transformers' own forward, with the base's weights or with W + dW in them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rasa_train.adapters.contract import Method, linear
from rasa_train.adapters.experts import is_supported
from rasa_train.adapters.inject import attach
from rasa_train.adapters.sites import find_sites, not_adapted
from rasa_train.adapters.state import adapters, trainable
from rasa_train.methods.dora import DoRA
from rasa_train.methods.lora import LoRA
from rasa_train.methods.rasa import RaSA

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "in_"), [(24, 16), (6, 16), (16, 5)])
def test_each_experts_rows_by_its_own_weights(out: int, in_: int, dtype: torch.dtype) -> None:
    """In one product where the sides allow it, or one after another; an expert without rows among them."""
    counts = [5, 0, 9, 6]
    x = torch.randn(20, in_, dtype=dtype, requires_grad=True)
    W = torch.randn(4, out, in_, dtype=dtype, requires_grad=True)
    y, dy = linear(x, W, counts), torch.randn(20, out, dtype=dtype)
    expected = torch.cat([rows @ own.T for rows, own in zip(x.split(counts), W, strict=True)])
    torch.testing.assert_close(y, expected)
    for ours, theirs in zip(*(torch.autograd.grad(t, (x, W), dy) for t in (y, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)
