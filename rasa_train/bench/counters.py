"""Counters that are the same on every machine: bytes moved, bytes kept, and operations dispatched.

All are counted on the operations that torch dispatches in the forward and backward pass of one unpadded sequence.

Bytes   the bytes that each operation reads and writes of its tensors (a stride of 0 is read once; views and empty
        tensors move nothing), for the model with the adapter minus the frozen base. Two lengths are run, and only the
        bytes that grow with the tokens are counted: weights are read once, however many tokens there are. All layers
        are adapted, so that RaSA's pool has its full size, and one layer is run.
Saved   the bytes of what autograd keeps for the backward pass, each storage once, without parameters and buffers; also
        by two lengths.
Ops     operations other than views and empty tensors: each launches a kernel and takes Python time. Their number does
        not depend on the widths, so a model of 32 narrow layers is run.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Mapping
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
from ..kernels.operators import INSIDE
from .engines import Engine, Label, contender, engines
from .shapes import random_model, shared_copy
from .workloads import language_model

LENGTHS = (8, 24)
"""Numbers of tokens of the two runs from which the bytes per token are computed."""


@dataclass(frozen=True)
class Count:
    """Counters of one engine."""

    dispatched_ops: int
    """Operations of a micro-batch through 32 layers, those of the base and the loss included."""
    packing_ops: int
    """Further operations, which run once per optimizer step."""
    bytes_per_token_and_layer: float
    """Bytes that the adapter moves."""
    base_bytes_per_token_and_layer: float
    """Bytes that the frozen base alone moves in a layer; the same for every engine."""
    saved_bytes_per_token_and_layer: float
    """Bytes kept for the backward pass in a layer, those of the base included."""


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations and bytes while it is active. Matrix products are not computed: no count depends on values.

    Args:
        only_inside: count only what is inside operators of this package.
    """

    def __init__(self, *, only_inside: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes, self.ops, self._counts = 0, 0, not only_inside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # The operations inside an operator that is no kernel itself are counted in its place.
        if func.namespace == "rasa_train" and (inside := INSIDE.get(func.overloadpacket.__name__)):
            before, self._counts = self._counts, True
            with self, FusedDropout():
                made = inside(*args, **(kwargs or {}))
            self._counts = before
            return made
        result = _product(func, args, kwargs or {})
        if self._counts and func.namespace in ("aten", "rasa_train") and not _moves_nothing(func):
            read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            written = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            if _overwrites(func, kwargs or {}):
                read = read[1:]
            self.bytes += sum(map(_size, read)) + sum(map(_size, written))
            self.ops += 1
        return result


class FusedDropout(TorchFunctionMode):
    """Makes dropout a single operation, as it is on a GPU; on a CPU it would be several."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is dropout:
            return fused(*args, **(kwargs or {}))
        if func is not F.dropout:
            return func(*args, **(kwargs or {}))
        bound = inspect.signature(F.dropout).bind(*args, **(kwargs or {})).arguments
        p, training = bound.get("p", 0.5), bound.get("training", True)
        return torch.native_dropout(bound["input"], p, training)[0] if p and training else bound["input"]


class Saved:
    """Holds what autograd saves for the backward pass while it is active, except the tensors of a model.

    Holding the tensors keeps their addresses from being reused, so that each storage is counted once.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self._kept: dict[int, Tensor] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, _as_it_is)

    def __enter__(self) -> Saved:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)  # type: ignore[no-untyped-call]

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())

    def _keep(self, tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in self._model:
            self._kept[address] = tensor
        return tensor


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def count(config: PretrainedConfig, dropout: float, only: Collection[Label] | None = None) -> dict[Label, Count]:
    """Count all engines, or ``only`` those, and always the frozen base, on a model of this architecture.

    Raises:
        UserError: the architecture is neither Llama's nor Mistral's, so it is not known how to run one of its layers.
    """
    _check(config)
    chosen = [
        engine
        for engine in engines(config.hidden_size, dropout)
        if not engine.missing and (only is None or engine.method is None or engine.label in only)
    ]
    names = {engine.label for engine in chosen}
    narrow = [engine for engine in engines(NARROW["hidden_size"], dropout) if engine.label in names]
    grown = _per_token(chosen, config, 1)
    base, deeper = grown[0], _per_token(chosen[:1], config, 2)[0]
    layer = _Grown(deeper.moved - base.moved, deeper.saved - base.saved)
    ran = _run(narrow, LlamaConfig(**NARROW), LENGTHS[1], NARROW["num_hidden_layers"])
    return {
        engine.label: Count(
            dispatched_ops=totals.ops,
            packing_ops=totals.packing_ops,
            bytes_per_token_and_layer=own.moved - base.moved,
            base_bytes_per_token_and_layer=layer.moved,
            saved_bytes_per_token_and_layer=layer.saved + own.saved - base.saved,
        )
        for engine, totals, own in zip(chosen, ran, grown, strict=True)
    }


def saved_per_token_and_layer(engine: Engine, config: PretrainedConfig) -> float:
    """Return the bytes that an engine keeps for the backward pass, by token and layer.

    Raises:
        UserError: the architecture is not supported, as in ``count``.
    """
    _check(config)
    (one,), (two,) = (_per_token([engine], config, run) for run in (1, 2))
    return two.saved - one.saved


NARROW = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_hidden_layers": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
}
"""Configuration of the Llama on which operations are counted."""


def _check(config: PretrainedConfig) -> None:
    if config.model_type not in ("llama", "mistral"):
        raise UserError(
            f"--counters needs the shape of a Llama or Mistral model, got that of a {config.model_type} model",
            key="--shape",
        )


class _Grown(NamedTuple):
    """Bytes per token."""

    moved: float
    saved: float


def _per_token(engines: list[Engine], config: PretrainedConfig, run: int) -> list[_Grown]:
    """Return the bytes of each engine that grow with the tokens, if ``run`` of the layers are run."""
    few = copy.deepcopy(config)
    few.vocab_size, few.num_hidden_layers = 64, run
    less, more = (_run(engines, few, tokens, config.num_hidden_layers) for tokens in LENGTHS)
    between = LENGTHS[1] - LENGTHS[0]
    return [
        _Grown((b.bytes - a.bytes) / between, (b.saved - a.saved) / between) for a, b in zip(less, more, strict=True)
    ]


class _Totals(NamedTuple):
    ops: int
    """Operations of a micro-batch."""
    packing_ops: int
    bytes: int
    """Bytes moved by the whole step."""
    saved: int
    """Bytes kept for the backward pass."""


def _run(engines: list[Engine], config: PretrainedConfig, tokens: int, layers: int) -> list[_Totals]:
    """Run a step of each engine on a model of ``layers`` layers, of which only those in ``config`` are run."""
    # without values, because drawing them would take time
    base = random_model(config, torch.bfloat16, torch.device("meta")).to_empty(device="cpu")
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
                with Saved(ran.model) as saved:
                    ran.micro_batch()
                ops = counter.ops - before
            results.append(_Totals(ops, counter.ops - ops, counter.bytes, saved.bytes))
    return results


def _product(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Return the result of ``func``, or an empty tensor of its shape if ``func`` multiplies matrices."""
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


def _overwrites(func: Any, kwargs: Mapping[str, object]) -> bool:
    """Whether the first tensor is written without being read."""
    name = func.overloadpacket.__name__
    return name in ("zero_", "fill_", "copy_", "bernoulli_") or (
        name.startswith("addmm") and kwargs.get("beta", 1) == 0
    )


def _size(tensor: Tensor) -> int:
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count
