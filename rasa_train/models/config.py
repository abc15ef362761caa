"""The section ``model:`` of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from ..errors import UserError
from ..kernels.quantized_weight import Base

Embeddings = Literal["new", "all", "none"]
"""Which rows of the embedding and of the head are trained."""


class NewToken(BaseModel):
    """A word that is added to the vocabulary; a text is short for ``{token: <the text>}``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    token: str
    """The text of the word, which becomes one token wherever it stands."""
    special: bool = False
    """Whether the word is a special token, which is left out where a text is decoded without special tokens."""

    @model_validator(mode="before")
    @classmethod
    def _by_text(cls, values: Any) -> Any:
        return {"token": values} if isinstance(values, str) else values


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
    add_tokens: list[NewToken] = []
    """Words to add to the vocabulary: texts, or ``{token: "<tool>", special: true}``. Their rows of the embedding and
    of the head start at the mean of the rows of the pieces that the tokenizer divided the word into before."""
    train_embeddings: Embeddings | None = None
    """Which rows of the embedding and of the head are trained. ``new``: those of ``add_tokens``; ``all``: all rows;
    ``none``: no row. The default is ``new`` with ``add_tokens``, and ``none`` without."""

    @field_validator("name")
    @classmethod
    def _shipped(cls, name: str) -> str:
        return str(Path(__file__).parents[1] / "demo" / "model") if name == "demo" else name

    @property
    def trained_embeddings(self) -> Embeddings:
        """Which rows of the embedding and of the head are trained, with the default in place."""
        return self.train_embeddings or ("new" if self.add_tokens else "none")

    @model_validator(mode="after")
    def _check_tokens(self) -> Self:
        texts = [new.token for new in self.add_tokens]
        if "" in texts:
            raise UserError(
                f"model.add_tokens: the {texts.index('') + 1}. word is an empty text; leave it out",
                key="model.add_tokens",
            )
        if twice := [text for text in texts if texts.count(text) > 1]:
            raise UserError(f"model.add_tokens names {twice[0]!r} twice; name each word once", key="model.add_tokens")
        if self.train_embeddings == "new" and not texts:
            raise UserError(
                "model.train_embeddings: new trains the rows of model.add_tokens, and there are none; name the words, "
                "or use all or none",
                key="model.train_embeddings",
            )
        return self


def torch_dtype(config: ModelConfig) -> torch.dtype:
    dtype = getattr(torch, config.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype
