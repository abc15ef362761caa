"""Operation sequences of other implementations, written from their descriptions, to compare ours with.

``PaperRaSA``  RaSA in the order of operations of the paper's implementation: casts, dropout, two concatenations per
               forward pass, the mixing vector applied to tokens x ranks, and an in-place sum into the base's output.
``PerLinear``  LoRA as one hand-written autograd function per linear, as in unsloth: the forward pass keeps only x,
               and the backward pass recomputes x A^T and dY B where it needs them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..adapters.site import by_kind
from ..adapters.sites import find_sites
from ..methods.lora import LoRA
from ..methods.rasa import RaSA


class PaperPool(nn.Module):
    """The pool of one kind: A_S (L k x in) and B_S (out x L k)."""

    def __init__(self, base: nn.Linear, ranks: int) -> None:
        super().__init__()
        self.A_S = _parameter(base, ranks, base.in_features)
        self.B_S = _parameter(base, base.out_features, ranks)


class PaperRaSA(nn.Module):
    """A linear with RaSA as in the paper's implementation."""

    def __init__(self, base: nn.Linear, method: RaSA, pool: PaperPool) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        private = method.r - method.k
        self.A = _parameter(base, private, base.in_features)
        self.B = _parameter(base, base.out_features, private)
        self.d = _parameter(base, private + len(pool.A_S))
        self.dropout = nn.Dropout(method.dropout) if method.dropout else nn.Identity()
        object.__setattr__(self, "pool", pool)  # registered once, at the root of the model

    pool: PaperPool

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        dropped = self.dropout(x.to(self.A.dtype))
        A = torch.cat([self.A, self.pool.A_S])
        B = torch.cat([self.B, self.pool.B_S], 1)
        y += F.linear(F.linear(dropped, A) * self.d, B)
        return y


class PerLinear(nn.Module):
    """A linear with LoRA as one autograd function."""

    def __init__(self, base: nn.Linear, method: LoRA) -> None:
        super().__init__()
        self.weight, self.bias, self.scale = base.weight, base.bias, method.scale
        self.A = _parameter(base, method.r, base.in_features)
        self.B = _parameter(base, base.out_features, method.r)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _PerLinear.apply(x, self.weight, self.bias, self.A, self.B, self.scale)  # type: ignore[no-untyped-call]
        return y


class _PerLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = F.linear(rows, weight, bias)
        y.addmm_(rows @ A.t(), B.t(), alpha=scale)
        ctx.save_for_backward(rows, weight, A, B)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1])
        dA, dB = torch.empty_like(A.t()), torch.empty_like(B.t())
        dA.addmm_(x.t(), dy @ B, alpha=ctx.scale, beta=0)
        dB.addmm_((x @ A.t()).t(), dy, alpha=ctx.scale, beta=0)
        dx = dy @ weight
        dx.addmm_(dy @ B, A, alpha=ctx.scale)
        return dx.view(ctx.shape), None, None, dA.t(), dB.t(), None


def place_paper_rasa(model: nn.Module, method: RaSA) -> dict[str, nn.Parameter]:
    """Replace the linears of ``model``. Returns the parameters by the names that our implementation gives them."""
    pools = nn.ModuleDict()
    parameters: dict[str, nn.Parameter] = {}
    for kind, sites in by_kind(find_sites(model)).items():
        pools[kind] = pool = PaperPool(_linear(model, sites[0].path), method.k * len(sites))
        parameters |= {f"pools.{kind}.{name}": p for name, p in pool.named_parameters()}
        for site in sites:
            module = PaperRaSA(_linear(model, site.path), method, pool)
            model.set_submodule(site.path, module)
            parameters |= {f"{site.path}.{name}": getattr(module, name) for name in ("A", "B", "d")}
    model.add_module("pools", pools)
    return parameters


def place_per_linear(model: nn.Module, method: LoRA) -> dict[str, nn.Parameter]:
    """Replace the linears of ``model``. Returns the parameters by the names that our implementation gives them."""
    parameters: dict[str, nn.Parameter] = {}
    for site in find_sites(model):
        module = PerLinear(_linear(model, site.path), method)
        model.set_submodule(site.path, module)
        parameters |= {f"{site.path}.{name}": getattr(module, name) for name in ("A", "B")}
    return parameters


def _linear(model: nn.Module, path: str) -> nn.Linear:
    module = model.get_submodule(path)
    assert isinstance(module, nn.Linear)
    return module


def _parameter(base: nn.Linear, *shape: int) -> nn.Parameter:
    return nn.Parameter(base.weight.new_zeros(shape))
