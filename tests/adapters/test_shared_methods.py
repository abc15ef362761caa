"""Tied-LoRA, ShareLoRA, NOLA and VB-LoRA against algebra and PEFT; VeRA and MoRA in what is common to all."""

from __future__ import annotations

import math
from pathlib import Path

import peft
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rasa_train.adapters.contract import Built, Method
from rasa_train.adapters.inject import attach
from rasa_train.adapters.registry import METHODS
from rasa_train.adapters.saved import load_tensors, read_adapter, write_adapter
from rasa_train.adapters.site import Site
from rasa_train.adapters.sites import find_sites
from rasa_train.adapters.state import adapters, saved_tensors, trainable
from rasa_train.errors import UserError
from rasa_train.methods import nola
from rasa_train.methods.mora import MoRA
from rasa_train.methods.nola import NOLA
from rasa_train.methods.sharelora import ShareLoRA
from rasa_train.methods.tied_lora import TiedLoRA
from rasa_train.methods.vblora import VBLoRA
from rasa_train.methods.vera import VeRA

FRESH = {
    "vera": VeRA(r=6),
    "mora": MoRA(r=2),
    "mora-1": MoRA(r=2, type=1),
    "tied-TL6": TiedLoRA(r=4),
    "tied-TL5": TiedLoRA(r=4, variant="TL5"),
    "share-A": ShareLoRA(r=4, alpha=10),
    "share-B": ShareLoRA(r=4, alpha=10, share="B"),
    "share-AB": ShareLoRA(r=4, alpha=10, share="AB"),
    "nola": NOLA(r=4, n_basis=9),
    "vb-lora": VBLoRA(r=3, num_vectors=20, vector_length=2, topk=2),
}
every_method = pytest.mark.parametrize("method", FRESH.values(), ids=FRESH)


def sites(out: int = 12, in_: int = 10, experts: int | None = None) -> list[Site]:
    kinds = {"up": (out, in_), "down": (in_, out)}
    return [
        Site(f"layers.{i}.{kind}", kind, i, *shape, f"layers.{i}.{kind}.weight", num_experts=experts)
        for i in range(3)
        for kind, shape in kinds.items()
    ]


def randomized(built: Built) -> Built:
    torch.manual_seed(1)
    for module in (*built.adapters.values(), *built.pools.values()):
        for parameter in module.parameters():
            nn.init.normal_(parameter)
    return built


# -- counts ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_8b() -> list[Site]:
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        return find_sites(LlamaForCausalLM(config))


def share(name: str) -> ShareLoRA:
    return ShareLoRA.model_validate({"r": 8, "share": name})


COUNTS = [
    (VeRA(r=1024), 1_605_632),
    (MoRA(r=8), 20_961_536),
    (MoRA(r=16), 41_823_104),
    (MoRA(r=32), 83_846_144),
    (MoRA(r=8, type=1), 20_961_536),
    (MoRA(r=16, type=1), 41_927_264),
    (MoRA(r=32, type=1), 83_897_920),
    (TiedLoRA(r=8, variant="TL5"), 655_360),
    (TiedLoRA(r=8, variant="TL6"), 2_033_408),
    (share("A"), 11_321_344),
    (share("B"), 10_305_536),
    (share("AB"), 655_360),
    (NOLA(n_basis=512), 229_376),
    (VBLoRA(r=4, num_vectors=2048, vector_length=256), 83_886_080 + 524_288),
]


@pytest.mark.parametrize(("method", "count"), COUNTS, ids=[f"{m.method}-{n}" for m, n in COUNTS])
def test_parameters_on_llama_8b(method: Method, count: int, llama_8b: list[Site]) -> None:
    assert len(llama_8b) == 224
    with torch.device("meta"):
        built = method.build(llama_8b)
    modules = (*built.adapters.values(), *built.pools.values())
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    assert all(t.is_meta for t in tensors)
    assert sum(t.numel() for t in tensors if t.requires_grad) == count
    ranks = {adapter.site.kind: adapter.effective_rank for adapter in built.adapters.values()}
    assert len(ranks) == 7 and all(rank > 0 for rank in ranks.values())
    if isinstance(method, VeRA):
        assert sum(t.numel() for t in built.pools["vera"].buffers()) == 29_360_128


# -- the formulas ------------------------------------------------------------------------------------------


def check(built: Built, expected: dict[str, Tensor]) -> None:
    """delta and forward of every site against a dense dW."""
    assert built.adapters.keys() == expected.keys()
    for path, adapter in built.adapters.items():
        dW = expected[path]
        torch.testing.assert_close(adapter.delta(), dW, rtol=1e-5, atol=1e-5)
        x = torch.randn(2, 3, adapter.site.in_features)
        torch.testing.assert_close(adapter(x, torch.empty(0)), x @ dW.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["TL5", "TL6"])
def test_tied_lora(variant: str) -> None:
    built = randomized(TiedLoRA.model_validate({"r": 3, "variant": variant}).build(sites()))
    assert sorted(built.pools) == ["down", "up"]
    expected = {}
    for path, adapter in built.adapters.items():
        pool = built.pools[adapter.site.kind]
        own = dict(adapter.named_parameters())
        assert own.keys() == ({"u", "v"} if variant == "TL6" else set())
        u, v = own.get("u", torch.ones(3)), own.get("v", torch.ones(adapter.site.out_features))
        expected[path] = torch.diag(v) @ pool.B @ torch.diag(u) @ pool.A
    check(built, expected)


@pytest.mark.parametrize("shared", ["A", "B", "AB"])
def test_sharelora(shared: str) -> None:
    built = randomized(ShareLoRA.model_validate({"r": 3, "alpha": 12, "share": shared}).build(sites()))
    expected = {}
    for path, adapter in built.adapters.items():
        pool = dict(built.pools[adapter.site.kind].named_parameters())
        own = dict(adapter.named_parameters())
        assert pool.keys() == set(shared) and own.keys() == {"A", "B"} - set(shared)
        both = pool | own
        expected[path] = 4.0 * both["B"] @ both["A"]
    check(built, expected)


@pytest.mark.parametrize("shared", ["A", "B", "AB"])
def test_sharelora_is_lora_with_one_parameter_in_many_places(shared: str) -> None:
    """PEFT's LoRA with one layer's parameter object put into the others: outputs and summed gradients."""
    torch.manual_seed(0)
    built = randomized(ShareLoRA.model_validate({"r": 3, "alpha": 12, "share": shared}).build(sites()[::2]))
    pool = built.pools["up"]
    base = nn.Sequential(*(nn.Linear(10, 12, bias=False) for _ in range(3)))
    config = peft.LoraConfig(r=3, lora_alpha=12, target_modules=["0", "1", "2"])
    layers = list(peft.get_peft_model(base, config).base_model.model)
    for layer, adapter in zip(layers, built.adapters.values(), strict=True):
        for side, places in (("A", layer.lora_A), ("B", layer.lora_B)):
            if side in shared:
                first = getattr(layers[0], f"lora_{side}")["default"]
                first.weight.data.copy_(getattr(pool, side))
                places["default"].weight = first.weight
            else:
                places["default"].weight.data.copy_(getattr(adapter, side))
    x = torch.randn(5, 10)
    theirs = [layer(x) - layer.base_layer(x) for layer in layers]
    ours = [adapter(x, torch.empty(0)) for adapter in built.adapters.values()]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for outputs in (ours, theirs):
        torch.stack([out.square().sum() for out in outputs]).sum().backward()
    for name, parameter in pool.named_parameters():
        expected = getattr(layers[1], f"lora_{name}")["default"].weight.grad
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-2)


def basis_of(adapter: nn.Module, name: str) -> Tensor:
    """The random matrices of a factor, read off the factor: coefficient j alone set to 1."""
    coefficients = {"A": adapter.c, "B": adapter.e}[name]
    offset = adapter.A_0 if name == "A" else torch.zeros(adapter.B_shape)
    found = []
    for j in range(coefficients.shape[-1]):
        with torch.no_grad():
            coefficients.zero_()[j] = 1.0
            found.append(getattr(adapter.factors(), name) - offset)
    return torch.stack(found)


def test_nola(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nola, "PIECE", 100)  # several pieces, the last one smaller
    built = NOLA(r=3, alpha=6, n_basis=8).build(sites())
    expected = {}
    for path, adapter in built.adapters.items():
        A_j, B_j = basis_of(adapter, "A"), basis_of(adapter, "B")
        for basis in (A_j, B_j):
            assert basis.abs().max() <= 1 / math.sqrt(8) + 1e-6
            assert basis.std().item() == pytest.approx(1 / math.sqrt(3 * 8), rel=0.15)
        assert adapter.A_0.abs().max() <= 1 / math.sqrt(adapter.site.in_features)
        c, e = torch.randn(8), torch.randn(8)
        adapter.c.data.copy_(c)
        adapter.e.data.copy_(e)
        # dense algebra, with gradients
        c.requires_grad_()
        e.requires_grad_()
        A = adapter.A_0 + torch.einsum("j,jri->ri", c, A_j)
        dW = 2.0 * torch.einsum("j,jor->or", e, B_j) @ A
        expected[path] = dW.detach()
        weights = torch.randn_like(dW)
        wanted = torch.autograd.grad((dW * weights).sum(), (c, e))
        got = torch.autograd.grad((adapter.delta() * weights).sum(), (adapter.c, adapter.e))
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    check(built, expected)
    bases = [basis_of(a, side).flatten()[:50] for a in built.adapters.values() for side in "AB"]
    assert torch.corrcoef(torch.stack(bases)).fill_diagonal_(0).abs().max() < 0.6, "every factor has its own"


def test_nola_bases_come_from_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def deltas(**fields: int) -> Tensor:
        built = randomized(NOLA(r=3, n_basis=8, **fields).build(sites()))
        return torch.cat([a.delta().flatten() for a in built.adapters.values()]).detach()

    state = torch.random.get_rng_state()
    adapter = NOLA(r=3, n_basis=8).build(sites()).adapters["layers.0.up"]
    adapter.delta().sum().backward()
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"
    assert adapter.e.grad.abs().sum() > 0 and not adapter.c.grad.any(), "the first step moves e only"
    assert list(adapter.state_dict()) == ["c", "e"]
    once = deltas()
    monkeypatch.setattr(nola, "PIECE", 64)
    torch.testing.assert_close(deltas(), once)
    assert not torch.allclose(deltas(basis_seed=1), once)


def test_vb_lora_is_pefts(tmp_path: Path) -> None:
    fields = {"r": 3, "num_vectors": 20, "vector_length": 4, "topk": 2}
    base = tiny()
    reference = peft.get_peft_model(tiny(), peft.VBLoRAConfig(target_modules="all-linear", **fields)).eval()
    reference.save_pretrained(tmp_path)
    saved = read_adapter(tmp_path)
    assert saved.method.model_dump(include=set(fields)) == fields
    attach(base, saved.method.model_copy(update={"targets": "all-linear"}))
    load_tensors(base, saved.tensors, origin="peft")
    ids = torch.randint(0, 40, (2, 9))
    torch.testing.assert_close(base(ids).logits, reference(ids).logits)
    for model in (base, reference):
        model(ids).logits.square().sum().backward()
    names = {
        name.removeprefix("base_model.model.").replace("vblora_", "").removesuffix(".default"): p
        for name, p in reference.named_parameters()
        if p.requires_grad
    }
    names["pools.vb_lora.bank"] = names.pop(next(name for name in names if "vector_bank" in name))
    assert names.keys() == trainable(base).keys() and len(names) == 2 * 7 * 2 + 1
    for name, parameter in trainable(base).items():
        torch.testing.assert_close(parameter.grad, names[name].grad, rtol=1e-4, atol=1e-4)
    for path, adapter in adapters(base).items():
        layer = reference.base_model.model.get_submodule(path)
        torch.testing.assert_close(adapter.delta(), layer.get_delta_weight("default"))


def test_vb_lora_start() -> None:
    built = VBLoRA(r=4, num_vectors=64, vector_length=2).build(sites(out=64, in_=64))
    bank = built.pools["vb_lora"].bank
    assert bank.abs().max() <= 0.02 and bank.std().item() == pytest.approx(0.04 / math.sqrt(12), rel=0.2)
    adapter = built.adapters["layers.1.up"]
    assert adapter.logits_A.shape == (4, 32, 64) and adapter.logits_B.shape == (32, 4, 64)
    assert adapter.logits_A.std().item() == pytest.approx(0.1, rel=0.05)
    assert adapter.delta().any(), "it does not start at the base model"


def test_vb_lora_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vector_length must divide.*got 4, but layers\.0\.up is 12 x 10") as error:
        VBLoRA(vector_length=4).build(sites())
    assert error.value.key == "adapter.vector_length"
    with pytest.raises(ValidationError, match=r"must be in \[1, num_vectors=8\], got 9"):
        VBLoRA(num_vectors=8, topk=9)
    with pytest.raises(UserError, match="save_only_topk_weights"):
        VBLoRA.from_peft({"peft_type": "VBLORA", "save_only_topk_weights": True})


# -- what all of them have in common -----------------------------------------------------------------------


def tiny(architecture: str = "llama") -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    fields = {
        "llama": {"num_hidden_layers": 2, **sizes},
        "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64},
    }[architecture]
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, vocab_size=40, **fields)
    return AutoModelForCausalLM.from_config(config).eval()


@every_method
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_in_a_model(method: Method, architecture: str, tmp_path: Path) -> None:
    model, ids = tiny(architecture), torch.randint(0, 40, (2, 9))
    before = model(ids).logits
    found = attach(model, method)
    starts_at_zero = not isinstance(method, VBLoRA)
    assert torch.equal(model(ids).logits, before) is starts_at_zero
    for parameter in trainable(model).values():
        nn.init.normal_(parameter, std=0.2)
    adapted = model(ids).logits
    assert (adapted - before).abs().max() > 1e-3
    adapted.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable(model).values())
    # Saved and read again, it is the same function; every trained tensor is in the file once.
    write_adapter(tmp_path, method, saved_tensors(model), base_model="tiny", base_revision=None)
    saved, again = read_adapter(tmp_path), tiny(architecture)
    assert saved.method == method
    attach(again, saved.method)
    load_tensors(again, saved.tensors, origin="here")
    assert torch.equal(again(ids).logits, adapted)
    # Folding dW into a fresh copy of the base gives the same function.
    merged, deltas = tiny(architecture), adapters(model)
    for site in found:
        delta = deltas[site.path].delta().detach()
        merged.get_parameter(site.weight).data += delta.T if site.transposed else delta
    torch.testing.assert_close(merged(ids).logits, adapted, rtol=1e-4, atol=1e-4)


@every_method
def test_experts(method: Method) -> None:
    built = randomized(method.build(sites(experts=3)))
    for adapter in built.adapters.values():
        delta = adapter.delta()
        assert delta.shape == (3, *adapter.site.shape)
        assert not torch.allclose(delta[0], delta[1])
        x, counts = torch.randn(5, adapter.site.in_features), [2, 0, 3]
        wanted = torch.cat([rows @ dW.T for rows, dW in zip(x.split(counts), delta, strict=True)])
        torch.testing.assert_close(adapter(x, torch.empty(0), counts), wanted, rtol=1e-4, atol=1e-4)


@every_method
def test_the_rank_of_the_update(method: Method) -> None:
    built = randomized(method.build(sites(out=48, in_=40)))
    adapter = built.adapters["layers.1.up"]
    assert torch.linalg.matrix_rank(adapter.delta(), rtol=1e-5) == adapter.effective_rank


@every_method
def test_pools_are_not_part_of_an_adapter(method: Method) -> None:
    built = method.build(sites())
    held = {id(p) for pool in built.pools.values() for p in pool.parameters()}
    own = {id(p) for adapter in built.adapters.values() for p in adapter.parameters()}
    assert not held & own
    if isinstance(method, TiedLoRA | ShareLoRA | VBLoRA):
        assert held


@every_method
def test_recomputation_and_bfloat16(method: Method) -> None:
    """Activation checkpointing recomputes shared tensors L times; bf16 inputs meet fp32 parameters."""
    gradients = []
    for checkpointed in (False, True):
        model = tiny()
        attach(model, method)
        torch.manual_seed(5)
        for parameter in trainable(model).values():
            nn.init.normal_(parameter, std=0.2)
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(torch.arange(18).view(2, 9)).logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in trainable(model).items()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    adapter = randomized(method.build(sites())).adapters["layers.0.up"]
    x = torch.randn(64, 10, dtype=torch.bfloat16)
    out, exact = adapter(x, torch.empty(0)), x.double() @ adapter.delta().double().T
    assert out.dtype == torch.bfloat16 and (out.double() - exact).norm() / exact.norm() < 0.02
    assert all(p.dtype == torch.float32 for p in adapter.parameters())


def test_every_method_here_is_registered() -> None:
    assert {m.method for m in FRESH.values()} <= METHODS.keys()
    assert all(METHODS[m.method] is type(m) for m in FRESH.values())
