"""VeRA against PEFT: the same random pair, outputs, gradients, update and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rasa_train.adapters.inject import attach
from rasa_train.adapters.saved import load_tensors, read_adapter, write_adapter
from rasa_train.adapters.site import Site
from rasa_train.adapters.state import adapters, saved_tensors, trainable
from rasa_train.errors import UserError
from rasa_train.methods.vera import VeRA


def tiny() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_hidden_layers=2, **sizes)).eval()


def theirs(**fields: Any) -> nn.Module:
    model = peft.get_peft_model(tiny(), peft.VeraConfig(target_modules="all-linear", **fields))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "vera_lambda" in name:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.mark.parametrize("seed", [0, 3])
def test_the_frozen_pair_is_pefts(seed: int) -> None:
    model = theirs(r=6, projection_prng_key=seed).base_model
    ours = tiny()
    state = torch.random.get_rng_state()
    attach(ours, VeRA(r=6, projection_seed=seed))
    assert torch.equal(torch.random.get_rng_state(), state), "it draws nothing from the global generator"
    assert torch.equal(ours.pools["vera"].A, model.vera_A["default"])
    assert torch.equal(ours.pools["vera"].B, model.vera_B["default"])


def test_outputs_gradients_and_delta_are_pefts(tmp_path: Path) -> None:
    reference = theirs(r=6, projection_prng_key=0)
    reference.save_pretrained(tmp_path)
    saved = read_adapter(tmp_path)
    assert saved.method.method == "vera" and saved.method.r == 6
    ours = tiny()
    attach(ours, saved.method.model_copy(update={"targets": "all-linear"}))
    load_tensors(ours, saved.tensors, origin="peft")
    ids = torch.randint(0, 40, (2, 9))
    torch.testing.assert_close(ours(ids).logits, reference(ids).logits)
    for model in (ours, reference):
        model(ids).logits.square().sum().backward()
    gradients = {
        name.removeprefix("base_model.model.").replace("vera_lambda_", "").removesuffix(".default"): p.grad
        for name, p in reference.named_parameters()
        if p.requires_grad
    }
    assert gradients.keys() == trainable(ours).keys() and len(gradients) == 2 * 7 * 2
    for name, parameter in trainable(ours).items():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-4)
    for path, adapter in adapters(ours).items():
        layer = reference.base_model.model.get_submodule(path)
        torch.testing.assert_close(adapter.delta(), layer.get_delta_weight("default"))


@pytest.mark.parametrize("kept", [True, False])
def test_the_pair_is_saved_or_drawn_again(kept: bool, tmp_path: Path) -> None:
    method, model = VeRA(r=6, projection_seed=2, save_projection=kept), tiny()
    attach(model, method)
    for parameter in trainable(model).values():
        nn.init.normal_(parameter)
    write_adapter(tmp_path, method, saved_tensors(model), base_model="tiny", base_revision=None)
    saved, again = read_adapter(tmp_path), tiny()
    assert ({"pools.vera.A", "pools.vera.B"} <= saved.tensors.keys()) is kept
    attach(again, saved.method)
    load_tensors(again, saved.tensors, origin="ours")
    ids = torch.randint(0, 40, (2, 9))
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_pefts_file_without_the_pair(tmp_path: Path) -> None:
    reference = theirs(r=6, projection_prng_key=5, save_projection=False)
    reference.save_pretrained(tmp_path)
    saved, ours = read_adapter(tmp_path), tiny()
    attach(ours, saved.method)
    load_tensors(ours, saved.tensors, origin="peft")
    ids = torch.randint(0, 40, (2, 9))
    torch.testing.assert_close(ours(ids).logits, reference(ids).logits)


def test_a_pair_of_another_size_is_refused() -> None:
    model = tiny()
    attach(model, VeRA(r=6))
    tensors = {name: t.clone() for name, t in saved_tensors(model).items()}
    tensors["pools.vera.A"] = torch.zeros(6, 64)
    with pytest.raises(UserError, match=r"pools\.vera\.A has shape \(6, 64\)"):
        load_tensors(model, tensors, origin="here")


def test_start() -> None:
    site = Site("layers.0.up", "up", 0, 12, 10, "layers.0.up.weight")
    adapter = VeRA(r=4, d_initial=0.3).build([site]).adapters[site.path]
    assert adapter.d.tolist() == pytest.approx([0.3] * 4) and not adapter.delta().any()
    assert adapter.effective_rank == 4
