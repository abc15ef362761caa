"""The section ``model:`` of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, field_validator

from ..kernels.quantized_weight import Base


class ModelConfig(BaseModel):
    """Section ``model:`` of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    name: str
    """A hub id or a local directory in the transformers format; ``demo`` is the tiny Llama that comes with this
    package."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype in which the frozen base is held and computes. Adapter parameters are always fp32."""
    quantization: Literal["none", Base] = "none"
    """Format in which the frozen linears with adapters are held. ``none``: that of ``dtype``. ``fp8``: for speed, on
    GPUs with 8-bit matrix units. ``nf4``: 4 bits, for GPUs with little memory (needs bitsandbytes). Adapters are
    trained in the same way with every format, and merging reads the original weights. ``fp8`` and ``nf4`` need
    ``distributed.strategy: ddp``."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation; ``auto`` is the choice of transformers (sdpa where the model supports it)."""
    tokenizer: str | None = None
    """Hub id or directory of the tokenizer, if the tokenizer is not stored with the model."""
    trust_remote_code: bool = False
    """Run code that comes with the model. For a hub id this needs ``revision``, so that only code that somebody has
    read is run."""

    @field_validator("name")
    @classmethod
    def _shipped(cls, name: str) -> str:
        return str(Path(__file__).parents[1] / "demo" / "model") if name == "demo" else name


def torch_dtype(config: ModelConfig) -> torch.dtype:
    dtype = getattr(torch, config.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype
