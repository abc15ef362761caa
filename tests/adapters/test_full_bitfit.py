"""Full fine-tuning and BitFit: what is trained, and that the update is what a bias is."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rasa_train.adapters.contract import Method
from rasa_train.adapters.inject import attach
from rasa_train.adapters.registry import METHODS
from rasa_train.adapters.site import Site
from rasa_train.adapters.state import adapters, saved_tensors, trainable
from rasa_train.errors import UserError
from rasa_train.methods.bitfit import BitFit
from rasa_train.methods.full import Full

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def tiny(architecture: str, **fields: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, vocab_size=40, num_hidden_layers=2, **SHAPE, **fields)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(("method", "count"), [(Full(), 8_030_261_248), (BitFit(), 1_376_256)])
def test_counts(method: Method, count: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **LLAMA_8B))
        attach(model, method)
    assert sum(parameter.numel() for parameter in trainable(model).values()) == count


def test_full_trains_every_parameter_by_its_own_name() -> None:
    model = tiny("llama", tie_word_embeddings=True).bfloat16()
    names = [name for name, _ in model.named_parameters()]
    attach(model, Full())
    assert not adapters(model) and list(trainable(model)) == names and set(saved_tensors(model)) == set(names)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight, "tied weights stay tied"


@pytest.mark.parametrize(
    ("fields", "trained"),
    [
        ({"targets": ["q_proj"]}, r"model\.layers\.\d\.self_attn\.q_proj\.weight"),
        ({"targets": ["mlp", "lm_head"], "exclude": ["up_proj"]}, r"lm_head.*|.*\.(gate|down)_proj\.weight"),
        ({"targets": r".*layers\.1\.mlp\..*"}, r"model\.layers\.1\.mlp\..*"),
        ({"exclude": ["embed_tokens", "norm"]}, r"lm_head.*|model\.layers.*"),
        ({"layers": [-1]}, r"model\.layers\.1\..*"),
        ({"layers": [0, 1], "targets": ["input_layernorm"]}, r"model\.layers\.[01]\.input_layernorm\.weight"),
    ],
)
def test_full_trains_what_targets_and_layers_choose(fields: dict[str, Any], trained: str) -> None:
    """The choice is what a regular expression over the names says; the rest keeps its dtype and gets no gradient."""
    model = tiny("llama").bfloat16()
    wanted = {name for name, _ in model.named_parameters() if re.fullmatch(trained, name)}
    attach(model, Full(**fields))
    assert wanted and set(trainable(model)) == set(saved_tensors(model)) == wanted
    assert all(p.dtype == (torch.float32 if n in wanted else torch.bfloat16) for n, p in model.named_parameters())
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randint(0, 40, (2, 9))).logits.float().square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == wanted


def test_a_tied_weight_is_one_parameter_for_full_by_either_name() -> None:
    for name in ("lm_head", "embed_tokens"):
        model = tiny("llama", tie_word_embeddings=True)
        attach(model, Full(targets=[name]))
        assert list(trainable(model)) == ["model.embed_tokens.weight"] and model.lm_head.weight.requires_grad


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"targets": ["q_pro"]}, r"adapter\.targets: 'q_pro' matches no parameter .*q_proj\.weight"),
        ({"targets": "("}, r"adapter\.targets is not a regular expression"),
        ({"targets": "x.*"}, r"adapter\.targets: the pattern 'x\.\*' matches no parameter"),
        ({"exclude": ["biases"]}, r"adapter\.exclude: 'biases' matches no parameter"),
        ({"layers": [2]}, r"adapter\.layers must be numbers of the model's 2 layers, from -2 to 1, got \[2\]"),
        ({"layers": [0], "targets": ["lm_head"]}, r"adapter\.targets: 'lm_head' matches no parameter"),
        ({"targets": ["lm_head"], "exclude": ["lm_head"]}, r"adapter\.exclude leaves nothing"),
    ],
)
def test_what_full_cannot_train_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        attach(tiny("llama"), Full(**fields))


def test_bitfit_trains_the_biases_there_are_and_adds_the_others() -> None:
    model = tiny("qwen2")  # q, k and v have a bias
    ids = torch.randint(0, 40, (2, 9))
    before = model(ids).logits
    own = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    sites = attach(model, BitFit())
    assert len(own) == 6 and len(sites) == 14 and len(adapters(model)) == 8
    assert set(trainable(model)) == own | {f"{path}.added_bias" for path in adapters(model)}
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)
    model(ids).logits.square().sum().backward()
    # (softmax does not see a bias of the keys)
    assert all(p.grad is not None and p.grad.any() for n, p in trainable(model).items() if "k_proj" not in n)


def test_added_bias_is_a_bias_of_the_linear() -> None:
    model, plain = tiny("llama"), tiny("llama", attention_bias=True, mlp_bias=True)
    attach(model, BitFit())
    reference = {name: p for name, p in model.named_parameters() if "added_bias" not in name}
    plain.load_state_dict(reference, strict=False)
    for path, adapter in adapters(model).items():
        nn.init.normal_(adapter.added_bias)
        bias = adapter.delta_bias()
        assert adapter.effective_rank == 0 and bias is not None and not adapter.delta().any()
        assert adapter.delta().shape == adapter.site.shape
        plain.get_submodule(path).bias.data.copy_(bias)
    ids = torch.randint(0, 40, (2, 9))
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    assert adapter(torch.randn(2, 3, 32, dtype=torch.bfloat16), torch.empty(0)).dtype == torch.bfloat16


def test_bitfit_without_added_biases() -> None:
    model = tiny("qwen2")
    attach(model, BitFit(add_bias=False))
    assert not adapters(model) and {name.split(".")[-2] for name in trainable(model)} == {
        "q_proj",
        "k_proj",
        "v_proj",
    }


def test_no_bias_for_fused_experts() -> None:
    experts = Site("layers.0.experts", "experts", 0, 4, 4, "layers.0.experts.up", num_experts=2)
    with pytest.raises(UserError, match=r"adapter\.targets: layers\.0\.experts is held in a fused weight"):
        BitFit().build([experts])
    assert not BitFit(add_bias=False).build([experts]).adapters


def test_methods_are_known_by_name() -> None:
    assert (METHODS["full"], METHODS["bitfit"]) == (Full, BitFit)
