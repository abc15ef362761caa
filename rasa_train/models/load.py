"""The base model and its tokenizer, with real weights for training or on the meta device for counting and planning."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import process
from ..errors import UserError, shown, some
from ..io.checkpoint_files import INDEX
from ..io.model_dir import check_files
from .classifier import can_classify, check_head, classifier_class, draw_head, set_head
from .config import ModelConfig, torch_dtype
from .declared import bounded_modules, check_config, check_sizes, reading, stored_sizes
from .suitable import check_causal, check_quantization, looks_quantized, quantization_of
from .task import Head
from .vocabulary import Words, add_to
from .words import put

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

_log = logging.getLogger(__name__)


def load_config(config: ModelConfig, head: Head | None = None) -> PretrainedConfig:
    """Return the architecture: with ``head``, that of a classifier. Raises ``UserError`` if the model does not exist or
    transformers does not know it."""
    _check_name(config.name, "model.name")
    _check_remote_code(config)
    _check_directory(config.name, config.revision)
    check_no_adapter(config.name)
    from transformers import AutoConfig

    architecture: PretrainedConfig = _from_hub(AutoConfig.from_pretrained, config.name, config, key="model.name")
    if head is not None:
        set_head(architecture, head, _padding(architecture, config))
    return architecture


def _padding(architecture: PretrainedConfig, config: ModelConfig) -> int | None:
    """Return a token that can fill up texts, for a model whose configuration names none: the tokenizer's, or else the
    one that ends a text."""
    text = architecture.get_text_config()
    if getattr(text, "pad_token_id", None) is not None:
        return None
    tokenizer = load_tokenizer(config)
    ends = text.eos_token_id
    found = [getattr(tokenizer, "pad_token_id", None), ends[0] if isinstance(ends, list) else ends, 0]
    return int(next(token for token in found if token is not None))


def check_no_adapter(name: str) -> None:
    """Raise ``UserError`` if a model's directory holds an adapter of PEFT, which transformers would load unasked."""
    beside = Path(name) / "adapter_config.json"
    if os.path.isfile(beside):  # False where the directory may not be read, which is reported when the base is opened
        raise UserError(
            f"model.name: {name} holds a whole model and an adapter for it ({beside.name}), and transformers would "
            "load both: move the adapter's files to another directory. To go on from the model with the adapter in it, "
            "merge them first with rasa-merge",
            key="model.name",
        )


def load_model(config: ModelConfig, head: Head | None = None, seed: int = 0) -> PreTrainedModel:
    """Load the base with its weights, in ``config.dtype``, in eval mode, on the CPU.

    Args:
        head: the head of a classifier; None for a causal language model. The files' own head is kept if it has the
            same shape.
        seed: seed from which a new head is drawn.
    Raises:
        UserError: the files lack a weight of the model, or hold one in another shape. For a classifier this does not
            concern its head.
    """
    model, new = _opened(config, head, quiet=not sys.stderr.isatty() or process.rank() > 0)
    if new:
        draw_head(model, new, seed)
    put(model, load_words(config), config.name)
    return model


def check_base(config: ModelConfig, head: Head | None = None) -> PreTrainedModel:
    """Open the base as ``load_model`` does, but on the meta device: the names and shapes of its weights are compared
    with the model's, and no weight is read. Returns the model. Weights that are not on this machine are not compared.

    Raises:
        UserError: ``load_model`` would raise it, or the model is not a causal language model (without ``head``).
    """
    architecture = load_config(config, head)
    check_quantization(architecture, config.name)
    here = has_weights(config) and (Path(config.name).is_dir() or _is_cached(config))
    if quantization_of(architecture):  # bitsandbytes cannot open its weights on the meta device
        here = False
    try:
        model = _opened(config, head, quiet=True, device_map="meta")[0] if here else meta_model(config, head)
    except UserError:
        if head is None:  # an encoder's files lack an LM head, which is not what is wrong with it
            check_causal(meta_model(config))
        raise
    if head is None:
        check_causal(model)
    if here:
        put(model, load_words(config), config.name)
    return model


def _opened(config: ModelConfig, head: Head | None, *, quiet: bool, **options: Any) -> tuple[PreTrainedModel, set[str]]:
    """Open the base with ``from_pretrained`` and look at its report of what was loaded. ``quiet``: without a bar.
    Returns the model, and the names of its parameters that the files do not have: only those of a head."""
    from transformers.utils import logging as transformers_logging

    architecture = load_config(config, head)
    if Path(config.name).is_dir() and not has_weights(config):
        raise UserError(f"model.name: {config.name} has a config.json but no *.safetensors weights", key="model.name")
    sizes = _check_stored(config, architecture, head)
    shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    if quiet:
        transformers_logging.disable_progress_bar()
    if head is not None:  # its missing weights are no news, and ``check_head`` says what is
        transformers_logging.set_verbosity_error()
    with bounded_modules(config.name, sizes):
        model, report = _from_hub(
            _auto_class(architecture, config, head).from_pretrained,
            config.name,
            config,
            key="model.name",
            config=architecture,
            dtype=torch_dtype(config),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report has them all; transformers would raise an error about the first
            **_attention(config),
            **options,
        )
    if shown:
        transformers_logging.enable_progress_bar()
    transformers_logging.set_verbosity(verbosity)
    silent = "device_map" in options or process.rank() > 0
    new = set() if head is None else check_head(config.name, report, model, quiet=silent)
    _check_report(config.name, report)
    return model, new


def _check_report(name: str, report: dict[str, Collection[Any]]) -> None:
    """Refuse a base of which weights are missing, since transformers has drawn them at random, and name the tensors of
    its files that the model does not use."""
    missing = sorted(report["missing_keys"])
    shapes = [f"{key} is {tuple(there)}, not {tuple(wanted)}" for key, there, wanted in report["mismatched_keys"]]
    unexpected = sorted(report["unexpected_keys"])
    if missing or shapes:
        what = [f"the files lack {some(missing)}"] if missing else []
        what += [f"the shape of {some(sorted(shapes))}"] if shapes else []
        extra = f"; they hold {some(unexpected)}, which the model does not have" if unexpected else ""
        raise UserError(
            f"model.name: {name} is not a whole checkpoint of the model in its config.json: {', and '.join(what)}"
            f"{extra}. Training would start from random values there. Give a complete checkpoint of this model, "
            "or correct config.json",
            key="model.name",
        )
    if scales := [key for key in unexpected if looks_quantized(key)]:
        raise UserError(
            f"model.name: {name} holds {some(scales)}: its weights are quantised, but its config.json has no "
            "quantization_config, so they would be read without their scales. Give the original weights",
            key="model.name",
        )
    if unexpected and process.rank() == 0:
        _log.warning("model.name: %s holds tensors that the model does not use: %s", name, shown(some(unexpected)))


def meta_model(config: ModelConfig, head: Head | None = None) -> PreTrainedModel:
    """Return a model of the same architecture on the meta device: names and shapes without memory."""
    sizes = _stored_sizes(config)
    with torch.device("meta"):
        model = _from_config(config, head, sizes)
        if sizes is not None and not quantization_of(model.config):
            check_sizes(model, config.name, sizes)
    put(model, load_words(config), config.name)
    return model


def tied_groups(model: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that has several, first the one that ``named_parameters`` gives."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def empty_model(config: ModelConfig, tied: list[list[str]], head: Head | None = None) -> PreTrainedModel:
    """Return the base as ``load_model`` does, but with its parameters on the meta device; buffers (rotary frequencies)
    have their values. ``tied`` holds the ``tied_groups`` of the loaded base: the values in its files, not only its
    config.json, decide what is tied."""
    from accelerate import init_empty_weights

    sizes = _check_stored(config, load_config(config), head)
    with init_empty_weights(include_buffers=False):
        model = _from_config(config, head, sizes, **_attention(config))
    put(model, load_words(config), config.name)
    for first, *others in tied:
        for name in others:
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, model.get_parameter(first))
    return model.eval()


def _stored_sizes(config: ModelConfig) -> list[int] | None:
    return stored_sizes(Path(config.name)) if Path(config.name).is_dir() else None


def _check_stored(config: ModelConfig, architecture: PretrainedConfig, head: Head | None) -> list[int] | None:
    """Raise ``UserError`` if the weights on this machine are damaged, or far fewer than the architecture has. Returns
    their sizes; None for those of the hub."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    sizes = _stored_sizes(config)
    # ZeRO-3 divides what is built, and cannot do so without memory. The launch has checked the base before.
    if sizes is not None and not quantization_of(architecture) and not is_deepspeed_zero3_enabled():
        meta_model(config, head)
    return sizes


def _from_config(config: ModelConfig, head: Head | None, sizes: list[int] | None, **options: Any) -> PreTrainedModel:
    def refuse(why: str) -> UserError:
        return UserError(
            f"model.name: no model can be made of the config.json of {config.name}: {why}", key="model.name"
        )

    architecture = load_config(config, head)
    build = _auto_class(architecture, config, head).from_config
    options |= {"dtype": torch_dtype(config), "trust_remote_code": config.trust_remote_code}
    with bounded_modules(config.name, sizes):
        model: PreTrainedModel = reading(lambda: build(architecture, **options), refuse)
    return model


def _attention(config: ModelConfig) -> dict[str, str]:
    return {} if config.attention == "auto" else {"attn_implementation": config.attention}


def _auto_class(architecture: PretrainedConfig, config: ModelConfig, head: Head | None) -> Any:
    """Return the class of transformers that opens the model: the one for causal language models, or, for a
    vision-language checkpoint without such a class, the one whose text decoder is trained; with ``head``, the one for
    sequence classifiers.

    Raises:
        UserError: transformers has no causal language model, or no classifier, of this architecture.
    """
    if head is not None:
        return classifier_class(architecture, config.name)
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    own_code = config.trust_remote_code and "AutoModelForCausalLM" in (getattr(architecture, "auto_map", None) or {})
    if own_code or type(architecture) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(architecture) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise UserError(
        f"model.name: {config.name} is a model of the type {architecture.model_type!r}, of which transformers has no "
        f"causal language model; {'set task: classification, or ' if can_classify(architecture) else ''}give a decoder "
        "that predicts the next token",
        key="model.name",
    )


def _is_cached(config: ModelConfig) -> bool:
    """Whether the weights of a hub id are on this machine."""
    from huggingface_hub import try_to_load_from_cache

    names = ("model.safetensors", "model.safetensors.index.json")
    found = (try_to_load_from_cache(config.name, name, revision=config.revision) for name in names)
    return any(isinstance(path, str) for path in found)


def has_weights(config: ModelConfig) -> bool:
    """Whether a local directory holds safetensors weights (True for a hub id, since only a download can tell)."""
    path = Path(config.name)
    return not path.is_dir() or any(path.glob("*.safetensors"))


def load_tokenizer(config: ModelConfig) -> Tokenizer | None:
    """Load the tokenizer with the words of ``model.add_tokens``, or return None if a local model directory has none
    (pre-tokenised rows need none)."""
    tokenizer = _plain_tokenizer(config)
    if config.add_tokens:
        _words_in(tokenizer, config)
    return tokenizer


def load_words(config: ModelConfig) -> Words | None:
    """Return the words that are added to the model and the rows that are trained; None if it stays as it is."""
    if not config.add_tokens:
        return Words((), 0, "all") if config.trained_embeddings == "all" else None
    return _words_in(_plain_tokenizer(config), config)


def _words_in(tokenizer: Tokenizer | None, config: ModelConfig) -> Words:
    if tokenizer is None:
        raise UserError(
            f"model.add_tokens: {config.name} has no tokenizer that words could be added to: name one in "
            "model.tokenizer",
            key="model.add_tokens",
        )
    return add_to(tokenizer, config.add_tokens, config.trained_embeddings)


def _plain_tokenizer(config: ModelConfig) -> Tokenizer | None:
    name, key = (config.tokenizer, "model.tokenizer") if config.tokenizer else (config.name, "model.name")
    _check_name(name, key)
    _check_remote_code(config)
    _check_directory(name, config.revision)
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if Path(name).is_dir() and not any((Path(name) / n).is_file() for n in names):
        return None
    from transformers import AutoTokenizer

    return _from_hub(AutoTokenizer.from_pretrained, name, config, key=key)


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters of the model; tied parameters count once."""
    return sum(p.numel() for p in model.parameters())


def _check_name(name: str, key: str) -> None:
    path = Path(name)
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if path.is_dir():
        if key == "model.name" and not (path / "config.json").is_file():
            raise UserError(f"{key}: {name} is a directory without a config.json, so it is not a model", key=key)
    elif path.exists() or looks_local:
        raise UserError(
            f"{key}: {name!r} does not exist; give a hub id (`owner/name`) or the directory of a local model",
            key=key,
        )


def _check_directory(name: str, revision: str | None) -> None:
    """Check the files of a model on this machine, in a directory or in the cache of the hub, before transformers reads
    them. Raises ``UserError`` as ``check_files`` and ``check_config`` do."""
    from huggingface_hub import try_to_load_from_cache

    directories = {Path(name)} if Path(name).is_dir() else set[Path]()
    with suppress(ValueError):  # a name that no model can have, which transformers reports
        for file in () if directories else ("config.json", "tokenizer_config.json", "tokenizer.json", INDEX):
            if isinstance(path := try_to_load_from_cache(name, file, revision=revision), str):
                directories.add(Path(path).parent)
    for directory in directories:
        check_files(directory)
        check_config(directory)


def _check_remote_code(config: ModelConfig) -> None:
    if config.trust_remote_code and not config.revision and not Path(config.name).is_dir():
        raise UserError(
            "model.trust_remote_code: true needs model.revision, a commit whose code somebody has read",
            key="model.revision",
        )


def _from_hub(load: Any, name: str, model: ModelConfig, *, key: str, **kwargs: Any) -> Any:
    def refuse(why: str) -> UserError:
        set_offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE")
        offline = set_offline and not Path(name).is_dir()
        why = re.split(" Check(?:out)? your internet", why)[0]
        hint = " HF_HUB_OFFLINE is set, so only models already on this machine can be used." if offline else ""
        return UserError(f"{key}: {name!r} cannot be loaded: {why}{hint}", key=key)

    options = {"revision": model.revision or "main", "trust_remote_code": model.trust_remote_code, **kwargs}
    return reading(lambda: load(name, **options), refuse)
