"""What holds for every method on every kind of weight: the contract of ``adapters/base.py``, from start to merge."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from rasa_train.adapters.contract import Method
from rasa_train.adapters.inject import adapt
from rasa_train.adapters.registry import METHODS
from rasa_train.adapters.saved import TENSORS, load_tensors, read_adapter, write_adapter
from rasa_train.adapters.state import adapters, saved_tensors, trainable
from rasa_train.errors import UserError
from rasa_train.merging.merged import merge

FIELDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "alpha": 8},
    "rasa": {"r": 4, "k": 1, "alpha": 8},
    "vera": {"r": 16},
    "mora": {"r": 2},
    "tied-lora": {"r": 4},
    "sharelora": {"r": 4, "alpha": 8},
    "nola": {"r": 4, "n_basis": 8},
    "vb-lora": {"r": 3, "num_vectors": 16, "vector_length": 8},
    "olora": {"r": 4, "alpha": 8},
    "pissa": {"r": 4, "alpha": 8},
    "dora": {"r": 4, "alpha": 8},
    "adalora": {"r": 4, "alpha": 8},
    "prilora": {"r": 4, "alpha": 8},
    "full": {},
    "bitfit": {},
    "bottleneck": {"size": 3},
    "peft": {"config": {"peft_type": "LORA", "r": 3, "target_modules": "all-linear"}},
}
HEADS = {"vocab_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
WEIGHTS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {**HEADS, "hidden_size": 32, "intermediate_size": 48}),
    "conv1d": ("gpt2", {"vocab_size": 40, "n_layer": 2, "n_embd": 32, "n_head": 4}),
    "experts": ("mixtral", {**HEADS, "hidden_size": 32, "intermediate_size": 48, "num_local_experts": 4}),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# -- all that is not as the rest: the whole list -----------------------------------------------------------

STARTS_ELSEWHERE = {"vb-lora"}
"""dW is not zero before training: both factors are mixtures of random vectors."""
NO_SITES = {"full", "peft", "bitfit", "bottleneck"}
"""The update is of the base's own parameters, or PEFT's; BitFit adapts only linears without a bias (not GPT-2's);
bottleneck adapters are layers of their own."""
UNMERGED = {"bottleneck"}
REFUSED = {("bitfit", "experts"): "bitfit cannot add a bias"}

CASES = [(m, w, d) for m in FIELDS for w in WEIGHTS for d in DTYPES if (m, w) not in REFUSED]
IDS = torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(0))


class Case(NamedTuple):
    method: Method
    base: Callable[[], nn.Module]
    model: nn.Module
    """Adapted, and moved away from its start."""
    directory: Path
    """Its adapter."""
    started: Tensor
    """Logits before it was moved."""
    dtype: torch.dtype
    mixed: bool
    """Parameters of the base are trained: held in fp32, computed with under autocast, as in a run."""

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", self.dtype, cache_enabled=False) if self.mixed else nullcontext()

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        with self.autocast():
            return model.eval()(input_ids=IDS, use_cache=False).logits.float()


def test_every_method_is_here() -> None:
    assert FIELDS.keys() == METHODS.keys()
    assert {method for method, _, _ in CASES} == METHODS.keys()
    assert len(CASES) == len(METHODS) * len(WEIGHTS) * len(DTYPES) - len(REFUSED) * len(DTYPES)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    paths = {}
    for weight, (kind, fields) in WEIGHTS.items():
        for name, dtype in DTYPES.items():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.2)
            paths[weight, name] = tmp_path_factory.mktemp(f"{weight}-{name}")
            model.to(dtype).save_pretrained(paths[weight, name])
    return paths


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(
    request: pytest.FixtureRequest, bases: dict[tuple[str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Case:
    name, weight, dtype = request.param
    method = METHODS[name].model_validate({"method": name, **FIELDS[name]})
    return make_case(method, bases[weight, dtype], DTYPES[dtype], tmp_path_factory.mktemp(name))


def make_case(method: Method, path: Path, dtype: torch.dtype, directory: Path) -> Case:
    """The base in ``path`` adapted by a method, and its adapter in ``directory``."""

    def base() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="eager").eval()

    torch.manual_seed(1)
    model, _ = adapt(base(), method)
    mixed = dtype == torch.bfloat16 and any(method.trains(n) for n, _ in model.named_parameters())
    case = Case(method, base, model, directory, torch.empty(0), dtype, mixed)
    case = case._replace(started=case.logits(model))
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += 0.3 * torch.randn_like(parameter)
    write_adapter(directory, method, saved_tensors(model), base_model=str(path), base_revision=None)
    return case


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_the_output_is_the_bases_at_first(case: Case) -> None:
    before = case.logits(case.base())
    if case.method.method in STARTS_ELSEWHERE:
        assert (case.started - before).abs().max() > 1e-6
    elif case.mixed:
        assert relative(case.started, before) < 0.03  # fp32 weights under autocast: rounded elsewhere
    else:
        assert_close(case.started, before, rtol=1e-6, atol=1e-6)
    assert relative(case.logits(case.model), before) > 0.01, "training changes it"


@torch.no_grad()
def test_forward_is_the_delta(case: Case) -> None:
    found = adapters(case.model)
    assert found or case.method.method in NO_SITES
    torch.manual_seed(2)
    for adapter in found.values():
        site = adapter.site
        weight = case.model.get_parameter(site.weight)
        weight = weight.mT if site.transposed else weight
        weight = weight if site.rows is None else weight[:, slice(*site.rows)]
        delta, x = adapter.delta(weight.float()), torch.randn(12, site.in_features).to(weight.dtype)
        assert delta.shape == (*site.lead, *site.shape) and delta.dtype == torch.float32
        counts = None if site.num_experts is None else [5, 0, 4, 3]
        parts = [x] if counts is None else x.split(counts)
        wanted = torch.cat([p.float() @ dW.T for p, dW in zip(parts, delta.view(-1, *site.shape), strict=True)])
        if (bias := adapter.delta_bias()) is not None:
            wanted = wanted + bias
        got = adapter(x, weight, counts)
        assert got.dtype == x.dtype
        assert relative(got.float(), wanted) < (0.02 if x.dtype == torch.bfloat16 else 1e-5), site.path


@torch.no_grad()
def test_merged_is_the_base_plus_the_update(case: Case, tmp_path: Path) -> None:
    if case.method.method in UNMERGED:
        assert case.method.unmerged
        with pytest.raises(UserError, match=f"cannot be merged: {case.method.unmerged}"):
            merge(case.directory, tmp_path / "out")
        return
    report = merge(case.directory, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    assert merged.dtype == case.dtype and report.rounding is not None
    if case.dtype == torch.float32:
        assert_close(case.logits(merged), case.logits(case.model), rtol=1e-4, atol=1e-4)
        assert report.rounding < 1e-6
        return
    assert report.rounding > 0
    base, changed = dict(case.base().named_parameters()), dict(merged.named_parameters())
    expected = {name: p.float() for name, p in base.items()}
    for adapter in adapters(case.model).values():
        site = adapter.site
        rows = slice(None) if site.rows is None else slice(*site.rows)
        W = base[site.weight].float()
        W = W.mT if site.transposed else W[:, rows] if site.rows else W
        delta = adapter.delta(W)
        part = expected[site.weight][:, rows] if site.rows else expected[site.weight]
        part += delta.mT if site.transposed else delta
    for name, parameter in trainable(case.model).items():
        if name in expected:
            expected[name] = parameter
    if case.method.method != "peft":
        for name, value in expected.items():  # one rounding of W + dW
            assert_close(changed[name], value.bfloat16(), rtol=2**-8, atol=1e-6, msg=name)
    if "mixtral" not in merged.config.model_type:  # rounding can turn which experts are chosen
        assert relative(case.logits(merged), case.logits(case.model)) < 0.05


def test_saved_and_loaded_into_a_fresh_model(case: Case) -> None:
    saved = read_adapter(case.directory)
    assert saved.method == case.method
    torch.manual_seed(9)  # another start than that of the saved one
    fresh, _ = adapt(case.base(), saved.method)
    load_tensors(fresh, saved.tensors, origin="test")
    for name, tensor in saved_tensors(case.model).items():
        assert torch.equal(saved_tensors(fresh)[name], tensor), name
    assert torch.equal(case.logits(fresh), case.logits(case.model))


def test_every_tensor_is_stored_once(case: Case) -> None:
    tensors = saved_tensors(case.model)
    assert len({t.data_ptr() for t in tensors.values()}) == len(tensors)
    assert {id(p) for p in tensors.values()} >= {id(p) for p in case.model.parameters() if p.requires_grad}
    file = case.directory / TENSORS
    with safe_open(file, "pt") as opened:
        assert set(opened.keys()) == set(tensors)
    header = file.stat().st_size - sum(t.nbytes for t in tensors.values())
    assert 0 < header < 200 * len(tensors) + 200
    assert all(p.dtype == torch.float32 for p in trainable(case.model).values())


def test_a_gradient_reaches_everything_that_is_trained(case: Case) -> None:
    case.model.train()
    case.model.zero_grad()
    with case.autocast():
        case.model(input_ids=IDS, use_cache=False).logits.float().square().sum().backward()
    for name, parameter in trainable(case.model).items():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    assert all(p.grad is None for p in case.model.parameters() if not p.requires_grad)


@pytest.mark.parametrize(("name", "weight"), REFUSED)
def test_what_is_refused_is_refused_before_training(name: str, weight: str, bases: dict[tuple[str, str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(bases[weight, "fp32"])
    with pytest.raises(UserError, match=REFUSED[name, weight]):
        adapt(model, METHODS[name].model_validate({"method": name, **FIELDS[name]}))
