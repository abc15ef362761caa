"""What is switched on layer by layer: recomputing activations, compiling."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from .families import decoder_layers


def checkpoint_layers(model: nn.Module, count: int) -> None:
    """Of a model whose checkpointing is enabled: recompute the first ``count`` decoder layers in the backward pass."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for number, layer in enumerate(decoder_layers(model)):
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = number < count


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Compile each decoder layer with ``backend``, for any number of tokens; layers that are alike share what is
    compiled. Of a layer that is recomputed, what the recomputation wraps is compiled."""
    compiled = cache(partial(torch.compile, dynamic=True, backend=backend))
    outside = torch.compiler.disable(_recompute_compiled, recursive=False)  # type: ignore[no-untyped-call]
    for layer in decoder_layers(model):
        layer.compile(dynamic=True, backend=backend)
        if recompute := getattr(layer, "_gradient_checkpointing_func", None):
            layer._gradient_checkpointing_func = partial(outside, recompute, compiled)  # type: ignore[assignment]


def _recompute_compiled(recompute: Callable[..., Any], compiled: Callable[..., Any], layer: Any, *args: Any) -> Any:
    """``recompute(layer, *args)`` with the layer's forward compiled. It has to be outside of the graph: recomputing
    from inside of one allows no breaks of it."""
    if not isinstance(layer.func, MethodType):  # a method is the layer's own call, which is compiled (before 5.23)
        layer = partial(compiled(layer.func), *layer.args, **layer.keywords)
    return recompute(layer, *args)
