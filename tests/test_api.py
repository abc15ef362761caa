"""The package as a library, used as a researcher would: a model, five lines, and a loop of one's own."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import rasa_train
from rasa_train import DoRA, LoRA, Method, MoRA, RaSA, UserError, VeRA, adapt, load_adapter, merge, save_adapter
from rasa_train.adapters import inject
from rasa_train.adapters.shared_input import packed
from rasa_train.adapters.state import groups, trainable
from tests.conftest import Cli
from tests.doc_pages import ROOT, blocks

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
METHODS = [LoRA(r=4, alpha=8), RaSA(r=4, k=1, alpha=8), VeRA(r=8), MoRA(r=4), DoRA(r=4)]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.method)


@pytest.fixture
def model(tiny_llama: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_llama)
    return loaded


def stir(model: nn.Module) -> None:
    """Give every trained tensor values of a trained adapter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += 0.1 * torch.randn_like(parameter)


def loss_of(model: nn.Module) -> Tensor:
    loss: Tensor = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    return loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}
    model.zero_grad()
    return found


def plain_gradients(model: nn.Module, method: Method) -> dict[str, Tensor]:
    """What the adapters' own forward gives, with the values that ``model`` has."""
    other = copy.deepcopy(merge_free(model))
    inject.attach(other, method)
    with torch.no_grad():
        for name, parameter in trainable(other).items():
            parameter.copy_(trainable(model)[name])
    loss_of(other).backward()
    return gradients(other)


def merge_free(model: nn.Module) -> nn.Module:
    base: nn.Module = model.untouched  # type: ignore[assignment]
    return base


def adapted(model: PreTrainedModel, method: Method) -> nn.Module:
    """``adapt``, and values of a trained adapter. The base is kept beside it for comparisons."""
    untouched = copy.deepcopy(model)
    result = adapt(model, method)
    object.__setattr__(result, "untouched", untouched)
    stir(result)
    return result


class Operations(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, rasa_train; print('torch' in sys.modules, sorted(rasa_train.__all__) == dir(rasa_train))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_every_public_name_is_there_and_has_a_docstring() -> None:
    for name in set(rasa_train.__all__) - {"__version__", "METHODS"}:
        assert getattr(rasa_train, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        rasa_train.nothing  # noqa: B018


@every_method
def test_nothing_changes_at_first_and_only_the_adapter_is_trained(model: PreTrainedModel, method: Method) -> None:
    before = model(IDS).logits
    assert adapt(model, method) is model
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-5, atol=1e-6)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".adapter." in name or name.startswith("pools.") for name in trained)


@every_method
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_plain_path(model: PreTrainedModel, method: Method, checkpointing: bool) -> None:
    ours = adapted(model, method).train()
    expected = plain_gradients(ours, method)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_of(ours).backward()
    found = gradients(ours)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, expected[name], rtol=2e-4, atol=1e-6)


def test_gradients_add_up_over_micro_batches_and_can_be_clipped(model: PreTrainedModel) -> None:
    """Two backward passes and a clip against the same with the plain path; then the step moves what it should."""
    method = RaSA(r=4, k=1, alpha=8)
    ours = adapted(model, method).train()
    expected = {name: 2 * gradient for name, gradient in plain_gradients(ours, method).items()}
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for _ in range(2):
        loss_of(ours).backward()
    parameters = trainable(ours)
    norm = nn.utils.clip_grad_norm_(parameters.values(), 0.5 * float(total))
    assert float(norm) == pytest.approx(float(total), rel=1e-4)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    torch.optim.SGD(parameters.values(), lr=0.1).step()
    for name, p in parameters.items():
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * 0.5 * expected[name], rtol=1e-4, atol=1e-6)


def test_a_second_forward_sees_the_step(model: PreTrainedModel) -> None:
    """In training, in evaluation, in a part of the model called by itself: never factors from before a step."""
    method = LoRA(r=4, alpha=8)
    ours = adapted(model, method)
    hidden: Callable[[], Tensor] = lambda: ours.get_submodule("model")(IDS).last_hidden_state  # noqa: E731
    for _ in range(2):
        loss_of(ours.train()).backward()
        with torch.no_grad():
            first, part = ours.eval()(IDS).logits, hidden()
            again = ours(IDS).logits
            assert torch.equal(first, again)
            for parameter in trainable(ours).values():
                parameter += 0.05
            assert not torch.equal(ours(IDS).logits, first) and not torch.equal(hidden(), part)
            reference = copy.deepcopy(merge_free(ours))
            inject.attach(reference, method)
            for name, parameter in trainable(reference).items():
                parameter.copy_(trainable(ours)[name])
            torch.testing.assert_close(ours(IDS).logits, reference(IDS).logits, rtol=1e-4, atol=1e-5)


def test_the_fast_path_is_taken() -> None:
    """By the number of operations: between the packed one of a training run, and the plain one, nearer to the first."""
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=8,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    counts = {}
    for kind in ("api", "plain", "run"):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config).train()
        if kind == "api":
            adapt(base, RaSA(r=4, k=1))
        else:
            inject.attach(base, RaSA(r=4, k=1))
        micro_batches = 3
        with Operations() as counted:
            if kind == "run":
                with packed(groups(base)):
                    for _ in range(micro_batches):
                        loss_of(base).backward()
            else:
                for _ in range(micro_batches):
                    loss_of(base).backward()
        counts[kind] = counted.count
    assert counts["run"] < counts["api"] < counts["plain"], counts


def test_generation_packs_once(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from rasa_train.adapters import packed_forward

    ours, calls, pack = adapted(model, LoRA(r=4)).eval(), [], packed_forward.pack
    monkeypatch.setattr(packed_forward, "pack", lambda *args: (calls.append(1), pack(*args))[1])
    with torch.no_grad():
        ours.generate(IDS[:, :4], max_new_tokens=5, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    assert len(calls) == 1


@every_method
def test_saved_loaded_and_merged(
    model: PreTrainedModel, method: Method, tmp_path: Path, tiny_llama: Path, cli: Cli
) -> None:
    """save_adapter -> load_adapter, merge in memory, and rasa-merge of the files: the same logits."""
    ours = adapted(model, method).eval()
    expected = ours(IDS).logits
    save_adapter(ours, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model"] == str(tiny_llama)
    again = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-5, atol=1e-6)
    cli("merge", "adapter", "--output", "merged", check=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert merge(ours) is model and not any(p.requires_grad for n, p in model.named_parameters() if "adapter" in n)
    torch.testing.assert_close(model(IDS).logits, merged(IDS).logits, rtol=1e-5, atol=1e-6)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_experts_are_merged_back(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes, **heads)).eval()
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    ours = adapted(model, RaSA(r=4, k=1))
    expected = ours(IDS).logits
    merge(ours)
    assert [(name, type(module)) for name, module in model.named_modules()] == kinds
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_page_runs(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of docs/API.md, one after the other, with what they leave to the reader."""
    from accelerate import Accelerator

    monkeypatch.chdir(tmp_path)
    page: dict[str, Any] = {"name": str(tiny_llama), "batches": [{"input_ids": IDS, "labels": IDS}] * 2}
    page["accelerator"] = Accelerator(cpu=True)
    found = [block for block in blocks(ROOT / "docs" / "API.md") if block.language == "python"]
    for block in found:
        if 'to="runs/math"' in block.text:  # runs of the reader's own
            for name in ("math", "code"):
                shutil.copytree(tmp_path / "adapter", tmp_path / "runs" / name)
        exec(block.text, page)
    assert len(found) == 5 and len(page["mixing"]) == 21 and len(page["factors"]) == 7 * 2 * 4
    loss_of(page["model"])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    untouched = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert not torch.equal(merged(IDS).logits, untouched(IDS).logits)


def test_an_adapter_to_start_from(model: PreTrainedModel, tmp_path: Path, tiny_llama: Path) -> None:
    """``init_from`` gives the values; one that does not fit leaves the model as it was."""
    ours = adapted(model, LoRA(r=4, alpha=8)).eval()
    save_adapter(ours, tmp_path / "adapter")
    again = adapt(
        AutoModelForCausalLM.from_pretrained(tiny_llama), LoRA(r=4, alpha=8, init_from=str(tmp_path / "adapter"))
    )
    torch.testing.assert_close(again.eval()(IDS).logits, ours(IDS).logits)
    other = AutoModelForCausalLM.from_pretrained(tiny_llama)
    before = {name: type(module) for name, module in other.named_modules()}
    with pytest.raises(UserError, match="does not fit"):
        adapt(other, LoRA(r=2, alpha=8, init_from=str(tmp_path / "adapter")))
    assert {name: type(module) for name, module in other.named_modules()} == before
    adapt(other, LoRA(r=2))


def test_what_cannot_be_done_is_said(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapters"):
        merge(model)
    adapt(model, LoRA(r=4))
    with pytest.raises(UserError, match="already has adapters"):
        adapt(model, LoRA(r=4))
    with pytest.raises(UserError, match="there is no such directory"):
        load_adapter(merge(model), tmp_path / "nowhere")
