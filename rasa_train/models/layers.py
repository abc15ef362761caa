"""Features that are switched on layer by layer: recomputation of activations, and compilation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from .families import decoder_layers


def checkpoint_layers(model: nn.Module, count: int) -> None:
    """Recompute only the first ``count`` decoder layers in the backward pass. Checkpointing of the model must be
    enabled already."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for number, layer in enumerate(decoder_layers(model)):
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = number < count


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Compile each decoder layer with ``backend``, for any number of tokens; identical layers share the compiled code.
    Where a layer is recomputed in the backward pass, the forward inside the recomputation is compiled."""
    compiled = cache(partial(torch.compile, dynamic=True, backend=backend))
    outside = torch.compiler.disable(_recompute_compiled, recursive=False)  # type: ignore[no-untyped-call]
    for layer in decoder_layers(model):
        layer.compile(dynamic=True, backend=backend)
        if recompute := getattr(layer, "_gradient_checkpointing_func", None):
            layer._gradient_checkpointing_func = partial(outside, recompute, compiled)  # type: ignore[assignment]


def _recompute_compiled(recompute: Callable[..., Any], compiled: Callable[..., Any], layer: Any, *args: Any) -> Any:
    """Return ``recompute(layer, *args)`` with the layer's forward compiled. The recomputation has to be outside the
    compiled graph: inside, it allows no graph breaks."""
    # A method is the layer's own call, which is compiled already (transformers before 5.23).
    if not isinstance(layer.func, MethodType):
        layer = partial(compiled(layer.func), *layer.args, **layer.keywords)
    return recompute(layer, *args)
