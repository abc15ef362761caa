"""Counters that are the same on every machine: bytes an adapter moves, and operations it dispatches.

Both are counted on the operations that torch dispatches in the forward and backward of one unpadded sequence.

Bytes   what each operation reads and writes of the tensors it is given (a stride of 0 is read once; a view, or
        making an empty tensor, moves nothing), of the model with the adapter minus the frozen base. From two lengths
        only what grows with the tokens is taken: the price of weights is paid once however many tokens there are.
        All layers are adapted, so that RaSA's pool has its size, and one is run.
Ops     operations other than views and empty tensors: each is a kernel to launch and Python to get there. They do not
        depend on the widths, so a model of 32 narrow layers tells.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, PretrainedConfig

from ..adapters.shared_input import packed
from ..errors import UserError
from ..kernels import seeded_dropout
from ..kernels.dropout import dropout, fused
from .engines import Engine, Label, contender, engines
from .shapes import random_model, shared_copy
from .workloads import language_model

LENGTHS = (8, 24)
"""Tokens of the two runs that bytes per token come from."""


@dataclass(frozen=True)
class Count:
    dispatched_ops: int
    """Of a micro-batch through 32 layers, the base and the loss included."""
    packing_ops: int
    """Beside them, once an optimizer step."""
    bytes_per_token_and_layer: float
    """Of the adapter."""


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it is entered. Products of matrices are not computed: their values change no count."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes, self.ops = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = _product(func, args, kwargs or {})
        if func.namespace in ("aten", "rasa_train") and not _moves_nothing(func):
            read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            written = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            if _overwrites(func, kwargs or {}):
                read = read[1:]
            self.bytes += sum(map(_size, read)) + sum(map(_size, written))
            self.ops += 1
        return result


class FusedDropout(TorchFunctionMode):
    """Dropout as on a GPU, one operation where it is one of its own; on a CPU it is made of several."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is dropout:
            return fused(*args, **(kwargs or {}))
        if func is not F.dropout:
            return func(*args, **(kwargs or {}))
        bound = inspect.signature(F.dropout).bind(*args, **(kwargs or {})).arguments
        p, training = bound.get("p", 0.5), bound.get("training", True)
        return torch.native_dropout(bound["input"], p, training)[0] if p and training else bound["input"]


def count(config: PretrainedConfig, dropout: float, only: Collection[Label] | None = None) -> dict[Label, Count]:
    """Count all engines, or ``only`` these, and always the frozen base, on a model of this architecture.

    Raises:
        UserError: the architecture is neither Llama's nor Mistral's, so how to run one layer of it is not known.
    """
    if config.model_type not in ("llama", "mistral"):
        raise UserError(
            f"--counters needs the shape of a Llama or Mistral model, got a {config.model_type} model", key="--shape"
        )
    chosen = [
        engine
        for engine in engines(config.hidden_size, dropout)
        if not engine.missing and (only is None or engine.method is None or engine.label in only)
    ]
    names = {engine.label for engine in chosen}
    narrow = [engine for engine in engines(NARROW["hidden_size"], dropout) if engine.label in names]
    moved = _bytes_per_token(chosen, config)
    ran = _run(narrow, LlamaConfig(**NARROW), LENGTHS[1], NARROW["num_hidden_layers"])
    return {
        engine.label: Count(totals.ops, totals.packing_ops, own - moved[0])
        for engine, totals, own in zip(chosen, ran, moved, strict=True)
    }


NARROW = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_hidden_layers": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
}


def _bytes_per_token(engines: list[Engine], config: PretrainedConfig) -> list[float]:
    one = copy.deepcopy(config)
    one.vocab_size, one.num_hidden_layers = 64, 1
    less, more = (_run(engines, one, tokens, config.num_hidden_layers) for tokens in LENGTHS)
    return [(b.bytes - a.bytes) / (LENGTHS[1] - LENGTHS[0]) for a, b in zip(less, more, strict=True)]


class _Totals(NamedTuple):
    ops: int
    """Of a micro-batch."""
    packing_ops: int
    bytes: int


def _run(engines: list[Engine], config: PretrainedConfig, tokens: int, layers: int) -> list[_Totals]:
    """A step of each; the model has ``layers`` layers, of which those that ``config`` has are run."""
    base = random_model(config, torch.bfloat16, torch.device("meta")).to_empty(device="cpu")  # no values: quick
    stack = base.get_submodule("model.layers")
    assert isinstance(stack, nn.ModuleList)
    stack.extend(shared_copy(stack[0]) for _ in range(layers - len(stack)))
    problem = language_model(base, [tokens], flat=False)
    results = []
    for engine in engines:
        ran = contender(engine, problem)
        with Counter() as counter, FusedDropout(), seeded_dropout.forced():
            with packed(ran.groups):
                before = counter.ops
                ran.micro_batch()
                ops = counter.ops - before
            results.append(_Totals(ops, counter.ops - ops, counter.bytes))
    return results


def _product(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What ``func`` gives, or something of the same shape if it multiplies matrices."""
    name = func.overloadpacket.__name__
    if "out" in kwargs and name in ("mm", "addmm", "bmm"):
        return kwargs["out"]
    if name == "addmm_":
        return args[0]
    if name in ("mm", "addmm"):
        a, b = args[-2:]
        return a.new_empty(a.shape[0], b.shape[1])
    return func(*args, **kwargs)


def _moves_nothing(func: Any) -> bool:
    name = func.overloadpacket.__name__
    return func.is_view or name in ("_unsafe_view", "detach", "lift_fresh") or "empty" in name


def _overwrites(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the first tensor is written and not read."""
    name = func.overloadpacket.__name__
    return name in ("zero_", "fill_", "copy_", "bernoulli_") or (
        name.startswith("addmm") and kwargs.get("beta", 1) == 0
    )


def _size(tensor: Tensor) -> int:
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count
