"""Compiled layers compute what they compute uncompiled, and are not compiled again for every batch."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from rasa_train.adapters.inject import adapt
from rasa_train.adapters.registry import METHODS
from rasa_train.adapters.shared_input import packed
from rasa_train.adapters.state import groups
from rasa_train.data.batching import collate, flatten, with_targets
from rasa_train.models.layers import compile_layers, light_contexts
from rasa_train.models.padding_free import use_varlen
from rasa_train.objectives.next_token import NextToken
from rasa_train.training.compiling import Result, difference

from .conftest import Cli
from .test_loss import assert_same_gradients, examples
from .tiny_models import tiny_model

FIELDS: dict[str, dict[str, Any]] = {"rasa": {"r": 4, "k": 1}, "vb-lora": {"vector_length": 16}}
LENGTHS = [(5, 9), (7, 3, 12), (20,), (4, 4, 4, 4), (33, 2), (8,), (11, 9), (13,), (5, 6, 7), (6, 6), (2, 3), (17, 4)]
LENGTHS += [(9, 9, 9), (3,), (40, 8), (21,), (5, 5, 4), (12, 30), (6, 2, 2, 9), (16,)]


def graphs(method: str, backend: str, *, flat: bool, checkpointing: bool = False, **fields: Any) -> list[int]:
    """Train ``method`` on batches of many shapes, compiled, not compiled, and by the adapters' own forward. Returns the
    number of graphs compiled up to each batch."""
    torch._dynamo.reset()
    counters.clear()
    base = tiny_model("llama")
    if flat:
        use_varlen(base)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    model, _ = adapt(base, METHODS[method](**FIELDS.get(method, {}), **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    eager, plain = copy.deepcopy(model), copy.deepcopy(model)
    models = [(model, groups(model)), (eager, groups(eager)), (plain, [])]
    losses = [NextToken().install(m) for m, _ in models]
    compile_layers(model, backend)
    found, held = [], [{}, {}, {}]
    for lengths in LENGTHS:
        some = examples(*lengths)
        batch = with_targets((flatten(some) if flat else collate(some, pad_token_id=0)) or {})
        results = []
        for (m, together), loss_of, buffers in zip(models, losses, held, strict=True):
            m.train()
            m.zero_grad()
            torch.manual_seed(1)
            with packed(together, buffers):
                loss = loss_of(m, batch)
                loss.backward()
            results.append(float(loss.detach()))
        assert results == pytest.approx([results[0]] * 3, rel=1e-5)
        assert_same_gradients(model, eager)
        assert_same_gradients(model, plain)
        found.append(counters["stats"]["unique_graphs"])
    return found


def test_a_layer_is_one_graph_with_the_fast_path_in_it() -> None:
    """The first layer, whose input needs no gradient, and the others: two graphs for batches of all shapes."""
    found = graphs("rasa", "aot_eager", flat=True, dropout=0.1)
    assert found[0] == found[-1] == 2 and not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_shapes_share_what_is_compiled(flat: bool, checkpointing: bool) -> None:
    found = graphs("rasa", "aot_eager", flat=flat, checkpointing=checkpointing)
    # Padded batches are compiled for the first length and then for any, with one sequence (no mask) and with several.
    assert found[0] > 0 and found[-1] <= (1 if flat else 4) * found[0], found
    assert found[-1] == found[9], "no more of them after some batches"


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"peft"}))
def test_every_method(method: str) -> None:
    """Those with a fast path with dropout too: compiled code draws the masks that eager code draws."""
    fields = {} if method in ("dora", "bitfit", "full", "prilora") else {"dropout": 0.1}
    assert graphs(method, "aot_eager", flat=True, **fields)[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rasa", "vera", "mora"])
def test_inductor(method: str) -> None:
    assert graphs(method, "inductor", flat=True, dropout=0.1)[0] > 0


@pytest.mark.slow
def test_a_run_with_compiled_layers(recipe: Path, cli: Cli) -> None:
    """The same losses as without, to the bit when it is stopped and goes on."""
    fixed = ("adapter.dropout=0.1", "training.max_steps=8", "training.checkpoint_every=3")
    cli("train", recipe, *fixed, "output_dir=eager", "training.compile=false", check=True)
    done = cli("train", recipe, *fixed, "output_dir=whole", "training.compile=true", check=True)
    assert "the decoder layers are compiled; loss and gradients are those of the layers themselves" in done.stderr
    home = recipe.parent
    shutil.copytree(home / "whole", home / "parted")
    for name in ("step-00000006", "step-00000008"):
        shutil.rmtree(home / "parted" / "checkpoints" / name)
    for name in ("adapter", "summary.json"):
        (shutil.rmtree if name == "adapter" else os.remove)(home / "parted" / name)
    again = cli("train", recipe, *fixed, "output_dir=parted", "training.compile=true", check=True)
    assert "(step 3 of 8)" in again.stderr
    eager, whole, parted = (load_file(home / run / "adapter" / "adapter.safetensors") for run in RUNS)
    for name in whole:
        assert torch.equal(whole[name], parted[name]), name
        assert_close(whole[name], eager[name], rtol=1e-4, atol=1e-5)
    flags = [json.loads((home / run / "summary.json").read_text()) for run in RUNS]
    assert [(f["fast_path"], f["compiled"]) for f in flags] == [(True, False), (True, True), (True, True)]


RUNS = ("eager", "whole", "parted")


def test_a_machine_without_a_compiler(recipe: Path) -> None:
    """A line says so, and the run goes on."""
    words = [sys.executable, "-m", "rasa_train.cli.train", str(recipe), "training.max_steps=1", "training.compile=true"]
    env = {**os.environ, "CXX": "/nonexistent/c++", "TORCHINDUCTOR_CACHE_DIR": str(recipe.parent / "cache")}
    done = subprocess.run(words, cwd=recipe.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "the decoder layers are not compiled: " in line]
    assert len(said) == 1 and "Traceback" not in done.stderr
    assert json.loads((recipe.parent / "run" / "summary.json").read_text())["compiled"] is False


def test_compiled_layers_that_compute_something_else_are_not_used() -> None:
    ones = {"a": torch.ones(4)}
    right, close = Result(2.0, ones), Result(2.0001, {"a": torch.ones(4) * 1.0005})
    assert difference(right, close, (1e-4, 1e-3)) is None
    assert difference(right, Result(2.1, ones), (1e-4, 1e-3)) == "their loss would be 2.1000 instead of 2.0000"
    assert difference(right, Result(float("nan"), ones), (1e-4, 1e-3)) is not None
    assert difference(right, Result(2.0, {}), (1e-4, 1e-3)) == "their gradients would reach other tensors"
    off = Result(2.0, {"a": torch.tensor([1.0, 1.0, 1.0, 0.0])})
    assert difference(right, off, (1e-4, 1e-3)) == "their gradients would differ by 50.0%"
    assert difference(right, Result(2.0, {"a": torch.full((4,), float("nan"))}), (1e-4, 1e-3)) is not None


class Products(TorchDispatchMode):
    """Counts the matrix products and the activation functions that run."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.activations = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.products += name in ("mm", "addmm", "addmm_", "bmm")
        self.activations += name in ("silu", "rsqrt")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["rasa", "mora", "dora"])
def test_light_checkpointing_computes_no_product_again(method: str) -> None:
    base = tiny_model("llama")
    light = copy.deepcopy(base)
    light.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": light_contexts})
    batch, found, models = with_targets(flatten(examples(9, 5)) or {}), [], []
    for m in (base, light):
        use_varlen(m)
        torch.manual_seed(0)
        model, _ = adapt(m, METHODS[method](**FIELDS.get(method, {}), dropout=0.0 if method == "dora" else 0.1))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        loss_of = NextToken().install(model.train())
        # transformers does this where layers are checkpointed: the first layer then has a gradient for its input.
        model.get_input_embeddings().register_forward_hook(lambda module, args, y: y.requires_grad_())
        torch.manual_seed(1)
        with packed(groups(model)):
            loss = loss_of(model, batch)
            with Products() as counted:
                loss.backward()
        found.append((float(loss.detach()), counted.products))
        models.append(model)
        again = counted.activations
    assert found[0] == found[1] and again > 0
    assert_same_gradients(*models)
