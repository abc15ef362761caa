"""Load an exported LoRA with the loader of PEFT, on the meta device, to see that PEFT reads it as the same update."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

from ..adapters.saved import PEFT_TENSORS
from ..io.checkpoint_files import read_header
from ..models.words import put, release
from .source import Source, architecture

ERRORS = (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError, AttributeError, ImportError, OSError)
"""What PEFT raises where it does not understand an adapter or refuses it."""


def is_installed() -> bool:
    """Whether there is a PEFT to load with."""
    return importlib.util.find_spec("peft") is not None


def refusal(directory: Path, source: Source, *, scale: float | None = 1.0) -> str | None:
    """Return why PEFT does not read an adapter directory as it is meant; None if it does: every tensor is loaded, none
    is left over or lacking, all have the shapes of the file, and each LoRA has the given scale (None: any). The base is
    that of ``source``, with rows for new words."""
    import peft
    from peft.tuners.lora import LoraLayer

    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            base = architecture(source.directory, source.head)
            put(base, source.words)
            release(base, keep=True)
            model = peft.PeftModel.from_pretrained(base, str(directory), low_cpu_mem_usage=True, torch_device="cpu")
            loaded = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    except ERRORS as error:
        return " ".join(str(error).split())[:300]
    stored = {tensor.name: tensor.shape for tensor in read_header(directory / PEFT_TENSORS)[0]}
    for name in sorted(stored.keys() | loaded.keys()):
        if name not in loaded:
            return f"it leaves {name} out"
        if name not in stored:
            return f"it expects {name}, which the adapter does not have"
        if tuple(loaded[name].shape) != stored[name]:
            return f"{name} has shape {stored[name]}, and it expects {tuple(loaded[name].shape)}"
    if lacking := [str(w.message) for w in said if "missing adapter keys" in str(w.message)]:
        return " ".join(lacking[0].split())[:300]
    scales = {name: module.scaling for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    wrong = sorted(name for name, scaling in scales.items() if scale and set(scaling.values()) != {scale})
    return f"it scales the update of {wrong[0]}" if wrong else None
