"""Sequence classifiers: the class that opens a base as one, its configuration, and the tensors of its head."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UserError, shown, some
from .task import Head, Problem

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_log = logging.getLogger(__name__)

PROBLEMS: dict[Problem, str] = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
"""The ``problem_type`` in the ``config.json`` of a classifier, by the problem in a recipe."""
POOLS = "pools"
"""Name of the module at the root of an adapted model that holds the tensors that its layers share."""
POOLERS = ("pooler", "pooling_layer")
"""Names of modules of an encoder that only a classifier on top of it uses, and that are trained with the head."""


def can_classify(architecture: PretrainedConfig) -> bool:
    """Whether transformers has a sequence classifier of this architecture that reads one text."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    return type(architecture) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and not architecture.is_encoder_decoder


def classifier_class(architecture: PretrainedConfig, name: str) -> Any:
    """Return the class of transformers that opens a base as a sequence classifier.

    Raises:
        UserError: transformers has none of this architecture, or it has a decoder beside its encoder.
    """
    from transformers import AutoModelForSequenceClassification

    if not can_classify(architecture):
        what = "an encoder and a decoder" if architecture.is_encoder_decoder else "no sequence classifier"
        raise UserError(
            f"task: {name} is a model of the type {architecture.model_type!r}, which has {what} in transformers; "
            "task: classification needs an encoder (BERT, RoBERTa, DeBERTa, ModernBERT, ELECTRA) or a decoder (Llama, "
            "Qwen, GPT-2)",
            key="task",
        )
    return AutoModelForSequenceClassification


def set_head(architecture: PretrainedConfig, head: Head, pad: int | None) -> None:
    """Describe the head in the configuration of a classifier, as a merged checkpoint keeps it.

    Args:
        pad: token that fills texts up, for a configuration that names none: decoders are read at the last token that is
            another one.
    """
    for key, value in head_config(head).items():
        setattr(architecture, key, value)
    text = architecture.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = pad


def head_config(head: Head) -> dict[str, Any]:
    """Return the keys of a ``config.json`` that describe a head. A regression has the one label ``LABEL_0``, as with
    transformers."""
    labels = head.labels or ("LABEL_0",)
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
        "problem_type": PROBLEMS[head.problem],
    }


def head_of(architecture: PretrainedConfig) -> Head:
    """Return the head that the configuration of a classifier describes; one without a ``problem_type`` chooses a
    label, or gives a number if it has one output."""
    labels = tuple(str(label) for _, label in sorted((architecture.id2label or {}).items()))
    problem = next((p for p, kind in PROBLEMS.items() if kind == architecture.problem_type), None)
    if problem is None:
        problem = "regression" if len(labels) == 1 else "single_label"
    return Head(() if problem == "regression" and len(labels) == 1 else labels, problem)


def stored_head(architecture: PretrainedConfig) -> Head | None:
    """Return the head of a checkpoint that is a classifier, or an encoder of which transformers has no causal language
    model; None for any other."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    names = architecture.architectures or []
    named = any(name.endswith("ForSequenceClassification") for name in names)
    if can_classify(architecture) and (named or type(architecture) not in MODEL_FOR_CAUSAL_LM_MAPPING):
        return head_of(architecture)
    return None


def is_classifier(model: nn.Module) -> bool:
    """Whether a model is a sequence classifier of transformers."""
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel) and type(model).__name__.endswith("ForSequenceClassification")


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a classifier's head by name: all outside of its encoder or decoder, and the pooler; none
    for a model that is not a classifier."""
    if not is_classifier(model):
        return {}
    prefix = f"{model.base_model_prefix}."
    poolers = tuple(f"{prefix}{name}." for name in POOLERS)
    other = (prefix, f"{POOLS}.")
    return {n: p for n, p in model.named_parameters() if not n.startswith(other) or n.startswith(poolers)}


HELD = "rasa_train_held"
"""Name of the attribute of a module of a head that is held in fp32: its hook, and the dtype that it had."""


def hold_head(model: nn.Module) -> None:
    """Hold the head of a classifier in fp32, and give it its input in fp32, whatever the dtype of the base."""
    for path in dict.fromkeys(name.rpartition(".")[0] for name in head_parameters(model)):
        module = model.get_submodule(path)
        if (dtype := next(module.parameters(recurse=False)).dtype) != torch.float32:
            setattr(module.float(), HELD, (module.register_forward_pre_hook(_in_fp32), dtype))


def release_head(model: nn.Module) -> None:
    """Undo ``hold_head``: the values of the head are rounded to the dtype that it had."""
    for module in model.modules():
        if (held := module.__dict__.pop(HELD, None)) is not None:
            handle, dtype = held
            handle.remove()
            module.to(dtype)


def _in_fp32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


@torch.no_grad()
def draw_head(model: PreTrainedModel, names: Iterable[str], seed: int) -> None:
    """Draw these parameters of a head as transformers does, from a generator with this seed: all workers draw the same
    values, and the random state of the process stays as it is."""
    names = set(names)
    owners = {name[:end] for name in names for end, dot in enumerate(name) if dot == "."}
    for path, module in model.named_modules():
        module._is_hf_initialized = path not in owners and path != ""  # type: ignore[assignment]
    for tensors in (model.named_parameters(), model.named_buffers()):
        for name, tensor in tensors:
            tensor._is_hf_initialized = name not in names  # type: ignore[attr-defined]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.initialize_weights()


def check_head(name: str, report: dict[str, Any], model: nn.Module, *, quiet: bool) -> set[str]:
    """Take the tensors of a head out of the report of what was loaded, and say which head the model has. Returns the
    names of those that are new: the files lack them, or hold them in another shape."""
    parameters = head_parameters(model)
    missing = {key for key in report["missing_keys"] if key in parameters}
    reshaped = {key for key, _, _ in report["mismatched_keys"] if key in parameters}
    report["missing_keys"] = set(report["missing_keys"]) - missing
    report["mismatched_keys"] = [entry for entry in report["mismatched_keys"] if entry[0] not in reshaped]
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    report["unexpected_keys"] = {key for key in report["unexpected_keys"] if key.startswith(prefix)}  # an LM head
    if reshaped and not quiet:
        _log.warning(
            "model.name: the head of %s has another shape (%s): these tensors are drawn anew",
            name,
            shown(some(sorted(reshaped))),
        )
    elif not missing and not quiet:
        _log.info("model.name: training goes on from the classification head of %s", name)
    return missing | reshaped
