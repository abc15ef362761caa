"""Bottleneck adapters against layers written here by hand, with the same tensors: logits, gradients, counts, files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

import rasa_train
from rasa_train.adapters.inject import adapt
from rasa_train.adapters.saved import read_adapter, write_adapter
from rasa_train.adapters.state import adapters, saved_tensors, trainable
from rasa_train.errors import UserError
from rasa_train.evaluate.load import put_in
from rasa_train.merging.lora import export_lora
from rasa_train.merging.merged import merge
from rasa_train.methods.bottleneck import Bottleneck
from rasa_train.models.classifier import head_parameters

from ..tiny_models import tiny_model

D, M, LAYERS = 32, 5, 3
IDS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
ENCODERS = ("bert", "roberta", "electra", "deberta-v2")
DECODERS = ("gpt2", "llama", "gpt_neox", "mixtral", "opt")
OTHER_ENCODERS = ("distilbert", "modernbert")
KINDS = ("houlsby", "pfeiffer", "lin", "dropped")


def base(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    sizes |= {
        "gpt2": {"n_embd": D, "n_layer": LAYERS, "n_head": 4},
        "distilbert": {"dim": D, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 48},
        "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "conv_kernel_size": 3},
        "electra": {"embedding_size": D},
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": D},
        "mixtral": {"num_key_value_heads": 4, "num_local_experts": 2},
    }.get(kind, {})
    make = AutoModelForCausalLM if kind in DECODERS else AutoModel
    model: PreTrainedModel = make.from_config(AutoConfig.for_model(kind, **sizes), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def outputs(model: nn.Module) -> Tensor:
    result = model(input_ids=IDS)
    return result.logits if "logits" in result else result.last_hidden_state


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    return next(list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS)


def by_hand(model: PreTrainedModel, method: Bottleneck, tensors: dict[str, Tensor]) -> None:
    """Compute the formulas with the tensors that the adapter file holds, in hooks of the layers' own modules."""
    for index in method._numbers(LAYERS):
        layer = layers_of(model)[index]
        prefix = next(n for n, m in model.named_modules() if m is layer)

        def network(place: str, prefix: str = prefix) -> Callable[[Tensor], Tensor]:
            path = f"{prefix}.{place}".rstrip(".")
            activation = F.silu if method.kind == "houlsby" else F.relu

            def compute(x: Tensor) -> Tensor:
                if method.kind == "lin":
                    x = F.layer_norm(x, (D,), tensors[f"{path}.norm.weight"], tensors[f"{path}.norm.bias"], 1e-5)
                inner = activation(x @ tensors[f"{path}.down.weight"].T + tensors[f"{path}.down.bias"])
                return inner @ tensors[f"{path}.up.weight"].T + tensors[f"{path}.up.bias"]

            return compute

        def plus(place: str, layer: nn.Module = layer, network: Any = network) -> None:
            A = network(place)

            def hook(module: Any, args: Any, output: Any) -> Any:
                many = isinstance(output, tuple)
                h = output[0] if many else output
                return (h + A(h), *output[1:]) if many else h + A(h)

            layer.get_submodule(place).register_forward_hook(hook)

        kind = model.config.model_type
        encoder = kind in ENCODERS
        names = {"gpt2": ("attn", "mlp"), "modernbert": ("attn", "mlp"), "distilbert": ("attention", "ffn")}
        names |= {"gpt_neox": ("attention", "mlp"), "opt": ("self_attn", "fc2")}
        attention, ffn = names.get(kind, ("self_attn", "mlp"))
        if method.kind == "lin":
            plus("")
        elif method.kind == "houlsby":
            plus("attention.output.dense" if encoder else attention)  # dropout does nothing here
            plus("output.dense" if encoder else ffn)
        elif encoder or kind == "distilbert":  # BertOutput and its relatives: LN(h + x) comes next
            norm = "output.LayerNorm" if encoder else "output_layer_norm"
            A, LN = network(norm), layer.get_submodule(norm)

            def twice(module: Any, args: Any, A: Any = A, LN: Any = LN) -> Any:
                (s,) = args  # h + x
                return (s + A(F.layer_norm(s, (D,), LN.weight, LN.bias, LN.eps)),)

            LN.register_forward_pre_hook(twice)
        else:
            plus(ffn)


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names by place: BERT's networks are the dropouts', which ``by_hand`` puts on the linears before them."""
    return {name.replace("output.dropout.", "output.dense."): t for name, t in tensors.items()}


@pytest.mark.parametrize("placed", KINDS)
@pytest.mark.parametrize("kind", [*ENCODERS, *OTHER_ENCODERS, *DECODERS])
def test_layers_by_hand(kind: str, placed: Any) -> None:
    method = Bottleneck(kind=placed, size=M, layers=[1, -1] if placed == "dropped" else None)
    model, _ = adapt(base(kind), method)
    before = outputs(base(kind))
    assert torch.equal(outputs(model), before), "the model starts as the base"
    parameters = trainable(model)
    number = {"houlsby": 2 * LAYERS, "pfeiffer": LAYERS, "lin": LAYERS, "dropped": 2}[placed]
    own = 2 * D if placed == "lin" else 0
    assert sum(p.numel() for p in parameters.values()) == number * (2 * D * M + M + D + own)
    assert all(p.dtype == torch.float32 for p in parameters.values()) and not adapters(model)
    torch.manual_seed(1)
    for parameter in parameters.values():
        parameter.data += 0.3 * torch.randn_like(parameter)
    theirs = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    oracle = base(kind)
    by_hand(oracle, method, renamed(theirs))
    got, wanted = outputs(model), outputs(oracle)
    assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - before).abs().max() > 1e-2
    weights = torch.randn_like(got)
    (got * weights).sum().backward()
    (wanted * weights).sum().backward()
    for name, parameter in parameters.items():
        assert parameter.grad is not None and theirs[name].grad is not None and parameter.grad.any(), name
        assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-4, msg=name)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("placed", KINDS)
def test_saved_evaluated_and_not_merged(placed: Any, tmp_path: Path) -> None:
    base("gpt2").save_pretrained(tmp_path / "base")
    method = Bottleneck(kind=placed, size=M, layers=[0, 2] if placed == "dropped" else None)
    model, _ = adapt(base("gpt2"), method)
    for parameter in trainable(model).values():
        parameter.data += 0.3 * torch.randn_like(parameter)
    directory, wanted = tmp_path / "adapter", outputs(model)
    directory.mkdir()
    write_adapter(directory, method, saved_tensors(model), base_model=str(tmp_path / "base"), base_revision=None)
    saved = read_adapter(directory)
    assert saved.method == method and saved.tensors.keys() == trainable(model).keys()
    assert torch.equal(outputs(put_in(base("gpt2"), saved)), wanted)
    for write in (merge, export_lora):
        with pytest.raises(UserError, match=r"cannot be merged.*rasa-eval evaluates it inside the base"):
            write(directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["roberta", "deberta-v2", "llama"])
def test_a_classifier_trains_its_head_too(kind: str, tmp_path: Path) -> None:
    def classifier() -> PreTrainedModel:
        return tiny_model(kind, labels=3).eval()

    method = Bottleneck(kind="pfeiffer", size=M)
    model, _ = adapt(classifier(), method)
    head = head_parameters(model)
    networks = {name for name in trainable(model) if name not in head}
    assert head and networks and all(".down." in name or ".up." in name for name in networks)
    for parameter in trainable(model).values():
        parameter.data += 0.3 * torch.randn_like(parameter)
    write_adapter(tmp_path, method, saved_tensors(model), base_model="b", base_revision=None)
    saved = read_adapter(tmp_path)
    assert saved.tensors.keys() == networks | head.keys()
    assert torch.equal(outputs(put_in(classifier(), saved)), outputs(model))
    assert not torch.allclose(outputs(classifier()), outputs(model))


def test_from_python(tmp_path: Path) -> None:
    base("bert").save_pretrained(tmp_path / "base")
    model = rasa_train.adapt(AutoModel.from_pretrained(tmp_path / "base").eval(), Bottleneck(kind="pfeiffer", size=M))
    for parameter in trainable(model).values():
        parameter.data += 0.3
    wanted = outputs(model)
    rasa_train.save_adapter(model, tmp_path / "adapter")
    again = rasa_train.load_adapter(AutoModel.from_pretrained(tmp_path / "base").eval(), tmp_path / "adapter")
    assert torch.equal(outputs(again), wanted)
    with pytest.raises(UserError, match="'bottleneck' cannot be merged"):
        rasa_train.merge(model)
    plain = AutoModel.from_pretrained(tmp_path / "base").eval()
    before, names = outputs(plain), list(plain.state_dict())
    with pytest.raises(UserError, match="does not fit"):  # and leaves the model as it was
        damaged = read_adapter(tmp_path / "adapter")
        damaged.tensors.popitem()
        rasa_train.api._adapt(plain, damaged.method, damaged)
    assert torch.equal(outputs(plain), before) and list(plain.state_dict()) == names


@pytest.mark.parametrize("compute", ["model", "float32"])
@pytest.mark.parametrize("placed", KINDS)
def test_bfloat16(placed: Any, compute: Any) -> None:
    method = Bottleneck(kind=placed, size=M, compute=compute, layers=[-1], activation="gelu", dropout=0.1)
    model, _ = adapt(base("bert").bfloat16(), method)
    assert outputs(model).dtype == torch.bfloat16
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    model.train()
    torch.manual_seed(0)
    first = outputs(model)
    first.float().square().sum().backward()
    assert all(p.grad is not None for p in trainable(model).values())


def test_refused() -> None:
    with pytest.raises(UserError, match=r"adapter.layers must be numbers of the model's 3 layers, from -3 to 2"):
        adapt(base("gpt2"), Bottleneck(kind="dropped"))  # all but the first five: none is left
    with pytest.raises(UserError, match="from -3 to 2, got \\[3\\]"):
        adapt(base("gpt2"), Bottleneck(layers=[3]))
    config = AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=40)
    with pytest.raises(UserError, match=r"does not; use adapter\.kind: lin"):
        adapt(AutoModelForCausalLM.from_config(config), Bottleneck())
