"""The fingerprint of the base that an adapter was trained on: hashes of a few kilobytes of its safetensors files.

The fingerprint is read from the files and not from the model, so it is the same on every device, under every strategy
and in every dtype that the model was held in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from .checkpoint_files import INDEX, SINGLE

TENSORS, VALUES = 8, 64
"""Number of tensors that are sampled, and number of values taken from a row."""


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
        names = sorted(files) if only is None else [name for name in only if name in files]
        if only is None:
            names = [name for name in names if name.endswith("weight")]
            names = [names[len(names) * i // TENSORS] for i in range(min(TENSORS, len(names)))]
        return {name: _sample(files[name], name) for name in names}
    except (OSError, ValueError, KeyError, SafetensorError, LocalEntryNotFoundError, HfHubHTTPError):
        return {}  # the code that reads the weights reports what is wrong with them


def _directory(name: str, revision: str | None) -> Path:
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    return Path(snapshot_download(name, revision=revision, local_files_only=True))


def _files(directory: Path) -> dict[str, Path]:
    """Return the file of each tensor, by the tensor's name."""
    if (directory / SINGLE).is_file():
        with safe_open(directory / SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), directory / SINGLE)
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    return {name: directory / Path(file).name for name, file in weight_map.items()}  # never outside the directory


def _sample(path: Path, name: str) -> str:
    with safe_open(path, framework="pt") as file:
        tensor = file.get_slice(name)
        shape = tensor.get_shape()
        digest = hashlib.sha256(json.dumps(shape).encode())
        for part in (0, 1, 2):
            at = [part * (size - 1) // 2 for size in shape[:-1]]
            where = (*(slice(i, i + 1) for i in at), slice(0, VALUES))
            digest.update(tensor[where].float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
