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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, PretrainedConfig

from ..errors import UserError
from .engines import Engine, contender, engines, step
from .shapes import shared_copy
from .workloads import language_model

LENGTHS = (8, 24)
"""Tokens of the two runs that bytes per token come from."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Count:
    bytes_per_token_and_layer: float
    """Of the adapter."""
    dispatched_ops: int
    """Of a micro-batch through 32 layers, the base and the loss included."""


class Counter(TorchDispatchMode):
    """Counts while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.ops = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not _moves_nothing(func):
            read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            written = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            if _overwrites(func, kwargs or {}):
                read = read[1:]
            self.bytes += sum(map(_size, read)) + sum(map(_size, written))
            self.ops += 1
        return result


def count(
    config: PretrainedConfig, dropout: float, only: set[str] | None = None
) -> dict[tuple[str, str | None], Count]:
    """Count all engines, or ``only`` those of these names, on a model of this architecture.

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
        if not engine.missing and (only is None or engine.name in (*only, "base"))
    ]
    narrow = [engine for engine in engines(NARROW["hidden_size"], dropout) if engine.label in {e.label for e in chosen}]
    base = chosen[0]
    assert base.method is None
    nothing = _bytes_per_token(base, config)
    return {
        engine.label: Count(_bytes_per_token(engine, config) - nothing, _dispatched(small))
        for engine, small in zip(chosen, narrow, strict=True)
    }


NARROW = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_hidden_layers": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
}


def _bytes_per_token(engine: Engine, config: PretrainedConfig) -> float:
    one = copy.deepcopy(config)
    one.vocab_size, one.num_hidden_layers = 64, 1
    less, more = (_run(engine, one, tokens, config.num_hidden_layers).bytes for tokens in LENGTHS)
    return (more - less) / (LENGTHS[1] - LENGTHS[0])


def _dispatched(engine: Engine) -> int:
    return _run(engine, LlamaConfig(**NARROW), LENGTHS[1], NARROW["num_hidden_layers"]).ops


def _run(engine: Engine, config: PretrainedConfig, tokens: int, layers: int) -> Counter:
    """Forward and backward; the model has ``layers`` layers, of which those that ``config`` has are run."""
    problem = language_model(config, [tokens], dtype=torch.bfloat16, device=CPU)
    stack = problem.base.get_submodule("model.layers")
    assert isinstance(stack, nn.ModuleList)
    stack.extend(shared_copy(stack[0]) for _ in range(layers - len(stack)))
    ran = contender(engine, problem.base)
    with Counter() as counter:
        step(ran, problem.loss)
    return counter


def _moves_nothing(func: Any) -> bool:
    name = func.overloadpacket.__name__
    return func.is_view or name in ("_unsafe_view", "detach", "lift_fresh") or "empty" in name


def _overwrites(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the first tensor is written and not read."""
    name = func.overloadpacket.__name__
    return name in ("zero_", "fill_", "copy_") or (name.startswith("addmm") and kwargs.get("beta", 1) == 0)


def _size(tensor: Tensor) -> int:
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count
