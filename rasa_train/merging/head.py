"""The head of a classifier in what a merge or an export writes: its tensors, its names and its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..adapters.contract import PeftConfig
from ..io.checkpoint_files import Stored
from ..models.classifier import head_config, head_of, head_parameters
from ..models.words import own_parameters
from . import new_rows
from .names import Piece
from .source import Source


def names_in_output(source: Source, stored: Mapping[str, Stored], pieces: Mapping[str, Piece]) -> dict[str, str]:
    """Return the name in the output of each tensor of the base's files. A classifier's files have no tensors of another
    model (an LM head, or a head of another shape), and all names have the prefix of its encoder."""
    if source.head is None:
        return {name: name for name in stored}
    shapes = {name: tuple(p.shape) for name, p in head_parameters(source.model).items()}
    fits = {n: p for n, p in pieces.items() if shapes.get(p.parameter, stored[n].shape) == stored[n].shape}
    return {name: piece.parameter if piece.whole else name for name, piece in fits.items()}


def new_tensors(source: Source, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the tensors of the head that the base's files do not have, by the name of the parameter."""
    there = set(names.values())
    return {n: t for n, t in source.replaced.items() if n in head_parameters(source.model) and n not in there}


def describe(config: dict[str, Any], model: PreTrainedModel) -> None:
    """Describe a classifier in the contents of a ``config.json``."""
    config |= {"architectures": [type(model).__name__], **head_config(head_of(model.config))}
    pad = model.config.get_text_config().pad_token_id
    text = config.get("text_config")
    (text if isinstance(text, dict) else config).setdefault("pad_token_id", pad)
    for place in (config, text):
        if isinstance(place, dict) and place.get("pad_token_id", pad) is None:
            place["pad_token_id"] = pad


def for_peft(source: Source) -> tuple[dict[str, Tensor], PeftConfig]:
    """Return the tensors of the head and of new words by PEFT's names, fp32, and the keys of PEFT's configuration that
    say what the model is for and what these tensors are."""
    rows, of_rows = new_rows.for_peft(source)
    if source.head is None:
        return rows, {"task_type": "CAUSAL_LM", "inference_mode": True, **of_rows}
    prefix = f"{source.model.base_model_prefix}."
    head = {name: source.replaced[name] for name in head_parameters(source.model)}
    inside = {prefix + name.removeprefix(prefix).partition(".")[0] for name in head if name.startswith(prefix)}
    whole = inside | {name.partition(".")[0] for name in head if not name.startswith(prefix)}
    tensors = {f"base_model.model.{name}": tensor.detach().float().contiguous() for name, tensor in head.items()}
    whole |= set(of_rows.get("modules_to_save") or ())
    return tensors | rows, {**of_rows, "task_type": "SEQ_CLS", "modules_to_save": sorted(whole), "inference_mode": True}


def others_replaced(source: Source) -> list[str]:
    """Return the names of trained parameters of the base that are not its head's and no rows of new words."""
    return sorted(source.replaced.keys() - head_parameters(source.model).keys() - own_parameters(source.model).keys())
