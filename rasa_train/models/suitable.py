"""Checks of a base that need no weights: whether it is a causal language model in a format that can be trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import UserError
from .families import end_tokens, most_tokens

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TRAINABLE = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")
"""Formats of quantised checkpoints that adapters are trained on: their linears compute gradients of their input."""


def quantization_of(architecture: PretrainedConfig) -> str | None:
    """Return the format of a checkpoint that is stored quantised, as its ``quantization_config`` names it; None for one
    that is not."""
    text = architecture.get_text_config()
    found: Any = getattr(architecture, "quantization_config", None) or getattr(text, "quantization_config", None)
    if not found:
        return None
    values = found if isinstance(found, dict) else found.to_dict()
    if not values.get("quant_method") and (values.get("load_in_4bit") or values.get("load_in_8bit")):
        return "bitsandbytes"
    method = values.get("quant_method") or "unknown"
    return str(getattr(method, "value", method))


def check_quantization(architecture: PretrainedConfig, name: str) -> None:
    """Raise ``UserError`` if the checkpoint ``name`` is stored in a quantised format that adapters cannot be trained
    on. Checkpoints of bitsandbytes can be trained on, if bitsandbytes is installed."""
    method = quantization_of(architecture)
    if method is None:
        return
    if method not in TRAINABLE:
        raise UserError(
            f"model.name: {name} is stored quantised ({method}), and adapters cannot be trained on that. Give the "
            "original checkpoint in bfloat16; to save memory, set model.quantization: nf4 (or fp8)",
            key="model.name",
        )
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UserError(
            f"model.name: {name} is stored quantised by bitsandbytes, which is not installed: pip install "
            "bitsandbytes, or give the original checkpoint",
            key="model.name",
        ) from None


def looks_quantized(tensor: str) -> bool:
    """Whether a tensor of this name belongs to quantised weights: their scales, zeros or packed values."""
    last = tensor.rpartition(".")[2]
    return bool(re.search(r"scale|zeros?$|absmax|quant|g_idx|_packed$|_blocks$", last))


def check_causal(model: nn.Module) -> None:
    """Raise ``UserError`` if the attention of a language model is bidirectional, as in BERT: each token would see the
    token that it is trained to predict. ``training.proof`` finds the models whose modules do not show it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

    from .families import text_layers

    if not isinstance(model, PreTrainedModel) or type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return  # the attention of some vision-language models is causal by its mask alone
    layers = [module for layers in text_layers(model).values() for module in layers.modules()]
    kinds = {bool(module.is_causal) for module in layers if hasattr(module, "is_causal")}
    if kinds == {False}:
        raise not_causal(type(model).__name__)


def check_vocabulary(model: nn.Module, name: str, largest: int) -> None:
    """Raise ``UserError`` if the data have a token that the embedding of the model has no row for.

    Args:
        name: name of the model in the recipe.
        largest: largest token id of the data.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator, union-attr]
    if largest >= rows:
        raise UserError(
            f"model.name: the data have the token id {largest}, but the embedding of {name} has {rows} rows: its "
            "tokenizer has more tokens than the model, perhaps because tokens were added to the tokenizer alone. Give "
            "the tokenizer that the model was trained with (model.tokenizer), or a model whose embedding was resized",
            key="model.name",
        )


def end_notes(model: nn.Module, tokenizer: Any, ends: Sequence[str] | None) -> list[str]:
    """Return a note if a server would go on behind the token that is trained as the end of a turn.

    Args:
        tokenizer: the tokenizer of the model, or None.
        ends: the special tokens that end a turn in the chat template, if they are known.
    """
    if not ends or tokenizer is None:
        return []
    stops = [*tokenizer.convert_ids_to_tokens(end_tokens(model)), tokenizer.eos_token]
    if not set(ends).isdisjoint(map(str, stops)):
        return []
    named = " and ".join(sorted({repr(str(token)) for token in stops if token is not None})) or "no token"
    return [
        f"the chat template ends a turn with {ends[0]!r}, but the model stops at {named} (eos_token_id of its "
        f"generation_config.json, eos_token of its tokenizer): serve the merged model with {ends[0]!r} as a stop "
        "token, or add its id to eos_token_id"
    ]


def check_length(model: nn.Module, name: str, longest: int) -> None:
    """Raise ``UserError`` if a text to classify is longer than the model can read.

    Args:
        name: name of the model in the recipe.
        longest: tokens of the longest text.
    """
    most = most_tokens(model)
    if most is not None and longest > most:
        raise UserError(
            f"data.max_length: the longest text has {longest} tokens, and {name} has learned positions for {most}; set "
            f"data.max_length: {most}",
            key="data.max_length",
        )


def not_causal(name: str) -> UserError:
    return UserError(
        f"model.name: {name} is not a causal language model: its tokens see the tokens that follow, so training to "
        "predict the next token would show it the answer. Give a decoder, or set task: classification to train a "
        "classifier",
        key="model.name",
    )
