"""Check whether sequences can share a row without padding, and switch a model to attention that keeps them apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..kernels.varlen_attention import NAME
from .classifier import is_classifier

KINDS = {"full_attention", "sliding_attention"}


def check_packable(model: PreTrainedModel) -> None:
    """Raise ``UserError`` if sequences of the model cannot share a row. The check does not need weights."""
    config = model.config.get_text_config()
    values = config.to_dict()
    if is_classifier(model):
        raise UserError(
            "training.batching: classifiers are trained with padding, because each text of a row has its own output; "
            "set training.batching to length-grouped or shuffled, and training.padding_free to false",
            key="training.batching",
        )
    others = set(values.get("layer_types") or []) - KINDS
    if not model.is_backend_compatible():
        why = "its attention cannot be replaced"
    elif others or values.get("is_hybrid"):
        why = f"it has layers other than full and sliding attention ({', '.join(sorted(others)) or 'recurrent'})"
    elif values.get("attn_logit_softcapping"):
        why = "its attention has soft caps"
    elif values.get("alibi"):
        why = "it encodes positions with ALiBi"
    else:
        return
    raise UserError(
        f"training.batching: {config.model_type} cannot be trained without padding: {why}; set "
        "training.batching to length-grouped or shuffled, and training.padding_free to false",
        key="training.batching",
    )


def use_varlen(model: PreTrainedModel) -> None:
    """Let ``model`` attend within each sequence of a row. A model that is set to use flash attention keeps it, because
    flash attention reads the same arguments.

    Raises:
        UserError: the model's attention cannot keep sequences of one row apart.
    """
    check_packable(model)
    usual = str(model.config._attn_implementation)
    if "flash" not in usual:
        _usual[model] = usual
        model.set_attn_implementation(NAME)


_usual: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""The attention that models had before ``use_varlen``."""


@contextmanager
def padded(model: nn.Module) -> Iterator[None]:
    """Let ``model`` attend to padded sequences again inside the block, as generation needs."""
    flat = isinstance(model, PreTrainedModel) and model.config._attn_implementation == NAME
    if isinstance(model, PreTrainedModel) and flat:
        model.set_attn_implementation(_usual.get(model, "sdpa"))
    try:
        yield
    finally:
        if isinstance(model, PreTrainedModel) and flat:
            model.set_attn_implementation(NAME)
