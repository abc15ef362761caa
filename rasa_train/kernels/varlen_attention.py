"""Attention over sequences that lie one after the other in one row, where each sequence attends only to itself.

The model gets ``input_ids`` (1, tokens), ``position_ids`` that restart with each sequence, and the starts of the
sequences, under the names that transformers' own flash attention uses (``cu_seq_lens_q``, ...).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from ..errors import UserError
from .operators import implement, library

NAME = "rasa_varlen"
"""Name of this attention in the registry of transformers."""


def for_fewer_key_heads(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``kernel``, torch's ``varlen_attn``, for keys and values with fewer heads than the queries. Newer versions
    of torch need ``enable_gqa`` for that; torch 2.11 always allows it and does not have the argument."""
    return partial(kernel, enable_gqa=True) if "enable_gqa" in inspect.signature(kernel).parameters else kernel


_grouped_varlen_attn = for_fewer_key_heads(varlen_attn)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **more: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention, as an implementation for transformers' ``AttentionInterface``.

    Args:
        query: (1, heads, tokens, head size); ``key`` and ``value`` may have fewer heads.
        sliding_window: number of tokens that a token attends to, itself included; None: itself and all tokens before.
        cu_seq_lens_q: start of each sequence, and the end of the last; int32, (sequences + 1), on the device.
        max_length_q: number of tokens of the longest sequence, or more.
    Returns:
        (1, tokens, heads, head size), and None for the attention weights.
    Raises:
        UserError: the model needs a feature that this attention does not have.
    """
    asked = [name for name in ("softcap", "s_aux", "position_bias") if more.get(name) is not None]
    if cu_seq_lens_q is None or asked or attention_mask is not None:
        what = ", ".join(asked) or ("an attention mask" if attention_mask is not None else "no starts of sequences")
        raise UserError(
            f"training.batching: {type(module).__name__} cannot be trained without padding (its attention gets "
            f"{what}); set training.batching to length-grouped or shuffled, and training.padding_free to false",
            key="training.batching",
        )
    if query.is_cuda and query.dtype != torch.float32 and dropout == 0.0 and query.shape[-1] <= 256:
        return _in_one_kernel((query, key, value), cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    return _one_by_one((query, key, value), cu_seq_lens_q, scaling, dropout, sliding_window), None


def _in_one_kernel(
    qkv: tuple[Tensor, Tensor, Tensor], starts: Tensor, longest: int, scaling: float | None, window: int | None
) -> Tensor:
    query, key, _ = qkv
    kernel = varlen_attn if query.shape[1] == key.shape[1] else _grouped_varlen_attn
    q, k, v = (t[0].transpose(0, 1) for t in qkv)
    sides = (-1 if window is None else window - 1, 0)
    result = kernel(q, k, v, starts, starts, longest, longest, scale=scaling, window_size=sides)
    assert isinstance(result, Tensor)
    return result.unsqueeze(0)


def _one_by_one(
    qkv: tuple[Tensor, Tensor, Tensor], starts: Tensor, scaling: float | None, dropout: float, window: int | None
) -> Tensor:
    if torch.compiler.is_compiling() and not dropout:  # a loop over lengths would be compiled again for each batch
        found: Tensor = torch.ops.rasa_train.varlen_attention(*qkv, starts, scaling, window)
    else:
        found = _loop(qkv, starts, scaling, dropout, window)
    return found


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _loop(
    qkv: tuple[Tensor, Tensor, Tensor], starts: Tensor, scaling: float | None, dropout: float, window: int | None
) -> Tensor:
    query, key, _ = qkv
    lengths = starts.diff().tolist()
    parts = zip(*(torch.split(t, lengths, dim=2) for t in qkv), strict=True)
    grouped = query.shape[1] != key.shape[1]
    results = []
    for (q, k, v), length in zip(parts, lengths, strict=True):
        mask = None
        if window is not None and length > window:
            mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        results.append(
            F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(results, dim=2).transpose(1, 2).contiguous()  # some models view the result


def _forward(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scaling: float | None, window: int | None) -> Tensor:
    found: Tensor = _loop((q, k, v), starts, scaling, 0.0, window)
    return found


def _gradients(dy: Tensor, *given: Any) -> list[Tensor]:
    """Return the gradients of q, k and v, given dy and the arguments of the forward pass, which is computed again: the
    number of its intermediate results depends on the lengths."""
    q, k, v, *rest = given
    with torch.enable_grad():
        qkv = [t.detach().requires_grad_() for t in (q, k, v)]
        y = _forward(qkv[0], qkv[1], qkv[2], *rest)
    return [g.contiguous() for g in torch.autograd.grad(y, qkv, dy)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scaling, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    found = torch.ops.rasa_train.varlen_attention_gradients(dy, *ctx.saved_tensors, ctx.scaling, ctx.window)
    return (*found, None, None, None)


_GIVEN = "Tensor q, Tensor k, Tensor v, Tensor starts, float? scaling, int? window"
implement(
    f"varlen_attention({_GIVEN}) -> Tensor",
    _forward,
    lambda q, k, v, starts, scaling, window: q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]),
)
implement(
    f"varlen_attention_gradients(Tensor dy, {_GIVEN}) -> Tensor[]",
    _gradients,
    lambda dy, q, k, v, starts, scaling, window: [t.new_empty(t.shape) for t in (q, k, v)],
)
torch.library.register_autograd("rasa_train::varlen_attention", _backward, setup_context=_setup, lib=library)


AttentionInterface.register(NAME, varlen_attention)
