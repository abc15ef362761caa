"""The identity of the base that an adapter was trained on: hashes of a few values of every tensor in its safetensors
files, and the settings in its ``config.json`` that alter what the model computes.

The identity is read from the files and not from the model, so it is the same on every device, under every strategy
and in every dtype that the model was held in.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from ..errors import UserError, some
from .checkpoint_files import FLOATS, INDEX, SINGLE, Stored, read_header, read_index
from .json_file import read_bytes, read_object

TENSORS, VALUES = 8, 64
"""Number of tensors that are recorded by name, and number of values taken from a row."""
PARTS, SETTINGS = "parts", "config"
"""Keys of an identity beside the names of tensors."""
SHORT = 6
"""Number of characters of a hash in ``parts``."""
NOT_COMPUTED = {
    *("_name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype"),
    *("attn_implementation", "use_cache", "use_return_dict", "return_dict", "gradient_checkpointing"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "initializer_range", "problem_type"),
    *("id2label", "label2id", "num_labels", "task_specific_params", "finetuning_task", "tokenizer_class", "prefix"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id"),
}
"""Settings of a ``config.json`` that do not alter what the model computes for given tokens, or that another version of
transformers writes differently for the same model."""
DTYPES = FLOATS | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes of which hashes are of the values, by their safetensors code. Hashes of others are of the bytes."""
_UNREADABLE = (
    UserError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    SafetensorError,
    LocalEntryNotFoundError,
    HfHubHTTPError,
)


def base_samples(name: str, revision: str | None = None, only: Iterable[str] | None = None) -> dict[str, str]:
    """Return hashes of sampled values by tensor name; empty if the base has no safetensors files on this machine.

    A hash covers the shape and 64 values in each of the first, the middle and the last row, as fp32: the same model in
    other shards, or in a wider dtype, has the same hashes.

    Args:
        name: directory or hub id (only files that were downloaded before are read).
        only: names in the files of the tensors to sample; default: weights spread evenly over the model.
    """
    try:
        files = _files(_directory(name, revision))
        return _samples(files, _spread(files) if only is None else [name for name in only if name in files])
    except _UNREADABLE:
        return {}  # the code that reads the weights reports what is wrong with them


def base_identity(name: str, revision: str | None = None) -> dict[str, Any]:
    """Return the identity of a base: some ``base_samples`` by name, ``parts`` with shortened hashes of all tensors by
    layer (sorted, one after the other), and ``config`` with the settings that count. Empty if the base has no
    safetensors files on this machine."""
    try:
        directory = _directory(name, revision)
        samples = _samples(files := _files(directory), files)
    except _UNREADABLE:
        return {}
    parts: dict[str, list[str]] = {}
    for tensor in sorted(samples):
        parts.setdefault(_part(tensor), []).append(_short(tensor, samples[tensor]))
    named = {tensor: samples[tensor] for tensor in _spread(files) if tensor in samples}
    return {
        **named,
        PARTS: {part: "".join(sorted(found)) for part, found in parts.items()},
        SETTINGS: _config(directory),
    }


@dataclass(frozen=True)
class Comparison:
    """The outcome of comparing a base with a recorded identity."""

    different: list[str]
    """Names of the tensors that differ."""
    compared: int
    """Number of tensors that were compared; 0 if nothing was recorded or the base has no safetensors files here."""
    settings: list[str]
    """Settings that differ, with both values."""

    @property
    def problem(self) -> str | None:
        """What differs, as the end of a sentence about the base; None if nothing does."""
        said = [some([f"config.json says {setting}" for setting in self.settings], 2)] if self.settings else []
        if self.different:
            said.append(
                f"{some(self.different, 1)} differs ({len(self.different)} of {self.compared} sampled tensors do)"
            )
        return "; ".join(said) or None


def compare(recorded: Mapping[str, Any], name: str, revision: str | None = None) -> Comparison:
    """Compare a base with a recorded identity, or with the few samples by name that older adapters hold. Tensors that
    only one of them has are left out: a tied head may be stored or not."""
    samples = {key: value for key, value in recorded.items() if key not in (PARTS, SETTINGS)}
    if not samples:
        return Comparison([], 0, [])
    try:
        settings = _changed(recorded.get(SETTINGS), _directory(name, revision))
    except _UNREADABLE:
        return Comparison([], 0, [])
    try:
        files = _files(_directory(name, revision))
        if not isinstance(parts := recorded.get(PARTS), dict):
            found = _samples(files, [key for key in samples if key in files])
            return Comparison([key for key in found if found[key] != samples[key]], len(found), settings)
        found = _samples(files, [tensor for tensor in files if isinstance(parts.get(_part(tensor)), str)])
    except _UNREADABLE:
        return Comparison([], 0, settings)
    groups: dict[str, dict[str, str]] = {}
    for tensor, sample in sorted(found.items()):
        groups.setdefault(_part(tensor), {})[_short(tensor, sample)] = tensor
    different, compared = [], 0
    for part, here in groups.items():
        there = {parts[part][at : at + SHORT] for at in range(0, len(parts[part]), SHORT)}
        compared += min(len(here), len(there))
        if there - here.keys():  # the tensors that have no counterpart are other ones, or more of them
            different += [tensor for short, tensor in here.items() if short not in there]
    return Comparison(different, compared, settings)


def _changed(old: object, directory: Path) -> list[str]:
    """Return the settings of which the value is another one than in ``old``. What only one of them has is left out:
    another version of transformers may know more settings."""
    if not isinstance(old, dict):
        return []
    new = _config(directory)
    return [f"{key}: {new[key]!r}, not {old[key]!r}" for key in new if key in old and new[key] != old[key]]


def _directory(name: str, revision: str | None) -> Path:
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    return Path(snapshot_download(name, revision=revision, local_files_only=True))


def _files(directory: Path) -> dict[str, Path]:
    """Return the file of each tensor, by the tensor's name."""
    if (directory / SINGLE).is_file():
        with safe_open(directory / SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), directory / SINGLE)
    return {name: directory / file for name, file in read_index(directory / INDEX)["weight_map"].items()}


def _spread(files: Iterable[str]) -> list[str]:
    names = [name for name in sorted(files) if name.endswith("weight")]
    return [names[len(names) * i // TENSORS] for i in range(min(TENSORS, len(names)))]


def _samples(files: Mapping[str, Path], names: Iterable[str]) -> dict[str, str]:
    """Return the hashes of the named tensors. Values are read by offset: through ``safe_open``, twenty thousand tensors
    of a mixture of experts would take a minute."""
    by_file: dict[Path, set[str]] = {}
    for name in names:
        by_file.setdefault(files[name], set()).add(name)
    samples: dict[str, str] = {}
    for path, wanted in by_file.items():
        stored = [tensor for tensor in read_header(path)[0] if tensor.name in wanted]
        if len(stored) < len(wanted):
            raise KeyError(min(wanted - {tensor.name for tensor in stored}))
        with path.open("rb", buffering=0) as file:
            samples |= {tensor.name: _sample(file.fileno(), tensor) for tensor in stored}
    return samples


def _sample(file: int, tensor: Stored) -> str:
    shape, values, count = tensor.shape, b"", math.prod(tensor.shape)
    each = tensor.nbytes // max(count, 1)
    for part in (0, 1, 2) if count and shape else ():
        row = 0
        for size in shape[:-1]:
            row = row * size + part * (size - 1) // 2
        values += os.pread(file, each * min(VALUES, shape[-1]), tensor.start + row * shape[-1] * each)
    if not shape:
        values = os.pread(file, each, tensor.start)
    if tensor.dtype in DTYPES and values:
        values = torch.frombuffer(bytearray(values), dtype=DTYPES[tensor.dtype]).float().numpy().tobytes()
    return hashlib.sha256(json.dumps(shape).encode() + values).hexdigest()[:16]


def _part(tensor: str) -> str:
    """Return the layer of a tensor, ``model.layers.3``, or the module of one that is in no layer."""
    layer = re.match(r".*?\.\d+(?=\.)", tensor)
    return layer[0] if layer else tensor.rpartition(".")[0] or tensor


def _short(tensor: str, sample: str) -> str:
    return hashlib.sha256(f"{tensor} {sample}".encode()).hexdigest()[:SHORT]


def _config(directory: Path) -> dict[str, Any]:
    """Return the settings of a model that count, by dotted key: with the defaults of transformers where transformers
    knows the model, because ``save_pretrained`` writes more of them than the authors of a model do."""
    from transformers import CONFIG_MAPPING

    try:
        stored = read_object(directory / "config.json")
    except (OSError, UserError):
        return {}
    try:
        whole = CONFIG_MAPPING[stored["model_type"]].from_dict(dict(stored)).to_dict()
    except Exception:  # the class of any model looks at values that anybody may have written
        whole = stored
    settings = json.loads(json.dumps(dict(_flat(whole)), default=str))
    if "auto_map" in stored:  # the code of the model is stored beside it
        files = [path for path in sorted(directory.glob("*.py")) if path.is_file()]  # a pipe would be waited for
        code = hashlib.sha256(b"".join(map(read_bytes, files)))
        settings["*.py"] = code.hexdigest()[:16]
    return dict(settings)


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, inner in sorted(value.items(), key=lambda item: str(item[0])):
        if key in NOT_COMPUTED or str(key).startswith("_"):
            continue
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def is_identity(values: Any) -> TypeGuard[dict[str, Any]]:
    """Whether values have the types of ``base_identity``."""
    if not isinstance(values, dict):
        return False
    samples = {name: value for name, value in values.items() if name not in (PARTS, SETTINGS)}
    parts, settings = values.get(PARTS, {}), values.get(SETTINGS, {})
    texts = [*samples.values(), *parts.values()] if isinstance(parts, dict) else [parts]
    return isinstance(settings, dict) and all(isinstance(text, str) for text in texts)
