"""Norms, rotary embedding and SwiGLU as one kernel each, from Liger where it is installed: transformers computes them
operation by operation, which moves several times as many bytes."""

from __future__ import annotations

import sys
from functools import partial
from importlib.util import find_spec
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""Model types whose norm, MLP and rotary embedding are those that the kernels compute, and what the names of their
classes begin with."""


def fusable(model_type: str) -> str | None:
    """Return why this machine or this model type does not have fused kernels; None if it has them."""
    if not torch.cuda.is_available():
        return "they need a GPU"
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed; pip install liger-kernel"
    if model_type not in FAMILIES:
        return f"they are known to be right for {', '.join(FAMILIES)}, not for {model_type}"
    return None


def fuse(model: PreTrainedModel) -> None:
    """Let the norms and MLPs of this model, and the rotary embedding of its family in this process, compute with
    Liger's kernels wherever their input is on a GPU.

    Raises:
        UserError: there are no kernels for it (``fusable``).
    """
    kind = str(model.config.model_type)
    if why := fusable(kind):
        raise UserError(f"training.kernels: liger cannot be used: {why}", key="training.kernels")
    name = FAMILIES[kind]
    for module in model.modules():
        if type(module).__name__ == f"{name}RMSNorm":
            module.forward = MethodType(_norm, module)
        elif type(module).__name__ == f"{name}MLP" and model.config.hidden_act in ("silu", "swish"):
            module.forward = MethodType(_swiglu, module)
    source: Any = sys.modules[type(model).__module__]
    if not isinstance(source.apply_rotary_pos_emb, partial):
        source.apply_rotary_pos_emb = partial(_rotary, source.apply_rotary_pos_emb)


def _norm(self: Any, x: Tensor) -> Tensor:
    if not x.is_cuda:
        y: Tensor = type(self).forward(self, x)
        return y
    from liger_kernel.ops import LigerRMSNormFunction  # type: ignore[import-not-found]

    y = LigerRMSNormFunction.apply(x, self.weight, self.variance_epsilon, 0.0, "llama", False)
    return y


def _swiglu(self: Any, x: Tensor) -> Tensor:
    if not x.is_cuda:
        y: Tensor = type(self).forward(self, x)
        return y
    from liger_kernel.ops import LigerSiLUMulFunction

    y = self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))
    return y


def _rotary(plain: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
    if not q.is_cuda or args or kwargs:
        return plain(q, k, cos, sin, *args, **kwargs)
    from liger_kernel.ops import LigerRopeFunction

    return LigerRopeFunction.apply(q, k, cos, sin)


def is_fused(model: nn.Module) -> bool:
    """Whether ``fuse`` has changed this model."""
    return any(
        isinstance(forward := vars(module).get("forward"), MethodType) and forward.__func__ is _norm
        for module in model.modules()
    )
