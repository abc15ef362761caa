"""RaSA against the algebra of the paper, and LoRA against PEFT."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from rasa_train.adapters.contract import Built, FactorAdapter, Method
from rasa_train.adapters.inject import attach
from rasa_train.adapters.site import Site
from rasa_train.adapters.sites import find_sites
from rasa_train.adapters.state import adapters, trainable
from rasa_train.errors import UserError
from rasa_train.kernels.dropout import dropout
from rasa_train.methods.lora import LoRA
from rasa_train.methods.rasa import RaSA


def sites(layers: int = 4, out: int = 12, in_: int = 10, kind: str = "mlp.up") -> list[Site]:
    return [Site(f"layers.{i}.{kind}", kind, i, out, in_, f"layers.{i}.{kind}.weight") for i in range(layers)]


def randomized(built: Built) -> Built:
    torch.manual_seed(1)
    for module in (*built.adapters.values(), *built.pools.values()):
        for parameter in module.parameters():
            nn.init.normal_(parameter)
    return built


@pytest.mark.parametrize(("r", "k"), [(8, 1), (8, 2), (8, 7), (8, 0), (8, 8), (1, 0), (1, 1)])
def test_delta_is_equation_5(r: int, k: int) -> None:
    built = randomized(RaSA(r=r, k=k, alpha=8).build(sites()))
    pool = built.pools.get("mlp__up")
    for adapter in built.adapters.values():
        expected = torch.zeros(12, 10)
        d = adapter.d
        for j in range(r - k):  # private ranks, one outer product at a time
            expected += d[j] * torch.outer(adapter.B[:, j], adapter.A[j])
        for j in range(4 * k):  # ranks of the pool
            expected += d[r - k + j] * torch.outer(pool.B_S[:, j], pool.A_S[j])
        torch.testing.assert_close(adapter.delta(), expected, rtol=1e-5, atol=1e-5)
        x = torch.randn(3, 5, 10)
        torch.testing.assert_close(adapter(x, torch.empty(12, 10)), x @ expected.T, rtol=1e-4, atol=1e-4)


def test_rank_and_count() -> None:
    many = sites(layers=32, out=64, in_=80)
    built = randomized(RaSA(r=8, k=1).build(many))
    adapter = built.adapters["layers.5.mlp.up"]
    assert adapter.effective_rank == 8 - 1 + 32
    assert torch.linalg.matrix_rank(adapter.delta(), rtol=1e-4) == 39
    count = sum(p.numel() for m in (*built.adapters.values(), *built.pools.values()) for p in m.parameters())
    assert count == 32 * 8 * (64 + 80) + 32 * 39  # LoRA's parameters plus d


def test_start_of_d_is_equation_6() -> None:
    adapter = RaSA(r=8, k=2, alpha=32).build(sites()).adapters["layers.0.mlp.up"]
    assert adapter.d.tolist() == pytest.approx([32 / (2 * 6)] * 6 + [32 / (2 * 4 * 2)] * 8)
    assert adapter.delta().abs().max() == 0


@pytest.mark.parametrize(("compat", "share"), [("ours", 1.0), ("reference", 0.5)])
@pytest.mark.parametrize(("k", "ranks"), [(0, 8), (8, 4 * 8)])
def test_start_of_d_when_one_part_is_empty(compat: str, share: float, k: int, ranks: int) -> None:
    built = RaSA(r=8, k=k, alpha=16, init_compat=compat).build(sites())
    assert built.adapters["layers.0.mlp.up"].d.tolist() == pytest.approx([share * 16 / ranks] * ranks)
    assert ("mlp__up" in built.pools) == (k > 0)


def test_constant_d_is_lora_with_the_pools_ranks() -> None:
    """d = alpha / r everywhere is Eq. 4: the layers' own LoRA plus one LoRA for all."""
    built = randomized(RaSA(r=4, k=1, alpha=8).build(sites()))
    pool = built.pools["mlp__up"]
    for adapter in built.adapters.values():
        nn.init.constant_(adapter.d, 2.0)
        expected = 2.0 * (adapter.B @ adapter.A + pool.B_S @ pool.A_S)
        torch.testing.assert_close(adapter.delta(), expected)


def test_pool_gradient_is_the_sum_over_layers() -> None:
    built = randomized(RaSA(r=4, k=1, alpha=8).build(sites()))
    pool = built.pools["mlp__up"]
    x = torch.randn(6, 10)
    alone = []
    for adapter in built.adapters.values():
        (grad,) = torch.autograd.grad(adapter(x, torch.empty(0)).square().sum(), pool.A_S)
        alone.append(grad)
    sum(a(x, torch.empty(0)).square().sum() for a in built.adapters.values()).backward()
    torch.testing.assert_close(pool.A_S.grad, sum(alone))


def test_a_pool_belongs_to_one_kind_and_shape() -> None:
    mixed = [
        *sites(2),
        *sites(2, kind="attn.q"),
        *sites(3, out=6, kind="attn.k")[1:],
        *sites(1, out=12, kind="attn.k"),
    ]
    built = RaSA(r=4, k=1).build(mixed)
    assert sorted(built.pools) == ["attn__k__12x10", "attn__k__6x10", "attn__q", "mlp__up"]
    assert built.pools["attn__k__6x10"].A_S.shape == (2, 10)


@pytest.mark.parametrize("fields", [{"r": 8, "k": 9}, {"r": 8, "k": -1}, {"r": 0}, {"alpha": 0}, {"dropout": 1.0}])
def test_hyper_parameters_are_checked(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        RaSA(**fields)


@pytest.mark.parametrize(("r", "k"), [(4, 1), (8, 1), (16, 2), (32, 4)])
def test_default_k_is_an_eighth_of_r(r: int, k: int) -> None:
    assert RaSA(r=r).k == k


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_agrees_with_peft(rslora: bool) -> None:
    import peft

    torch.manual_seed(0)
    site = sites(1)[0]
    ours = randomized(LoRA(r=4, alpha=10, rslora=rslora).build([site])).adapters[site.path]
    model = nn.Sequential(nn.Linear(10, 12, bias=False))
    config = peft.LoraConfig(r=4, lora_alpha=10, use_rslora=rslora, target_modules=["0"])
    theirs = peft.get_peft_model(model, config).base_model.model[0]
    theirs.lora_A["default"].weight.data.copy_(ours.A)
    theirs.lora_B["default"].weight.data.copy_(ours.B)
    x = torch.randn(7, 10)
    torch.testing.assert_close(theirs(x), x @ theirs.base_layer.weight.T + ours(x, torch.empty(0)))
    torch.testing.assert_close(theirs.get_delta_weight("default"), ours.delta())


def test_dropout_acts_on_the_input_in_training_only() -> None:
    site = sites(1)[0]
    adapter = randomized(LoRA(r=4, dropout=0.5).build([site])).adapters[site.path]
    x = torch.randn(64, 10)
    adapter.eval()
    torch.testing.assert_close(adapter(adapter.drop(x), torch.empty(0)), x @ adapter.delta().T, rtol=1e-4, atol=1e-4)
    adapter.train()
    torch.manual_seed(3)
    dropped, *_ = dropout(x, 0.5)
    torch.manual_seed(3)
    out = adapter(adapter.drop(x), torch.empty(0))
    torch.testing.assert_close(out, dropped @ adapter.delta().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compute", ["model", "float32"])
def test_bfloat16_input_fp32_parameters(compute: str) -> None:
    site = sites(1)[0]
    adapter = randomized(LoRA(r=4, compute=compute).build([site])).adapters[site.path]
    x = torch.randn(64, 10, dtype=torch.bfloat16)
    out = adapter(adapter.drop(x), torch.empty(0))
    assert out.dtype == (torch.float32 if compute == "float32" else x.dtype) and adapter.A.dtype == torch.float32
    exact = x.double() @ adapter.delta().double().T
    assert (out.double() - exact).norm() / exact.norm() < (0.002 if compute == "float32" else 0.01)


# -- architectures -------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 40, "num_hidden_layers": 2}
HEADS = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
ARCHITECTURES = {
    "llama": ({**SMALL, **HEADS}, 7),
    "mistral": ({**SMALL, **HEADS}, 7),
    "qwen3": ({**SMALL, **HEADS, "head_dim": 8}, 7),
    "gemma2": ({**SMALL, **HEADS, "head_dim": 8}, 7),
    "phi3": ({**SMALL, **HEADS, "pad_token_id": 0}, 4),
    "gpt_neox": ({**SMALL, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}, 4),
    "gpt2": ({"vocab_size": 40, "n_layer": 2, "n_embd": 32, "n_head": 4}, 4),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", [LoRA(r=4), RaSA(r=4, k=1)], ids=["lora", "rasa"])
def test_every_decoder_architecture(architecture: str, method: Method) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    fields, kinds = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **fields)).eval()
    ids = torch.randint(0, 40, (2, 9))
    before, names = model(ids).logits, set(dict(model.named_parameters()))
    found = attach(model, method)
    assert len(found) == 2 * kinds and len({s.kind for s in found}) == kinds
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)
    assert names <= set(dict(model.named_parameters())), "the base keeps its names"
    for parameter in trainable(model).values():
        nn.init.normal_(parameter, std=0.1)
    adapted = model(ids).logits
    assert (adapted - before).abs().max() > 1e-3
    adapted.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable(model).values())
    # Folding dW into a fresh copy of the base gives the same function.
    deltas = {path: (a.site, a.delta().detach()) for path, a in adapters(model).items()}
    torch.manual_seed(0)
    merged = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **fields)).eval()
    for site, delta in deltas.values():
        weight = merged.get_parameter(site.weight)
        weight.data += delta.T if site.transposed else delta
    torch.testing.assert_close(merged(ids).logits, adapted, rtol=1e-4, atol=1e-5)


def tiny() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS))


def test_targets() -> None:
    model = tiny()
    assert {s.kind for s in find_sites(model, ["q_proj", "mlp.up_proj"])} == {
        "self_attn.q_proj",
        "mlp.up_proj",
    }
    assert {s.layer for s in find_sites(model, r".*\.1\..*_proj")} == {1}
    assert {s.kind for s in find_sites(model, "all-linear", ["down_proj"])} == {
        s.kind for s in find_sites(model) if s.kind != "mlp.down_proj"
    }
    assert "lm_head" not in {s.path for s in find_sites(model)}


@pytest.mark.parametrize(
    ("targets", "exclude", "words"),
    [
        (["q_porj"], None, ["'q_porj'", "did you mean 'q_proj'", "mlp.up_proj"]),
        (r"encoder\..*", None, ["matches no linear", "self_attn.q_proj"]),
        ("[", None, ["not a regular expression"]),
        ("all-linear", ["lm_head"], ["adapter.exclude", "'lm_head'"]),
        (["q_proj"], ["q_proj"], ["leaves nothing"]),
    ],
)
def test_a_target_that_matches_nothing_is_an_error(
    targets: str | list[str], exclude: list[str] | None, words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        find_sites(tiny(), targets, exclude)
    assert all(word in str(error.value) for word in words)


def test_factor_adapters_only_say_what_their_factors_are() -> None:
    """An adapter is abstract or final: none of what is derived from the factors is written a second time."""
    derived = {"forward", "delta", "effective_rank"}
    found = [cls for cls in FactorAdapter.__subclasses__() if cls.__module__.startswith("rasa_train")]
    assert found
    for cls in found:
        assert not derived & set(vars(cls)), cls
