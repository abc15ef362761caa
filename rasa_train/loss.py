"""The summed cross-entropy of the supervised tokens, computed inside the model's forward.

Only the hidden states that predict a supervised token reach the LM head, and the logits exist for a chunk of them at
a time. It happens in forward because DDP, ZeRO-3 and FSDP2 gather weights and reduce gradients around that call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

CHUNK = 2048
"""Tokens whose logits exist at one time: enough for full-speed products, 1.5 GiB at a vocabulary of 128k."""

# fmt: off
PLAIN_HEADS = frozenset({
    "gemma", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "olmo2", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "stablelm", "starcoder2",
})
# fmt: on
"""Values of ``model_type`` whose logits are ``head(decoder(...).last_hidden_state)`` and nothing else. The others
(Gemma 2's soft caps, the scaled logits of Cohere and Granite, what nobody has tried) go through their own forward."""

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]


def install(model: nn.Module) -> Loss:
    """Make ``model(**batch)`` the loss of a batch (see ``data.batching``): fp32, a sum over its ``targets``.

    Returns a function of the model, or of what a strategy has wrapped it in, and a batch. A model that another library
    has wrapped (PEFT) is left as it is: its loss is computed from its logits, outside.
    """
    if not isinstance(model, PreTrainedModel):
        return from_logits
    if has_plain_head(model):
        model.set_output_embeddings(LossHead(model.get_output_embeddings()))
        model.forward = partial(_chunked, model)
    else:
        model.forward = partial(_of_own_logits, model.forward)
    return lambda model, batch: model(**batch)


@contextmanager
def with_logits(model: nn.Module) -> Iterator[None]:
    """``model`` gives logits again inside, and can generate."""
    forward = model.__dict__.pop("forward", None)
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if isinstance(model, PreTrainedModel) and isinstance(head, LossHead):
        model.set_output_embeddings(head.base)
    try:
        yield
    finally:
        if isinstance(model, PreTrainedModel) and isinstance(head, LossHead):
            model.set_output_embeddings(head)
        if forward is not None:
            model.__dict__["forward"] = forward


def has_plain_head(model: nn.Module) -> bool:
    """Whether the loss can be computed in chunks."""
    if not isinstance(model, PreTrainedModel):
        return False
    return model.config.model_type in PLAIN_HEADS and isinstance(model.get_output_embeddings(), nn.Linear)


def from_logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The same loss from all logits of a model that knows nothing of it."""
    inputs = {name: value for name, value in batch.items() if name not in ("positions", "targets")}
    return _of_own_logits(model, batch["positions"], batch["targets"], **inputs)


class LossHead(nn.Module):
    """The LM head of ``base``, by the same names, giving the loss instead of the logits."""

    base: nn.Linear

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        object.__setattr__(self, "base", base)  # not registered: its tensors are this module's

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Sum of the cross-entropies, fp32; ``hidden`` (tokens, width), ``targets`` (tokens)."""
        return linear_cross_entropy(hidden, self.weight, self.bias, targets)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, chunk: int = CHUNK
) -> Tensor:
    """``cross_entropy(linear(hidden, weight, bias).float(), targets, reduction="sum")``, ``chunk`` logits at a time.

    The products are in the dtype of ``hidden`` (or autocast's), softmax and sum in fp32. torch's own function of this
    name rounds the loss of a bf16 head to bf16.

    Args:
        hidden: (tokens, width); none at all give 0, connected to the graph.
        weight, bias: (vocabulary, width), (vocabulary).
        targets: (tokens), int64.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with torch.autocast(kind, enabled=False):
        loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden, weight, bias, targets, chunk, dtype, torch.is_grad_enabled()
        )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss is a sum, so its gradients are known in forward up to one factor; logits are never computed twice."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
        dtype: torch.dtype,
        grad: bool,
    ) -> Tensor:
        wants = [grad and need for need in ctx.needs_input_grad[:3]]
        dh, dw, db = (torch.zeros_like(t) if want and t is not None else None
                      for t, want in zip((hidden, weight, bias), wants, strict=True))  # fmt: skip
        w = weight.to(dtype)
        b = None if bias is None else bias.to(dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for at in range(0, len(hidden), chunk):
            part = slice(at, at + chunk)
            h, target = hidden[part].to(dtype), targets[part].unsqueeze(1)
            p = F.linear(h, w, b).float()
            highest = p.amax(1, keepdim=True)
            of_target = p.gather(1, target) - highest
            total = p.sub_(highest).exp_().sum(1, keepdim=True)
            loss += (total.log() - of_target).sum()
            if not any(wants):
                continue
            dlogits = p.div_(total).scatter_add_(1, target, torch.full_like(total, -1.0)).to(dtype)
            if dh is not None:
                dh[part] = dlogits @ w
            if dw is not None:
                dw += dlogits.t() @ h
            if db is not None:
                db += dlogits.sum(0)
        ctx.save_for_backward(dh, dw, db)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # In fp32: rounded to bf16, the factor would be off by as much for every entry.
        scaled = [None if t is None else (t.float() * grad).to(t.dtype) for t in ctx.saved_tensors]
        return (*scaled, None, None, None, None)


def _chunked(model: PreTrainedModel, positions: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
    hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    loss: Tensor = model.get_output_embeddings()(hidden.flatten(0, 1)[positions], targets)
    return loss


def _of_own_logits(forward: Callable[..., Any], positions: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
    """Of a model's own logits: of the supervised tokens if they are in one row and the model can, else of all."""
    keeps = len(inputs["input_ids"]) == 1 and "logits_to_keep" in inspect.signature(forward).parameters
    if keeps:
        logits = forward(**inputs, use_cache=False, logits_to_keep=positions).logits[0]
    else:
        logits = forward(**inputs, use_cache=False).logits.flatten(0, 1)[positions]
    return F.cross_entropy(logits.float(), targets, reduction="sum")
