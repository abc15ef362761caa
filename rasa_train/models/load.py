"""The base model and its tokenizer, with real weights for training or on the meta device for counting and planning."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import process
from ..errors import UserError
from .config import ModelConfig, torch_dtype

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer


def load_config(config: ModelConfig) -> PretrainedConfig:
    """Return the architecture. Raises ``UserError`` if the model does not exist or transformers does not know it."""
    _check_name(config.name, "model.name")
    _check_remote_code(config)
    check_no_adapter(config.name)
    from transformers import AutoConfig

    return _from_hub(AutoConfig.from_pretrained, config.name, config, key="model.name")


def check_no_adapter(name: str) -> None:
    """Raise ``UserError`` if a model's directory holds an adapter of PEFT, which transformers would load unasked."""
    beside = Path(name) / "adapter_config.json"
    if beside.is_file():
        raise UserError(
            f"model.name: {name} holds a whole model and an adapter for it ({beside.name}), and transformers would "
            "load both: move the adapter's files to another directory. To go on from the model with the adapter in it, "
            "merge them first with rasa-merge",
            key="model.name",
        )


def load_model(config: ModelConfig) -> PreTrainedModel:
    """Load the base with its weights, in ``config.dtype``, in eval mode, on the CPU."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    architecture = load_config(config)
    if Path(config.name).is_dir() and not has_weights(config):
        raise UserError(f"model.name: {config.name} has a config.json but no *.safetensors weights", key="model.name")
    if not sys.stderr.isatty() or process.rank():
        disable_progress_bar()
    extra = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    return _from_hub(
        AutoModelForCausalLM.from_pretrained,
        config.name,
        config,
        key="model.name",
        config=architecture,
        dtype=torch_dtype(config),
        use_safetensors=True,
        **extra,
    )


def meta_model(config: ModelConfig) -> PreTrainedModel:
    """Return a model of the same architecture on the meta device: names and shapes without memory."""
    from transformers import AutoModelForCausalLM

    architecture = load_config(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            architecture, dtype=torch_dtype(config), trust_remote_code=config.trust_remote_code
        )
    return model


def empty_model(config: ModelConfig) -> PreTrainedModel:
    """Return the base as ``load_model`` does, but with its parameters on the meta device; buffers (rotary frequencies)
    have their values."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    architecture = load_config(config)
    extra = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            architecture, dtype=torch_dtype(config), trust_remote_code=config.trust_remote_code, **extra
        )
    return model.eval()


def has_weights(config: ModelConfig) -> bool:
    """Whether a local directory holds safetensors weights (True for a hub id, since only a download can tell)."""
    path = Path(config.name)
    return not path.is_dir() or any(path.glob("*.safetensors"))


def load_tokenizer(config: ModelConfig) -> Tokenizer | None:
    """Load the tokenizer, or return None if a local model directory has none (pre-tokenised rows need none)."""
    name, key = (config.tokenizer, "model.tokenizer") if config.tokenizer else (config.name, "model.name")
    _check_name(name, key)
    _check_remote_code(config)
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


def _check_remote_code(config: ModelConfig) -> None:
    if config.trust_remote_code and not config.revision and not Path(config.name).is_dir():
        raise UserError(
            "model.trust_remote_code: true needs model.revision, a commit whose code somebody has read",
            key="model.revision",
        )


def _from_hub(load: Any, name: str, model: ModelConfig, *, key: str, **kwargs: Any) -> Any:
    try:
        return load(name, revision=model.revision or "main", trust_remote_code=model.trust_remote_code, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE")
        why = re.split(" Check(?:out)? your internet", " ".join(str(error).split()))[0][:400]
        hint = " HF_HUB_OFFLINE is set, so only models already on this machine can be used." if offline else ""
        raise UserError(f"{key}: {name!r} cannot be loaded: {why}{hint}", key=key) from None
