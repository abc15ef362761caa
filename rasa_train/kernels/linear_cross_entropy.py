"""The cross-entropy of a linear head, with the logits of only a chunk of the tokens in memory at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cross_entropy as cross_entropy  # registers the operators

CHUNK = 2048
"""Number of tokens whose logits exist at one time: enough for full-speed products; 0.5 GiB for a vocabulary of 128k."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    rows: tuple[int, Tensor] | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Return ``cross_entropy(linear(hidden, weight, bias).float(), targets, reduction="sum")``, computed from the
    logits of ``chunk`` tokens at a time.

    The products are in the dtype of ``hidden`` (or of autocast), softmax and sum in fp32. torch's own function of this
    name rounds the loss of a bf16 head to bf16.

    Args:
        hidden: (tokens, width); no tokens at all give 0, connected to the graph.
        weight, bias: (vocabulary, width), (vocabulary).
        targets: (tokens), int64.
        rows: (n, width), which stand in place of n rows of ``weight``, and the number of the first of these rows: the
            gradient of the rows has their size, whatever that of the vocabulary.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    first, new = rows or (0, None)
    with torch.autocast(kind, enabled=False):
        loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden, weight, bias, new, targets, first, chunk, dtype, torch.is_grad_enabled()
        )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss as an autograd function. Since the loss is a sum, forward knows its gradients up to one factor, so the
    logits are never computed twice."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        new: Tensor | None,
        targets: Tensor,
        first: int,
        chunk: int,
        dtype: torch.dtype,
        grad: bool,
    ) -> Tensor:
        wants = [grad and need for need in ctx.needs_input_grad[:4]]
        dh, dw, db, dn = (torch.zeros_like(t) if want and t is not None else None
                          for t, want in zip((hidden, weight, bias, new), wants, strict=True))  # fmt: skip
        w = weight.to(dtype)
        b = None if bias is None else bias.to(dtype)
        n, own = (None, slice(0)) if new is None else (new.to(dtype), slice(first, first + len(new)))
        ops = torch.ops.rasa_train
        losses = ops.losses_and_gradient_ if any(wants) else ops.losses
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for at in range(0, len(hidden), chunk):
            part = slice(at, at + chunk)
            h = hidden[part].to(dtype)
            logits = F.linear(h, w, b)
            if n is not None:
                logits[:, own] = F.linear(h, n, None if b is None else b[own])
            loss += losses(logits, targets[part]).sum()
            dlogits = logits  # if a gradient is wanted, it is now in their place
            if db is not None:
                db += dlogits.sum(0)
            of_new = None
            if n is not None and any(wants):
                of_new = dlogits[:, own].clone()
                dlogits[:, own] = 0  # the rows of the weight are not used
            if dh is not None:
                dh[part] = dlogits @ w
            if dw is not None:
                dw += dlogits.t() @ h
            if of_new is not None and n is not None:
                if dh is not None:
                    dh[part] += of_new @ n
                if dn is not None:
                    dn += of_new.t() @ h
            del logits, dlogits  # before those of the next chunk are made
        ctx.save_for_backward(dh, dw, db, dn)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # In fp32: a factor rounded to bf16 would make the same relative error in every entry.
        scaled = [None if t is None else (t.float() * grad).to(t.dtype) for t in ctx.saved_tensors]
        return (*scaled, None, None, None, None, None)
