"""Safetensors files that are written tensor by tensor, so that no more than one tensor is ever in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from .checkpoint_files import CODES

DTYPES = CODES | {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ENTRY = 128
"""Largest number of bytes that a tensor takes in the header, apart from its name."""


class TensorFile:
    """A new safetensors file, to which ``add`` appends tensors; larger dtypes must come first.

    The format requires the header before the data. Space for the header is reserved at the start of the file and filled
    at the end; the format allows spaces after the JSON.

    Args:
        names: the names that may be added. Not all of them have to be.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self.path = path
        room = 64 + sum(ENTRY + len(json.dumps(name)) for name in names)
        self._data = 8 + room + (-room) % 8
        self._entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        self._file: BinaryIO

    def __enter__(self) -> TensorFile:
        self._file = self.path.open("wb")
        self._file.seek(self._data)
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        begin = self._file.tell() - self._data
        assert name not in self._entries and begin % tensor.element_size() == 0, name
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._file.write(flat.numpy().data)
        self._entries[name] = (DTYPES[tensor.dtype], tuple(tensor.shape), begin, begin + len(flat))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file as file:
            if error is not None:
                return
            entries = {
                name: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
                for name, (dtype, shape, begin, end) in self._entries.items()
            }
            header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
            assert len(header) <= self._data - 8, "more names were added than were announced"
            file.seek(0)
            file.write((self._data - 8).to_bytes(8, "little") + header.ljust(self._data - 8))
        check_header(self.path, {name: shape for name, (_, shape, _, _) in self._entries.items()})


def check_header(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Read back a file that was just written. Raises ``RuntimeError`` unless the names and shapes of its tensors are
    exactly ``shapes``."""
    with safe_open(path, framework="pt") as file:
        written = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a mapping
    if written != dict(shapes):
        raise RuntimeError(f"{path} does not hold the tensors that were written to it; check the disk")
