"""The frozen weights of adapted linears in 8 or 4 bits. Adapters, and merging (which reads the base's own files), work
as with any other base.

``fp8``  for speed: both products of a step, x W^T and dy W, use 8-bit matrix units, with one scale for each row of the
         left operand (computed in each call) and of the right operand (computed once). Both layouts of W are kept, so
         the memory is that of a 16-bit W.
``nf4``  for GPUs with little memory: 4-bit NormalFloat in blocks of 64 (Dettmers et al. 2023, arXiv 2305.14314), by
         bitsandbytes; W is unpacked to the model's dtype for each product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import UserError

Base = Literal["fp8", "nf4"]
FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max


class Narrow(nn.Module, ABC):
    """A frozen W (out, in) in fewer bits than ``dtype``, which is the dtype of its products."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.dtype, self.shape = weight.dtype, tuple(weight.shape)

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def dense(self) -> Tensor:
        """Return W (out, in) with the values that products use, in ``dtype``."""

    def ready(self, x: Tensor) -> Any:
        """Return x (tokens, in) in the form that ``product`` needs, which all linears of one format can share."""
        return x

    @abstractmethod
    def product(self, ready: Any) -> Tensor:
        """Return x W^T, given ``ready(x)``."""

    @abstractmethod
    def gradient(self, dy: Tensor) -> Tensor:
        """Return dy W for dy (tokens, out)."""


class Fp8(Narrow):
    rows: Tensor
    row_scales: Tensor
    columns: Tensor
    column_scales: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        if any(size % 16 for size in weight.shape):
            raise UserError(
                f"model.quantization: fp8 needs linears whose sides are multiples of 16, got {tuple(weight.shape)}",
                key="model.quantization",
            )
        for name, matrix in (("row", weight), ("column", weight.t().contiguous())):
            narrow, scales = to_fp8(matrix)
            self.register_buffer(f"{name}s", narrow, persistent=False)
            self.register_buffer(f"{name}_scales", scales, persistent=False)

    def dense(self) -> Tensor:
        return (self.rows.float() * self.row_scales).to(self.dtype)

    def ready(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return to_fp8(x)

    def product(self, ready: tuple[Tensor, Tensor]) -> Tensor:
        return self._scaled(*ready, self.rows, self.row_scales)

    def gradient(self, dy: Tensor) -> Tensor:
        return self._scaled(*to_fp8(dy), self.columns, self.column_scales)

    def _scaled(self, left: Tensor, left_scales: Tensor, right: Tensor, scales: Tensor) -> Tensor:
        if not left.is_cuda and not _takes_row_scales(left.device):
            one = torch.ones((), device=left.device)
            result = torch._scaled_mm(left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
            return result.mul_(left_scales).mul_(scales.t()).to(self.dtype)
        out = self.dtype if self.dtype != torch.float32 else torch.bfloat16
        # Sums within a product have the matrix units' own precision (about 14 bits), which is finer than the operands
        # and twice as fast on Hopper; the flag has no effect on other devices.
        result = torch._scaled_mm(
            left, right.t(), scale_a=left_scales, scale_b=scales.t(), out_dtype=out, use_fast_accum=left.is_cuda
        )
        return result.to(self.dtype)


@cache
def _takes_row_scales(device: torch.device) -> bool:
    """Return whether torch's fp8 product takes a scale for each row on ``device``. It does on GPUs; on the CPU,
    torch 2.11 takes one scale for a whole matrix."""
    rows, scales = torch.zeros(16, 16, dtype=FP8, device=device), torch.ones(16, 1, device=device)
    try:
        torch._scaled_mm(rows, rows.t(), scale_a=scales, scale_b=scales.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


class Nf4(Narrow):
    packed: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        import bitsandbytes.functional as bnb

        packed, self.state = bnb.quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
        self.register_buffer("packed", packed, persistent=False)

    def dense(self) -> Tensor:
        import bitsandbytes.functional as bnb

        dense: Tensor = bnb.dequantize_4bit(self.packed, self.state)
        return dense.to(self.dtype)

    def product(self, ready: Tensor) -> Tensor:
        return F.linear(ready, self.dense())

    def gradient(self, dy: Tensor) -> Tensor:
        return dy @ self.dense()


def to_fp8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of a matrix (m, n) in fp8, and their scales (m, 1), fp32: row = narrow * scale."""
    scales = matrix.abs().amax(1, keepdim=True).float().clamp_(min=1e-12).div_(LARGEST)
    return (matrix / scales).to(FP8), scales


def products(x: Tensor, weights: Iterable[Tensor | Narrow], biases: Iterable[Tensor | None]) -> Iterator[Tensor]:
    """Yield x W_i^T + bias_i (tokens, out_i) for each i, each as a new tensor. x is made ready once for all W_i, which
    must have one format."""
    ready = None
    for weight, bias in zip(weights, biases, strict=True):
        if not isinstance(weight, Narrow):
            yield F.linear(x, weight, bias)
            continue
        ready = weight.ready(x) if ready is None else ready
        y = weight.product(ready)
        yield y if bias is None else y.add_(bias)


def add_gradient(dx: Tensor | None, dy: Tensor, weight: Tensor | Narrow) -> Tensor:
    """Return dx + dy W, computed in place if there is a dx."""
    if isinstance(weight, Narrow):
        return weight.gradient(dy) if dx is None else dx.add_(weight.gradient(dy))
    return dy @ weight if dx is None else dx.addmm_(dy, weight)


@contextmanager
def full_sums() -> Iterator[None]:
    """Make cuBLAS add up the parts of a bf16 product in fp32. The gradient of a factor has few rows and sums over all
    tokens, so cuBLAS tends to compute it in parts; by default it may round the sum of each part to bf16."""
    flags = torch.backends.cuda.matmul
    before = flags.allow_bf16_reduced_precision_reduction
    flags.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        flags.allow_bf16_reduced_precision_reduction = before


def narrow(weight: Tensor, base: Base) -> Narrow:
    """Return W (out, in) in the format ``base``.

    Raises:
        UserError: the device does not support the format, a package is missing, or the shape of W does not fit.
    """
    if base == "nf4" and find_spec("bitsandbytes") is None:
        raise UserError(
            "model.quantization: nf4 needs bitsandbytes; install it with `pip install bitsandbytes`",
            key="model.quantization",
        )
    if base == "fp8" and weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 9):
        name = torch.cuda.get_device_name(weight.device)
        raise UserError(
            f"model.quantization: fp8 needs a GPU with 8-bit matrix units (Ada, Hopper), got {name}",
            key="model.quantization",
        )
    return Fp8(weight) if base == "fp8" else Nf4(weight)


class NarrowLinear(torch.autograd.Function):
    """The product x W^T for x (..., in), differentiable in x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Narrow) -> Tensor:
        ctx.weight = weight
        return weight.product(weight.ready(x.reshape(-1, x.shape[-1]))).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.weight.gradient(dy.reshape(-1, dy.shape[-1])).view(*dy.shape[:-1], -1), None


def is_bitsandbytes(module: nn.Module) -> bool:
    """Whether a linear comes from a checkpoint that bitsandbytes has quantised."""
    return type(module).__module__.startswith("bitsandbytes.")


def dequantized(module: Any) -> Tensor:
    """Return W (out, in) of such a linear, in 4 or 8 bits, in the dtype that bitsandbytes computes with."""
    from bitsandbytes import functional

    weight = module.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        whole: Tensor = functional.dequantize_4bit(weight.data, state)
        return whole
    values, scales = (weight.CB, weight.SCB) if weight.CB is not None else (module.state.CB, module.state.SCB)
    whole = functional.int8_vectorwise_dequant(weight.data if values is None else values, scales)
    return whole
