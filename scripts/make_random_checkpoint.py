"""Make a checkpoint of any size with random weights and a RaSA adapter for it, to measure merges without a download.

    python scripts/make_random_checkpoint.py CONFIG_DIRECTORY OUTPUT

The script writes OUTPUT/base (bf16, N(0, 0.02), sharded) and OUTPUT/adapter (RaSA r = 8, all values random). It needs
little more memory than one tensor.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import BinaryIO

import torch

from rasa_train.adapters.inject import attach
from rasa_train.adapters.saved import write_adapter
from rasa_train.adapters.state import saved_tensors
from rasa_train.io.checkpoint_files import tensor_bytes, write_tensors
from rasa_train.methods.rasa import RaSA
from rasa_train.models.config import ModelConfig
from rasa_train.models.load import meta_model

SHARD = 4_000_000_000
"""Largest size of a file in bytes, as in many models on the hub."""


def write_base(config: Path, output: Path) -> None:
    """Write a sharded checkpoint of random bf16 weights for the ``config.json`` in a directory."""
    output.mkdir(parents=True)
    shutil.copyfile(config / "config.json", output / "config.json")
    shapes = {name: tuple(p.shape) for name, p in meta_model(ModelConfig(name=str(config))).named_parameters()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        if shards[-1] and filled + nbytes > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    torch.manual_seed(0)

    def write(name: str, file: BinaryIO) -> None:
        file.write(tensor_bytes((torch.randn(shapes[name]) * 0.02).bfloat16()))

    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        entries = [(name, "BF16", shapes[name], 2 * torch.Size(shapes[name]).numel()) for name in names]
        print(file, write_tensors(output / file, entries, write))
        weight_map |= dict.fromkeys(names, file)
    total = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_random_adapter(base: Path, output: Path) -> None:
    """Write a RaSA adapter of random values for a base."""
    output.mkdir(parents=True)
    method = RaSA(r=8)
    model = meta_model(ModelConfig(name=str(base)))
    with torch.device("meta"):
        attach(model, method)
    torch.manual_seed(1)
    tensors = {name: torch.randn(t.shape) * 0.02 for name, t in saved_tensors(model).items()}
    write_adapter(output, method, tensors, base_model=str(base), base_revision=None)


if __name__ == "__main__":
    write_base(Path(sys.argv[1]), Path(sys.argv[2]) / "base")
    write_random_adapter(Path(sys.argv[2]) / "base", Path(sys.argv[2]) / "adapter")
