"""Features that are switched on layer by layer: recomputation of activations, and compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
import torch._functorch.config
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ..kernels.operators import whole
from .families import decoder_layers


def checkpoint_layers(model: nn.Module, count: int) -> None:
    """Recompute only the first ``count`` decoder layers in the backward pass. Checkpointing of the model must be
    enabled already."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for number, layer in enumerate(decoder_layers(model)):
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = number < count


KEPT = {
    "aten": (
        "mm addmm bmm baddbmm _grouped_mm _scaled_mm _scaled_dot_product_flash_attention "
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention "
        "_scaled_dot_product_cudnn_attention _flash_attention_forward"
    ),
    "torch_attn": "_varlen_attn",
    "rasa_train": "low_rank block_diagonal",
}
"""Operations whose results ``light_contexts`` keeps, by namespace."""


def light_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of ``torch.utils.checkpoint`` in which the results of products and attention are kept, and
    everything else (norms, rotary embedding, activation functions, residual sums) is computed again."""
    first, again = create_selective_checkpoint_contexts(_kept)  # type: ignore[no-untyped-call]
    return _with_groups_whole(first), _with_groups_whole(again)


def _kept(context: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    names = KEPT.get(function.namespace, "").split()
    keeps = function.overloadpacket.__name__ in names
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _with_groups_whole(context: AbstractContextManager[None]) -> Iterator[None]:
    with whole(), context:
        yield


OPTIONS = {"fallback_random": True}
"""Options of inductor: compiled code draws the random numbers that eager code draws."""


def compile_layers(model: nn.Module, backend: str | Callable[..., Any] = "inductor", *, light: bool = False) -> None:
    """Compile each decoder layer with ``backend``, for any number of tokens; identical layers share the compiled code.
    Where a layer is recomputed in the backward pass, the forward inside the recomputation is compiled.

    Args:
        light: compute again whatever is cheap, as ``light_contexts`` does. Otherwise the compiler keeps what an
            operator of the backward pass reads: the outputs of the norms and the input of the down projection.
    """
    torch._functorch.config.ban_recompute_materialized_backward = not light
    how: dict[str, Any] = {"dynamic": True, "backend": backend, "options": OPTIONS if backend == "inductor" else None}
    compiled = cache(partial(torch.compile, **how))
    outside = torch.compiler.disable(_recompute_compiled, recursive=False)  # type: ignore[no-untyped-call]
    for layer in decoder_layers(model):
        layer.compile(**how)
        if recompute := getattr(layer, "_gradient_checkpointing_func", None):
            layer._gradient_checkpointing_func = partial(outside, recompute, compiled)  # type: ignore[assignment]


def uncompile_layers(model: nn.Module) -> None:
    """Undo ``compile_layers``."""
    for layer in decoder_layers(model):
        layer._compiled_call_impl = None
        if recompute := getattr(layer, "_gradient_checkpointing_func", None):
            layer._gradient_checkpointing_func = recompute.args[0]  # type: ignore[assignment, union-attr]
    torch._functorch.config.ban_recompute_materialized_backward = True
    torch._dynamo.reset()


def _recompute_compiled(recompute: Callable[..., Any], compiled: Callable[..., Any], layer: Any, *args: Any) -> Any:
    """Return ``recompute(layer, *args)`` with the layer's forward compiled. The recomputation has to be outside the
    compiled graph: inside, it allows no graph breaks."""
    # A method is the layer's own call, which is compiled already (transformers before 5.23).
    if not isinstance(layer.func, MethodType):
        layer = partial(compiled(layer.func), *layer.args, **layer.keywords)
    return recompute(layer, *args)
