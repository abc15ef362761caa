"""Counters of compiled layers, without a compiler for C++ or Triton, and the same on every machine.

Each graph of a layer, forward and backward, is lowered and fused by inductor as usual. Then the bytes are added up that
each of its kernels reads and writes. In place of an operator of this package, the operations inside are counted as in
eager code (``counters``). So the figure says what fusion saves; what a kernel's cache saves beyond that is not in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from transformers import PretrainedConfig

from ..adapters.shared_input import packed
from ..kernels import seeded_dropout
from ..models.layers import compile_layers
from .counters import LENGTHS, Counter, FusedDropout, Saved
from .engines import Engine, contender
from .shapes import random_model, shared_copy
from .workloads import language_model


@dataclass(frozen=True)
class CompiledCount:
    """Counters of one engine in a compiled layer."""

    graphs: int
    """Number of pairs of graphs, forward and backward, of a layer: 1 unless something breaks the graph."""
    moved_bytes_per_token_and_layer: float
    saved_bytes_per_token_and_layer: float
    """Bytes kept for the backward pass."""


def count_compiled(engine: Engine, config: PretrainedConfig, *, light: bool = False) -> CompiledCount:
    """Count an engine on a layer of this architecture in bf16. All layers are adapted, so that RaSA's pool has its full
    size, and one layer is run, or two for what is kept.

    Args:
        light: with ``activation_checkpointing: light``.
    """
    less, more = (_layer(engine, config, tokens, light) for tokens in LENGTHS)
    between = LENGTHS[1] - LENGTHS[0]
    return CompiledCount(less.graphs, (more.bytes - less.bytes) / between, (more.saved - less.saved) / between)


@dataclass
class _Found:
    """Counts of a layer, and what it keeps."""

    graphs: int = 0
    bytes: int = 0
    saved: int = 0


def _layer(engine: Engine, config: PretrainedConfig, tokens: int, light: bool) -> _Found:
    torch._dynamo.reset()
    counted = _Found()
    backend = _backend(counted)
    saved = _run(engine, config, tokens, 1, backend, light=light)
    result = _Found(counted.graphs, counted.bytes)
    # A second layer shares the compiled code of the first.
    result.saved = _run(engine, config, tokens, 2, backend, light=light) - saved
    return result


def _run(
    engine: Engine, config: PretrainedConfig, tokens: int, number: int, backend: Callable[..., Any], *, light: bool
) -> int:
    """Run a step of ``number`` compiled layers. Returns the bytes that are kept for the backward pass."""
    few = copy.deepcopy(config)
    few.vocab_size, few.num_hidden_layers = 64, number
    base = random_model(few, torch.bfloat16, torch.device("meta")).to_empty(device="cpu")
    stack = base.get_submodule("model.layers")
    assert isinstance(stack, nn.ModuleList)
    stack.extend(shared_copy(stack[0]) for _ in range(config.num_hidden_layers - number))
    # The first layer, too, then has a gradient for its input, as all others have.
    base.get_input_embeddings().register_forward_hook(lambda module, args, y: y.requires_grad_())
    ran = contender(engine, language_model(base, [tokens], flat=False))
    compile_layers(ran.model, backend, light=light)
    with (
        torch._inductor.config.patch(force_pointwise_cat=True),  # rotary embedding is fused as on a GPU
        seeded_dropout.forced(),
        packed(ran.groups),
        Saved(ran.model) as saved,
    ):
        ran.micro_batch()
    return saved.bytes


def _backend(found: _Found) -> Callable[[GraphModule, Sequence[Any]], Any]:
    """Return a backend of ``torch.compile`` that counts, and computes without the products."""
    from torch._functorch.aot_autograd import make_boxed_func  # type: ignore[attr-defined]
    from torch._inductor.compile_fx import compile_fx

    def inner(graph: GraphModule, inputs: Sequence[Any], **how: Any) -> Any:
        original = copy.deepcopy(graph)
        found.graphs += not how.get("is_backward", False)
        found.bytes += _bytes_of_kernels(graph, inputs, how)

        def run(*args: Any) -> Any:
            with Counter(only_inside=True) as counter, FusedDropout():
                result = original.forward(*args)
            found.bytes += counter.bytes
            return result

        return make_boxed_func(run)

    return lambda graph, inputs: compile_fx(graph, inputs, inner_compile=inner)


def _bytes_of_kernels(graph: GraphModule, inputs: Sequence[Any], how: dict[str, Any]) -> int:
    """Return the bytes that the kernels of a graph read and write, except those of this package's operators."""
    from torch._guards import detect_fake_mode
    from torch._inductor import compile_fx, debug
    from torch._inductor import graph as lowering
    from torch._inductor.fx_passes.post_grad import view_to_reshape
    from torch._inductor.virtualized import V

    mode = detect_fake_mode(inputs)
    assert mode is not None
    inference, backward = how.get("is_inference", False), how.get("is_backward", False)
    view_to_reshape(graph)  # type: ignore[no-untyped-call]
    with V.set_fake_mode(mode):
        compile_fx.fake_tensor_prop(graph, inputs)
        compile_fx.record_original_output_strides(graph)
        compile_fx._recursive_post_grad_passes(graph, is_inference=inference)
        lowered = lowering.GraphLowering(
            graph, example_inputs=inputs, shape_env=mode.shape_env, is_inference=inference, is_backward=backward
        )
        with (
            V.set_debug_handler(debug.DebugContext()),
            V.set_graph_handler(lowered),
            V.set_extern_kernel_nodes([]),
        ):
            lowered.run(*inputs)
            lowered.init_wrapper_code()
            lowered._update_scheduler()
            total = 0
            for node in lowered.scheduler.nodes:
                operator = getattr(getattr(node, "node", None), "op_overload", None)
                size = 0 if getattr(operator, "namespace", "") == "rasa_train" else node.get_read_write_buffers_sizes()
                total += size
    return total
