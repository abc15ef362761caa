"""Adapters of q, k and v inside a fused linear, by values: against loralib's formula, PEFT, the model's attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

import rasa_train
from rasa_train.adapters.contract import Method
from rasa_train.adapters.fused_parts import FactorParts
from rasa_train.adapters.inject import adapt
from rasa_train.adapters.registry import METHODS
from rasa_train.adapters.saved import load_tensors, read_adapter, write_adapter
from rasa_train.adapters.shared_input import pack, packed
from rasa_train.adapters.sites import find_sites
from rasa_train.adapters.state import adapters, effective_ranks, groups, saved_tensors, trainable
from rasa_train.errors import UserError
from rasa_train.merging.lora import export_lora
from rasa_train.merging.merged import merge
from rasa_train.merging.peft_format import export_peft
from rasa_train.methods.bitfit import BitFit
from rasa_train.methods.lora import LoRA
from rasa_train.methods.rasa import RaSA

from ..tiny_models import tiny_model
from .test_contract import FIELDS

IDS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
FUSED = {"gpt2": "c_attn", "phi3": "qkv_proj", "gpt_neox": "query_key_value", "modernbert": "Wqkv"}
D, HEADS = 32, 4


def base(kind: str) -> PreTrainedModel:
    if kind != "modernbert":
        return tiny_model(kind).eval()
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    config = AutoConfig.for_model(kind, vocab_size=61, pad_token_id=0, **sizes)
    return AutoModelForMaskedLM.from_config(config).eval()


def outputs(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def moved(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in trainable(model).values():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def method(name: str, kind: str, names: str = "qv") -> Method:
    targets = [f"{FUSED[kind]}.{part}" for part in names]
    return METHODS[name].model_validate({"method": name, **FIELDS[name], "targets": targets})


@pytest.mark.parametrize("part", "qkv")
@pytest.mark.parametrize("kind", FUSED)
def test_a_part_reaches_what_attention_calls_so(kind: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle is transformers: what its attention gets as queries, keys and values of the first layer."""
    seen: list[list[Tensor]] = []

    def recorded(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append([query, key, value])
        module.num_key_value_groups = query.shape[1] // key.shape[1]
        return eager_attention_forward(module, query, key, value, args[0], scaling=module.head_dim**-0.5)

    # Setting an item of the registry itself would leave a copy there that hides what is registered later.
    for name in list(ALL_ATTENTION_FUNCTIONS._global_mapping):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, recorded)
    model = base(kind)
    for module in model.modules():
        if "Attention" in type(module).__name__:
            module.head_dim = D // HEADS
    outputs(model)
    before, adapted = seen[0], moved(adapt(model, method("lora", kind, part))[0])
    seen.clear()
    outputs(adapted)
    changed = [not torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(before, seen[0], strict=True)]
    assert changed == [part == name for name in "qkv"]


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("name", ["lora", "rasa"])
def test_two_pairs_and_k_untouched(name: str, kind: str) -> None:
    """y = W x + b, and q and v get d B A x of their own, whichever way it is computed."""
    chosen = method(name, kind)
    model = moved(adapt(base(kind), chosen)[0])
    found = adapters(model)
    assert len(found) == 2 * 2 and all(path.endswith((".q", ".v")) for path in found)
    tensors = {n: p.detach() for n, p in trainable(model).items()}
    oracle = base(kind)
    plain = dict(oracle.named_parameters())
    for path, adapter in found.items():
        linear, _, part = path.rpartition(".")
        B, A = tensors[f"{path}.B"], tensors[f"{path}.A"]
        if name == "lora":
            dW = 8 / 4 * B @ A
        else:
            pool = f"pools.{adapter.site.kind.replace('.', '__')}"
            B, A = torch.cat([B, tensors[f"{pool}.B_S"]], 1), torch.cat([A, tensors[f"{pool}.A_S"]])
            dW = B @ tensors[f"{path}.d"].diag() @ A
        W = plain[f"{linear}.weight"].data
        W = W.T if kind == "gpt2" else W
        if kind == "gpt_neox":
            W.view(HEADS, 3, D // HEADS, D)[:, "qkv".index(part)] += dW.view(HEADS, D // HEADS, D)
        else:
            start = {"q": 0, "v": len(W) - len(dW)}[part]
            W[start : start + len(dW)] += dW
    wanted = outputs(oracle)
    assert_close(outputs(model), wanted, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(wanted)
    (outputs(model) * weights).sum().backward()
    slow = {n: p.grad.clone() for n, p in trainable(model).items()}  # type: ignore[union-attr]
    model.zero_grad()
    with packed(groups(model)):
        fused = [group for group in groups(model) if isinstance(group.members[0].adapter, FactorParts)]
        assert len(fused) == 2 and all(group.packed is not None for group in fused), "the fast path"
        got = outputs(model)
        (got * weights).sum().backward()
    assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    for n, p in trainable(model).items():
        assert p.grad is not None and p.grad.any(), n
        assert_close(p.grad, slow[n], rtol=1e-3, atol=1e-4, msg=n)


def test_layers_are_packed_at_once() -> None:
    model, _ = adapt(base("gpt2"), method("rasa", "gpt2"))
    assert len(pack(groups(model))) == 1
    crossed, _ = adapt(base("gpt2"), LoRA(targets=r"transformer\.h\.(0\.attn\.c_attn\.q|1\.attn\.c_attn\.v)"))
    moved(crossed)
    wanted = outputs(crossed)
    with packed(groups(crossed)):
        assert_close(outputs(crossed), wanted, rtol=1e-4, atol=1e-5)
    assert len(pack(groups(crossed))) == 2, "equal shapes at other rows are not alike"


NAMES = sorted(METHODS.keys() - {"full", "bitfit", "peft", "bottleneck"})


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
@pytest.mark.parametrize("name", NAMES)
def test_every_method_is_saved_merged_and_loaded(name: str, kind: str, tmp_path: Path) -> None:
    base(kind).save_pretrained(tmp_path / "base")
    chosen = method(name, kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    rasa_train.adapt(model, chosen)
    moved(model)
    wanted = outputs(model).detach()
    rasa_train.save_adapter(model, tmp_path / "adapter")
    saved = read_adapter(tmp_path / "adapter")
    assert saved.method == chosen
    again, _ = adapt(base(kind), saved.method)
    load_tensors(again, saved.tensors, origin="test")
    assert_close(outputs(again), wanted, rtol=1e-4, atol=1e-5)
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_close(outputs(merged), wanted, rtol=1e-3, atol=1e-4)
    for path in {path.rpartition(".")[0] for path in adapters(model)}:
        before, after = (m.get_parameter(f"{path}.weight").data for m in (base(kind), merged))
        dW = (after - before).T if kind == "gpt2" else (after - before)
        k = dW[D : 2 * D] if kind == "gpt2" else dW.view(HEADS, 3, D // HEADS, D)[:, 1]
        assert not k.any() and dW.any()
    rasa_train.merge(model)
    assert_close(outputs(model), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "phi3"])
@pytest.mark.parametrize("name", ["lora", "rasa"])
def test_exported_as_a_lora_of_the_whole_linear(name: str, kind: str, tmp_path: Path) -> None:
    base(kind).save_pretrained(tmp_path / "base")
    chosen = method(name, kind)
    model = moved(adapt(base(kind), chosen)[0])
    (tmp_path / "adapter").mkdir()
    write_adapter(
        tmp_path / "adapter", chosen, saved_tensors(model), base_model=str(tmp_path / "base"), base_revision=None
    )
    report = export_lora(tmp_path / "adapter", tmp_path / "lora")
    assert report.rank == 2 * {"lora": 4, "rasa": 3 + 2}[name] and report.tensors == 2 * 2
    theirs = peft.PeftModel.from_pretrained(base(kind), tmp_path / "lora").eval()
    assert_close(outputs(theirs), outputs(model), rtol=1e-4, atol=1e-5)
    merge(tmp_path / "lora", tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert_close(outputs(again), outputs(model), rtol=1e-3, atol=1e-4)
    if name == "lora":
        with pytest.raises(UserError, match=r"held in a fused weight.*use --format lora"):
            export_peft(tmp_path / "adapter", tmp_path / "peft")


def test_pools_and_ranks_of_parts() -> None:
    model, _ = adapt(base("gpt2"), RaSA(r=4, k=1, targets=["c_attn.q", "c_attn.v", "c_attn.k"]))
    assert set(dict(model.pools.named_children())) == {f"attn__c_attn__{part}" for part in "qkv"}
    assert effective_ranks(model) == {f"attn.c_attn.{part}": 3 + 2 for part in "qkv"}
    assert sum(p.numel() for p in trainable(model).values()) == 3 * (2 * 3 * 64 + 2 * 64 + 2 * (3 + 2))


ENCODERS = ("bert", "roberta", "electra", "deberta-v2", "distilbert", "modernbert")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3", "gpt_neox", "opt", "phi", *ENCODERS])
def test_one_name_in_every_family(kind: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48} if kind == "distilbert" else {}
    make = AutoModel if kind in ENCODERS else AutoModelForCausalLM
    with torch.device("meta"):
        own = {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4}, "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}}
        model = make.from_config(AutoConfig.for_model(kind, **{**sizes, **own.get(kind, {})}))
    by_name = {name: [s.path for s in find_sites(model, [name])] for name in ("wq", "wk", "wv", "wo")}
    assert all(len(paths) == 2 for paths in by_name.values()), by_name
    assert len({path for paths in by_name.values() for path in paths}) == 8
    for name, letter in (("wq", "q"), ("wk", "k"), ("wv", "v")):
        ends = {path.rpartition(".")[2] for path in by_name[name]}
        assert all(end.startswith(letter) for end in ends), ends
    assert all("mlp" not in path and "fc" not in path for path in by_name["wo"])
    assert [s.kind for s in find_sites(model, ["wq", "wv"])] == [s.kind for s in find_sites(model, ["wv", "wq"])]


def test_phi3s_gate_and_up() -> None:
    sites = find_sites(base("phi3"), ["gate_up_proj.up"])
    assert [(s.rows, s.shape) for s in sites] == [((48, 96), (48, 32))] * 2


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["c_attn", "c_attn.q"], r"selects transformer\.h\.0\.attn\.c_attn as a whole and its part .*c_attn\.q"),
        (["c_attn.x"], r"'c_attn\.x' matches no linear.*attn\.c_attn\.q, attn\.c_attn\.v|did you mean"),
        (["c_proj.q"], r"'c_proj\.q' matches no linear"),
    ],
)
def test_wrong_parts_are_named(targets: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_sites(base("gpt2"), targets)


def test_a_bias_is_not_added_to_a_part() -> None:
    with pytest.raises(UserError, match=r"qkv_proj\.q is held in a fused weight, to which bitfit cannot add a bias"):
        adapt(base("phi3"), BitFit(targets=["qkv_proj.q"]))
